"""Models under supervision by progress: where a rank hangs all of its role are ended, for they wait for each other.

A process that was killed shows in every call that it was asked for. One that is stopped, or waits in a collective for
one that is, shows in nothing but that its counters stand still. Each process of a `WatchedGroup` counts its calls and
what it does in them, and sends that from a thread of its own (``watched.py``) to one `Watchman`. It writes down where
the threads of all ranks stand and kills them; whoever waits for them then gets the error of a lost actor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.counters import count, counters
from actors.environment import this_node, worker_env
from actors.group import ActorGroup, ActorT, Role, Seats, is_async, methods_for_others
from actors.health import Deadlines, Health, State
from actors.member import bury, looks
from actors.watched import Report, be_watched

BEGUN, DONE = "begun", "done"
"""Counters of calls, the constructor's included."""

STARTED = 2
"""Calls that are done when a process has started: its constructor's and `setup`."""

START_S = 600.0
"""Without progress before that, however short `stall_s` is: imports move no counter."""


class Place(NamedTuple):
    """Of a process; one that is started anew has another one."""

    role: str
    generation: int
    rank: int


class Watching(NamedTuple):
    """What a group needs to be watched."""

    watchman: Any
    every_s: float
    """Between two reports of a process."""


class _Watched:
    """What the watchman knows of a process."""

    def __init__(self, stall_s: float, now: float) -> None:
        self.health = Health(_deadlines(stall_s), now)
        self.report: Report
        self._busy = False

    def heard(self, report: Report, now: float) -> None:
        busy = report.counters.get(BEGUN, 0) != report.counters.get(DONE, 0)
        if busy != self._busy:
            (self.health.began if busy else self.health.ended)(now)
        if self.health.state is State.STARTING and report.counters.get(DONE, 0) >= STARTED:
            self.health.started()
        self.report, self._busy = report, busy
        self.health.report(report.counters, now)


class Watchman:
    """The actor itself: one to a run, without a GPU, on the driver's node."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._guarded: dict[str, int] = {}
        """Role -> generation of the processes that must make progress."""
        self._watched: dict[Place, _Watched] = {}
        """All that were heard of."""
        self._ends: dict[str, asyncio.Task[tuple[str, str]]] = {}
        self._now = 0.0
        """Of the last look."""

    async def report(self, place: Place, report: Report) -> None:
        """From a process."""
        self._watched.setdefault(place, _Watched(self._stall_s, self._now)).heard(report, self._now)

    async def guard(self, role: str, generation: int) -> None:
        """From now on the ranks of a role must make progress; one that has stopped already is known by what it said."""
        self._guarded[role] = generation
        self._ends.pop(role, None)
        for place, one in [(place, one) for place, one in self._watched.items() if place.role == role]:
            del self._watched[place]
            if place.generation == generation:  # what it did before counts against nobody
                await self.report(place, one.report)

    async def leave(self, role: str) -> tuple[str, str]:
        """Not any more. Returns why its ranks were ended and where their threads stood, or nothing."""
        self._guarded.pop(role, None)
        end = self._ends.pop(role, None)
        return await end if end is not None else ("", "")

    async def begin(self) -> None:
        """Look at them from now on, for as long as this process lives."""
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        async for self._now in looks():
            for place, one in sorted(self._watched.items(), key=lambda found: found[0]):
                if self._guarded.get(place.role) == place.generation and one.health.look(self._now) is State.DEAD:
                    why = f"rank {place.rank} made no progress for {one.health.still(self._now):.0f} s"
                    self._ends[place.role] = asyncio.create_task(_end(place.role, self._ranks(place.role), why))
                    del self._guarded[place.role]

    def _ranks(self, role: str) -> dict[int, Report]:
        """Of the role that is guarded: rank -> its last report."""
        places = sorted(p for p in self._watched if p.role == role and p.generation == self._guarded[role])
        return {place.rank: self._watched[place].report for place in places}


async def _end(role: str, reports: Mapping[int, Report], why: str) -> tuple[str, str]:
    ends = await asyncio.gather(*map(bury, reports.values()))
    stood = [
        f"{role} rank {rank}: last said {dict(report.counters)}\n{stacks}\n"
        for (rank, report), (stacks, _) in zip(reports.items(), ends, strict=True)
    ]
    return why, "".join(stood)


def _deadlines(stall_s: float) -> Deadlines:
    return Deadlines(max(stall_s, START_S), stall_s)


def start_watchman(stall_s: float) -> Watching:
    """It watches already."""
    here = NodeAffinitySchedulingStrategy(this_node(), soft=False)
    options = {"num_cpus": 0, "max_concurrency": 1000, "scheduling_strategy": here}
    remote_cls: Any = ray.remote(Watchman)
    watchman = remote_cls.options(**options, runtime_env={"env_vars": worker_env(0)}).remote(stall_s)
    watchman.begin.remote()
    return Watching(watchman, _deadlines(stall_s).report_s)


class WatchedGroup(ActorGroup[ActorT]):
    """An `ActorGroup` of a role that is watched, from `guard` on."""

    def __init__(
        self,
        role: Role,
        cls: type[ActorT],
        arguments: Callable[[int], dict[str, Any]],
        seats: Seats | None = None,
        *,
        watching: Watching,
    ) -> None:
        self._watchman, self._every_s, self._generation = watching.watchman, watching.every_s, 0
        super().__init__(role, cls, arguments, seats)

    def guard(self) -> None:
        """From now on its processes must make progress, also those that `renew` starts."""
        self._watchman.guard.remote(self.role.name, self._generation)

    def leave(self) -> tuple[str, str]:
        """Not any more. Returns why its processes were ended for that, and where their threads stood, or nothing."""
        why, stacks = ray.get(self._watchman.leave.remote(self.role.name))
        return why, stacks

    def renew(self) -> None:
        self._generation += 1
        super().renew()
        self.guard()

    def _methods(self) -> dict[str, Any]:
        methods = super()._methods()
        methods["__init__"] = _watched_init(methods["__init__"])
        # What an async one waits for has deadlines of its own; that its process says something is enough.
        return methods if is_async(self._cls) else methods | _counted(self._cls)

    def _arguments_of(self, rank: int) -> dict[str, Any]:
        place = Place(self.role.name, self._generation, rank)
        watched = {"watchman": self._watchman, "place": place, "every_s": self._every_s}
        return {**watched, **super()._arguments_of(rank)}


def _watched_init(construct: Callable[..., None]) -> Callable[..., None]:
    def init(self: Any, watchman: Any, place: Place, every_s: float, **arguments: Any) -> None:
        be_watched(watchman, place, every_s, disk=True)
        count(BEGUN)
        try:
            construct(self, **arguments)
        finally:
            count(DONE)

    return init


def _counted(cls: type) -> dict[str, Any]:
    """The methods of a class that others call, as ones that count when they begin and end."""
    return {name: _counting(method) for name, method in methods_for_others(cls).items()}


def _counting(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def counting(*args: Any, **kwargs: Any) -> Any:
        if counters[BEGUN] != counters[DONE]:  # one of its own methods calls it, not others
            return method(*args, **kwargs)
        count(BEGUN)
        try:
            return method(*args, **kwargs)
        finally:
            count(DONE)

    return counting
