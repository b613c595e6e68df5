"""Whether a watched actor works, told by the progress of its counters and by nothing that it answers.

A state machine without clock, threads or Ray: whoever watches tells it what happened and when, and asks how it is.

    starting -> syncing -> ready        the process is up and set up; it serves the current weights, proved
    syncing, ready -> suspect           work under way, and for half of its deadline no counter moved
    suspect -> where it was             a counter moved again
    any -> dead                         the process ended, or nothing moved for the whole deadline; for good

An actor that is started in place of a dead one is another one: it begins at `starting`, and only a proved sync makes it
ready. So it is for every role; one without weights to sync is `synced` as soon as it has started.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    STARTING = "starting"
    SYNCING = "syncing"
    READY = "ready"
    SUSPECT = "suspect"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds without progress after which an actor is given up."""

    start_s: float
    """While it starts, from the moment that its process is up."""

    work_s: float
    """Afterwards."""

    @property
    def report_s(self) -> float:
        """Between two reports of its process: few of them, for one watcher may hear from a thousand processes."""
        return min(max(self.work_s / 60, 0.5), 10.0)


class Health:
    """Of one actor, from its start to its end. All times are seconds on the watcher's clock."""

    def __init__(self, deadlines: Deadlines, now: float) -> None:
        self.state = State.STARTING
        self._deadlines = deadlines
        self._before = State.STARTING
        """Where it stood when it became suspect."""
        self._calls = 0
        self._counters: dict[str, int] | None = None
        self._moved = now

    @property
    def up(self) -> bool:
        """Its process has been heard of. Before, it may be waiting for a place, which no deadline of its own ends."""
        return self._counters is not None

    def report(self, counters: Mapping[str, int], now: float) -> None:
        """The process says how far its counters are. With nothing to do, to be heard of is enough."""
        if not self._calls or counters != self._counters:
            self._moved = now
        self._counters = dict(counters)

    def began(self, now: float) -> None:
        """It was asked for something."""
        if not self._calls:
            self._moved = now
        self._calls += 1

    def ended(self, now: float) -> None:
        """It answered, or nobody waits any more."""
        self._calls -= 1
        self._moved = now

    def started(self) -> None:
        """Constructed and set up."""
        if self.state is not State.DEAD:
            self.state = self._before = State.SYNCING

    def behind(self) -> None:
        """There are newer weights than those that it serves."""
        if self.state is State.READY:
            self.state = State.SYNCING
        self._before = State.SYNCING

    def synced(self) -> None:
        """It serves the newest weights."""
        if self.state is not State.DEAD:
            self.state = self._before = State.READY

    def died(self) -> None:
        self.state = State.DEAD

    def look(self, now: float) -> State | None:
        """The state that it is in now, if it is another one than at the last look. A dead one is yet to be buried."""
        if self.state is State.DEAD or not self.up:
            return None
        starting = self.state is State.STARTING
        limit = self._deadlines.start_s if starting else self._deadlines.work_s
        still = now - self._moved
        if still > limit:
            self.state = State.DEAD
        elif self.state is State.SUSPECT:
            if still > limit / 2:
                return None
            self.state = self._before
        elif still > limit / 2 and not starting:
            self._before, self.state = self.state, State.SUSPECT
        else:
            return None
        return self.state

    def still(self, now: float) -> float:
        """Seconds since it last made progress."""
        return now - self._moved
