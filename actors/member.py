"""One watched actor as its supervisor sees it: what it is asked, whether it still works, and how it is ended.

For any role; the supervisor runs an event loop and calls `look` now and then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NamedTuple

import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.environment import worker_env
from actors.group import NEVER_RAN, end_of, last_line, root_cause
from actors.health import Deadlines, Health, State
from actors.placement import alive_nodes
from actors.watched import Report, end_process
from rayllm.errors import EngineStopped

LOOK_S = 0.5
"""Between two looks at the actors."""

BURIAL_S, BURIALS = 20.0, 3
"""How long the node of a lost actor may take to end its process, and how often it is asked."""


class Call(NamedTuple):
    """A method and what it is called with, also for actors that are yet to come."""

    method: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}


class Lost(Exception):
    """The actor that was asked is lost."""


class Member:
    """An actor from its start to its burial. ``noun`` is what people call its like.

    Args:
        number: told apart by it; an actor that takes the place of a lost one has another.
        clock: seconds, on which deadlines count.
        on_lost: called once, with the reason.
    """

    noun = "actor"
    place = 0
    """Which of the role's places it has."""

    def __init__(
        self,
        number: int,
        handle: Any,
        deadlines: Deadlines,
        clock: Callable[[], float],
        on_lost: Callable[[Member, str], None],
    ) -> None:
        self.number, self._handle, self._clock, self._on_lost = number, handle, clock, on_lost
        self.name = f"{self.noun} {number}"
        self.health = Health(deadlines, clock())
        self.report: Report | None = None
        self.could_not_start: str | None = None
        """What its constructor raised."""
        self._never_ran = False
        self._gone = asyncio.get_running_loop().create_future()

    @property
    def state(self) -> State:
        return self.health.state

    def heard(self, report: Report) -> None:
        """Its process said how far its counters are."""
        self.report = report
        self.health.report(report.counters, self._clock())

    def look(self) -> State | None:
        """Its state, if that is another one than before; a dead one is lost by then."""
        state, still = self.health.look(self._clock()), self.still
        if state is State.DEAD:
            self.lose(f"no progress for {still:.0f} s")
        return state

    @property
    def still(self) -> float:
        """Seconds since it last made progress."""
        return self.health.still(self._clock())

    async def call(self, call: Call) -> Any:
        """What the actor answers.

        Raises:
            Lost: nothing, it is lost.
            Exception: whatever the method raised.
        """
        if self._gone.done():
            raise Lost(self.name)
        self.health.began(self._clock())
        reference = getattr(self._handle, call.method).remote(*call.args, **call.kwargs)
        answer = asyncio.ensure_future(_answer(reference))
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # also when nobody asks any more
        try:
            await asyncio.wait((answer, self._gone), return_when=asyncio.FIRST_COMPLETED)
            if not self._gone.done():
                return answer.result()
        except RayActorError as error:
            if error.actor_id != self._handle._actor_id.hex():  # it stands for an argument of the call
                raise
            self.could_not_start = last_line(error) if error.actor_init_failed else None
            self._never_ran = NEVER_RAN in str(error)
            self.lose(f"its process ended: {last_line(error)}")
        except ObjectLostError:
            self.lose("its answer was lost with its node")
        except RayTaskError as error:
            cause = root_cause(error)
            if not isinstance(cause, EngineStopped):
                raise cause from None
            self.lose(str(cause))
        except OutOfMemoryError as error:  # Ray ended the process before the node had to
            self.lose(end_of(error))
        finally:
            self.health.ended(self._clock())
        raise Lost(self.name)

    def leaves(self) -> str:
        """What becomes of its work when it is lost, for the line that says so."""
        return ""

    def lose(self, reason: str) -> None:
        """It is dead, for good: whoever waits for it is told."""
        if not self._gone.done():
            self.health.died()
            self._gone.set_result(None)
            self._on_lost(self, reason)

    async def bury(self) -> tuple[str, bool]:
        """End what is left of a lost one, children and all; returns where its threads stood, and whether its node
        is still there."""
        found = ("", not self._never_ran) if self.report is None else await bury(self.report)
        self.kill()
        return found

    def kill(self) -> None:
        """Ray's own way, which reaches an actor that has no place yet too."""
        ray.kill(self._handle)


async def looks() -> AsyncIterator[float]:
    """The time of each look, for ever: seconds in which somebody looked. What this process slept through counts against
    nobody."""
    now, last = 0.0, time.monotonic()
    while True:
        await asyncio.sleep(LOOK_S)
        now += min(time.monotonic() - last, 2 * LOOK_S)
        last = time.monotonic()
        yield now


async def bury(report: Report) -> tuple[str, bool]:
    """`end_process` on the process's own node; returns where its threads stood, and whether that node is still there.
    """
    there = NodeAffinitySchedulingStrategy(report.node, soft=False)
    settings: dict[str, Any] = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": there}
    end: Any = ray.remote(end_process).options(**settings, runtime_env={"env_vars": worker_env(0)})
    for _ in range(BURIALS):
        try:
            return await asyncio.wait_for(_answer(end.remote(report)), BURIAL_S), True
        except (TimeoutError, RayError):
            if report.node not in [node["NodeID"] for node in await asyncio.to_thread(alive_nodes)]:
                return "", False
    return "", True


async def _answer(reference: Any) -> Any:
    return await reference
