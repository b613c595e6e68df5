"""Actors of one role under supervision: started, judged by their progress, replaced within a budget, given up.

An actor is judged by the counters that its process sends (``watched.py``, ``health.py``), never by whether it answers.
Lost are: one whose process ended, whose engine said that it stopped, or that made no progress in time. Its threads'
stacks are written down, its process group is killed whole, and another one is started in its place, as often as the
budget allows; a node that went takes nothing from the budget. When fewer than the run needs are up and no more will
come, whoever waits gets a `FleetExhausted`. Every decision is one line.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray

from actors.group import Role
from actors.health import Deadlines, State
from actors.member import Call, Member, looks
from actors.watched import Report, start_watched
from rayllm.errors import FleetExhausted

BUDGET_S = 3600.0
"""Restarts are counted over so many seconds."""

PLACE_S = 120.0
"""How long an actor that the run needs may take at least to find a place, before the run is given up."""

PATIENCE_S = 15.0
"""After which it is said that actors are waited for."""

MemberT = TypeVar("MemberT", bound=Member)


@dataclass(frozen=True, slots=True)
class Size:
    """How many actors, and for how long fewer."""

    start: int
    least: int
    most: int
    max_restarts: int | None
    """Of failed ones, within an hour; None: none is ever replaced."""

    wait_s: float
    """For nodes, where fewer than ``least`` are there."""


def _anywhere(place: int) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Blueprint:
    """What an actor is and how it starts."""

    role: Role
    cls: type
    """A `shell`: whoever is given it imports nothing of the actor's."""

    arguments: Callable[[int], dict[str, Any]]
    """Number of the actor -> the constructor's keyword arguments."""

    setup: Sequence[Call] = ()
    """Calls that make it ready, before any other."""

    place: Callable[[int], dict[str, Any]] = _anywhere
    """Ray's options for the first place, the second and so on; who is started for a lost one gets the same."""

    def start(self, supervisor: Any, number: int, place: int, deadlines: Deadlines) -> Any:
        arguments, options = self.arguments(number), self.place(place)
        return start_watched(self.role, self.cls, arguments, supervisor, number, deadlines.report_s, **options)


class Supervisor(ABC, Generic[MemberT]):
    """Part of a Ray actor with an event loop. It is given the first actors by `adopt`; all the rest is done by its own
    tasks.

    Args:
        member_cls: what it keeps of each actor.
    """

    def __init__(self, member_cls: type[MemberT], blueprint: Blueprint, size: Size, deadlines: Deadlines) -> None:
        self._member_cls, self._blueprint, self._size, self._deadlines = member_cls, blueprint, size, deadlines
        self._wanted = size.start
        self._members: dict[int, MemberT] = {}
        self._numbers = itertools.count(size.start)
        self._restarts: list[float] = []
        self._unreplaced = 0
        """Failed ones in whose place none was started yet. Those that went with their nodes are not among them."""
        self._last_lost = ""
        self._short_since: float | None = None
        self._told_short = False
        self._now = 0.0
        """Of the last look."""
        self._lines: list[tuple[str, str]] = []
        self._hushed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: dict[asyncio.Future[None], Callable[[], bool]] = {}
        """Who waits -> for what."""
        self._end: Exception | None = None

    @abstractmethod
    async def _keep(self, member: MemberT) -> None:
        """Set an actor up, and do with it what is to be done as long as it lives. What it raises ends the run."""

    async def adopt(self, handles: Sequence[Any]) -> None:
        """Take over the first actors, numbered from 0, and begin to watch."""
        for number, handle in enumerate(handles):
            self._add(number, handle, place=number)
        self._spawn(self._watch())

    async def report(self, number: int, report: Report) -> None:
        """From an actor's process."""
        if number in self._members:
            self._members[number].heard(report)

    async def started(self) -> None:
        """Until those that the run starts with are set up."""
        await self._until(lambda: len(self._up()) >= self._size.start)

    async def grow(self) -> None:
        """From now on take as many as there are to be had."""
        self._wanted = self._size.most

    async def decisions(self, after: int) -> list[tuple[str, str]]:
        """Lines with details, without the first ``after``: at least one, or none after `hush`."""
        await self._when(lambda: len(self._lines) > after or self._hushed)
        return self._lines[after:]

    async def hush(self) -> None:
        """Nobody listens any more."""
        self._hushed = True
        self._changed()

    async def close(self) -> None:
        """End them all. Nothing is decided any more."""
        for task in self._tasks:
            task.cancel()
        for member in self._members.values():
            member.kill()

    def _add(self, number: int, handle: Any, *, place: int) -> None:
        member = self._member_cls(number, handle, self._deadlines, lambda: self._now, self._on_lost)
        member.place = place
        self._members[number] = member
        self._spawn(self._keep(member))

    def _on_lost(self, member: Member, reason: str) -> None:
        self._spawn(self._bury(self._members[member.number], reason, member.leaves()))
        self._changed()

    async def _bury(self, member: MemberT, reason: str, leaves: str) -> None:
        """End what is left of it, tell what it was, and make room for another."""
        stacks, node_lives = await member.bury()
        del self._members[member.number]
        if node_lives:
            self._unreplaced += 1
        self._last_lost = f"{member.name}: {reason}"
        self._say(f"{member.name} is lost{'' if node_lives else ' with its node'}: {reason}{leaves}", stacks)

    async def _watch(self) -> None:
        async for self._now in looks():
            self._look()
            self._refill()
            self._check_enough()

    def _look(self) -> None:
        for member in list(self._members.values()):
            verdict = member.look()
            if verdict is State.SUSPECT:
                self._say(f"{member.name} is suspect: no progress for {member.still:.0f} s; it gets no new work")
            elif verdict is not None and verdict is not State.DEAD:
                self._say(f"{member.name} makes progress again")

    def _refill(self) -> None:
        """Start what is missing. A dead one keeps its place until it is buried, and its resources are free."""
        self._restarts = [when for when in self._restarts if self._now - when < BUDGET_S]
        allowed = self._size.max_restarts
        while allowed is not None and len(self._members) < self._wanted:
            if self._wanted - len(self._members) <= self._unreplaced:  # what is missing has failed
                if len(self._restarts) >= allowed:
                    return
                self._restarts.append(self._now)
                self._unreplaced -= 1
            number, me = next(self._numbers), ray.get_runtime_context().current_actor
            taken = {member.place for member in self._members.values()}
            place = next(index for index in itertools.count() if index not in taken)
            self._add(number, self._blueprint.start(me, number, place, self._deadlines), place=place)
            self._say(f"{self._members[number].name} starts")

    def _check_enough(self) -> None:
        """End the run when fewer than it needs are up and no more will come."""
        up = [member for member in self._members.values() if member.state is not State.DEAD and member.health.up]
        if len(up) >= self._size.least:
            self._short_since, self._told_short = None, False
            return
        role, allowed = self._blueprint.role, self._size.max_restarts
        have = f"{len(up)} of at least {self._size.least} {self._member_cls.noun}s are up"
        if len(self._members) < self._size.least:  # none is started any more
            spent = f"the restarts of an hour ({role.name}.max_restarts={allowed}) are used up"
            reason = "none is ever replaced" if allowed is None else spent
            self._give_up(f"{have} and {reason}; the last that was lost: {self._last_lost}")
            return
        if self._short_since is None:
            self._short_since = self._now
        short = self._now - self._short_since
        limit = max(self._size.wait_s, PLACE_S)
        missing = f"{have}; one needs {role.cpus:g} CPU and {role.gpus:g} GPU"
        if short > limit:
            lost = f"; the last that was lost: {self._last_lost}" if self._last_lost else ""
            self._give_up(f"{missing}, and none found a place within {limit:g} s{lost}")
        elif short > PATIENCE_S and not self._told_short:
            self._told_short = True
            self._say(f"waiting: {missing}")

    def _give_up(self, text: str) -> None:
        if self._end is None:
            self._say(f"the run ends: {text}")
            after = "The last checkpoint is intact: the same command continues"
            self._fail(FleetExhausted(f"{self._blueprint.role.name}: {text}. {after}"))

    def _fail(self, error: Exception) -> None:
        """Whoever waits gets the error, now and later."""
        self._end = self._end or error
        self._changed()

    def _in(self, *states: State) -> list[MemberT]:
        """In the order of their numbers."""
        return [member for member in self._members.values() if member.state in states]

    def _up(self) -> list[MemberT]:
        """Set up and alive."""
        return self._in(State.SYNCING, State.READY, State.SUSPECT)

    def _say(self, line: str, detail: str = "") -> None:
        self._lines.append((line, detail))
        print(line, detail, file=sys.stderr, flush=True)
        self._changed()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run beside everything else; what it raises ends the run."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            self._fail(error)

    def _changed(self) -> None:
        """Wake those whose condition holds now, and nobody else: each of many actors has somebody who waits."""
        for waiter, condition in self._waiting.items():
            if not waiter.done() and condition():
                waiter.set_result(None)

    async def _when(self, condition: Callable[[], bool]) -> None:
        while not condition():
            waiter = asyncio.get_running_loop().create_future()
            self._waiting[waiter] = condition
            try:
                await waiter
            finally:
                del self._waiting[waiter]

    async def _until(self, condition: Callable[[], bool]) -> None:
        await self._when(lambda: self._end is not None or condition())
        if self._end is not None:
            raise self._end
