"""Events from a worker to the driver, without waiting: a mailbox actor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ray

from rayllm import faults


@dataclass(frozen=True, slots=True)
class StepEvent:
    """``step`` optimizer steps are done."""

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What a person should read."""

    saved: bool = False
    """The checkpoint of this step is written."""

    restarted: bool = False
    """Workers begin at this step: what was logged after it will come again."""

    history: tuple[tuple[int, dict[str, float]], ...] = ()
    """Of a restart: the metrics that the checkpoint has; the driver may have died before it wrote them."""


class ProgressActor:
    """Keeps events until the driver drains them, and the driver's wish to stop until the workers ask."""

    def __init__(self) -> None:
        self._events: list[StepEvent] = []
        self._stop = False

    def push(self, event: StepEvent) -> None:
        faults.reach("progress.push")
        self._events.append(event)

    def drain(self) -> list[StepEvent]:
        events, self._events = self._events, []
        return events

    def stop(self) -> None:
        """Ask the workers to save after the step that they are at, and to end."""
        self._stop = True

    def stopping(self) -> bool:
        return self._stop


def start_progress_actor() -> ray.actor.ActorHandle:
    """Costs no CPU; ends with the driver."""
    remote_cls: Any = ray.remote(num_cpus=0)(ProgressActor)
    return remote_cls.remote()
