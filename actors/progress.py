"""Events from a worker to the driver, without waiting: a mailbox actor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from rayllm import faults


@dataclass(frozen=True, slots=True)
class StepEvent:
    """``step`` optimizer steps are done; a restart after a failure begins again from an earlier step."""

    step: int
    metrics: dict[str, float]
    restarted: bool = False


class ProgressActor:
    """Keeps events until the driver drains them."""

    def __init__(self) -> None:
        self._events: list[StepEvent] = []

    def push(self, event: StepEvent) -> None:
        faults.reach("progress.push")
        self._events.append(event)

    def drain(self) -> list[StepEvent]:
        events, self._events = self._events, []
        return events


def start_progress_actor() -> ray.actor.ActorHandle:
    """Costs no CPU; ends with the driver."""
    remote_cls: Any = ray.remote(num_cpus=0)(ProgressActor)
    return remote_cls.remote()
