"""Who samples what, and whether it still does: one actor routes the work of a run to its engines and watches them.

Work comes in pieces and goes to the engine with the fewest tokens before it. When an engine is lost its unfinished
pieces go to the others; what a sample says depends on seeds and weights alone, so nothing else changes. An answer passes
through this process: it outlives the engine, and the node, that made it.

An engine is judged by the counters that its process sends (``watched.py``, ``health.py``), never by whether it answers.
Lost are: one whose process ended, whose engine said that it stopped, or that made no progress in time. Its threads'
stacks are written down, its process group is killed whole, and another one is started in its place, as often as the
budget allows; a node that went takes nothing from the budget. Whoever starts later than the others is set up like
them, and makes the last sync, proved, before its first piece of work. Every decision is one line.
"""

from __future__ import annotations

import asyncio
import itertools
import reprlib
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from actors.group import Role
from actors.health import Deadlines, State
from actors.member import Call, Lost, Member
from actors.watched import Report, start_watched
from rayllm.errors import FleetExhausted

LOOK_S = 0.5
"""Between two looks at the engines."""

BUDGET_S = 3600.0
"""Restarts are counted over so many seconds."""

PLACE_S = 120.0
"""How long an engine that is missed may take at least to find a place, before the fleet is given up."""

PATIENCE_S = 15.0
"""After which it is said that engines are waited for."""

MAX_LOSSES = 3
"""Engines that may be lost with one piece of work under way: the next one would die of it too."""


@dataclass(frozen=True, slots=True)
class Size:
    """How many engines, and for how long fewer."""

    start: int
    least: int
    most: int
    max_restarts: int | None
    """Of failed engines, within an hour; None: no engine is ever replaced."""

    wait_s: float
    """For nodes, where fewer than ``least`` are there."""


@dataclass(frozen=True)
class Blueprint:
    """What an engine is and how it starts."""

    role: Role
    cls: type
    arguments: Callable[[int], dict[str, Any]]
    """Number of the engine -> the constructor's keyword arguments."""

    setup: Sequence[Call] = ()
    """Before the first sync."""

    def start(self, supervisor: Any, number: int) -> Any:
        return start_watched(self.role, self.cls, self.arguments(number), supervisor, number)


@dataclass(frozen=True, slots=True)
class EngineStatus:
    number: int
    state: State
    pid: int | None
    node: str | None
    served: int
    """Pieces of work that it finished."""


class Engine(Member):
    """A member of the fleet with what it has to do."""

    tokens = 0
    pieces = 0
    served = 0
    reading = False
    """New weights, from where the learner left them."""


class FleetActor:
    """Make it a Ray actor, give it the first engines by `adopt`, and all the rest is done by its own tasks."""

    def __init__(self, blueprint: Blueprint, size: Size, deadlines: Deadlines) -> None:
        self._blueprint, self._size, self._deadlines = blueprint, size, deadlines
        self._wanted = size.start
        self._engines: dict[int, Engine] = {}
        self._numbers = itertools.count(size.start)
        self._sync: Call | None = None
        self._publishing = False
        self._served = False
        """Whether any engine ever did: before, one that cannot start is a mistake of whoever asked for it."""
        self._failures: list[float] = []
        self._last_failure = ""
        self._short_since: float | None = None
        self._now = 0.0
        """Seconds in which the engines were looked at: what this process slept through counts against nobody."""
        self._lines: list[tuple[str, str]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._event = asyncio.Event()
        self._end: Exception | None = None
        self._hushed = False

    # What the driver and the engines call.

    async def adopt(self, handles: Sequence[Any]) -> None:
        """Take over the first engines, numbered from 0, and begin to watch."""
        for number, handle in enumerate(handles):
            self._add(number, handle)
        self._spawn(self._watch())

    async def report(self, number: int, report: Report) -> None:
        """From an engine's process."""
        if number in self._engines:
            self._engines[number].heard(report)

    async def started(self) -> None:
        """Until the engines that the run starts with are set up."""
        await self._until(lambda: len(self._up()) >= self._size.start)

    async def grow(self) -> None:
        """From now on take as many engines as there are to be had."""
        self._wanted = self._size.most

    async def work(self, method: str, work: list[Any], tokens: int, arguments: Mapping[str, Any]) -> Any:
        """What the method of some engine returns.

        Args:
            work: the one piece; a reference in it is waited for and goes on as a reference.
            tokens: what it costs.

        Raises:
            FleetExhausted: too few engines are left.
            RuntimeError: engine after engine was lost with this piece under way.
            Exception: whatever the method raised.
        """
        if isinstance(work[0], ray.ObjectRef):  # an engine that waits for it would look as if it hung
            await asyncio.to_thread(ray.wait, work, fetch_local=False)
        lost: list[str] = []
        while len(lost) < MAX_LOSSES:
            await self._until(lambda: bool(self._in(State.READY)))
            engine = min(self._in(State.READY), key=lambda e: e.tokens)
            engine.tokens += tokens
            engine.pieces += 1
            try:
                answer = await engine.call(Call(method, tuple(work), arguments))
                engine.served += 1
                return answer
            except Lost as error:
                lost.append(str(error))
            finally:
                engine.tokens -= tokens
                engine.pieces -= 1
        raise RuntimeError(f"{', '.join(lost)} were lost, one after the other, with the same work: {reprlib.repr(work)}")

    async def readers(self) -> list[str] | None:
        """Nodes whose engines will read the weights that are published next; None: any may. From now until they are
        announced by `sync` nobody begins to read, for what is read now changes."""
        self._publishing = True
        await self._until(lambda: not any(engine.reading for engine in self._engines.values()))
        if self._size.most > self._size.start:
            return None
        role, nodes = self._blueprint.role, await asyncio.to_thread(ray.nodes)
        fits = [node for node in nodes if node["Alive"] and role.cpus <= node["Resources"].get("CPU", 0)]
        return sorted(node["NodeID"] for node in fits if role.gpus <= node["Resources"].get("GPU", 0))

    async def sync(self, call: Call) -> int:
        """Let every engine make the call, and every later one before it serves; returns how many serve. Does not wait
        for an engine that makes no progress: it serves no more until it has made the call."""
        if not self._served:
            await self.started()
        self._sync, self._publishing = call, False
        serving = self._in(State.READY, State.SUSPECT) if self._served else self._up()
        for engine in self._engines.values():
            engine.health.behind()
        self._changed()
        await self._until(lambda: not any(engine.state is State.SYNCING for engine in serving))
        return len(self._in(State.READY))

    async def each(self, method: str, rows: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
        """A method of every engine that is up, in their order; of one that is lost meanwhile nothing.

        Args:
            rows: arguments, for the first engine, the second and so on; None: none.
        """
        engines = self._up()
        given = [()] * len(engines) if rows is None else rows
        calls = [engine.call(Call(method, row)) for engine, row in zip(engines, given, strict=True)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        kept = [answer for answer in answers if not isinstance(answer, Lost)]
        for answer in kept:
            if isinstance(answer, BaseException):
                raise answer
        return kept

    async def decisions(self, after: int) -> list[tuple[str, str]]:
        """Lines with details, without the first ``after``: at least one, or none after `hush`."""
        while len(self._lines) <= after and not self._hushed:
            await self._event.wait()
        return self._lines[after:]

    async def hush(self) -> None:
        """Nobody listens any more."""
        self._hushed = True
        self._changed()

    async def status(self) -> list[EngineStatus]:
        """Of all engines that are not buried yet."""
        found = []
        for engine in self._engines.values():
            pid, node = (engine.report.pid, engine.report.node) if engine.report else (None, None)
            found.append(EngineStatus(engine.number, engine.state, pid, node, engine.served))
        return found

    async def close(self) -> None:
        """End the engines. Nothing is decided any more."""
        for task in self._tasks:
            task.cancel()
        for engine in self._engines.values():
            engine.kill()

    # Engines come, serve and go.

    def _add(self, number: int, handle: Any) -> None:
        engine = Engine(number, handle, self._deadlines, lambda: self._now, self._on_lost)
        self._engines[number] = engine
        self._spawn(self._keep(engine))

    async def _keep(self, engine: Engine) -> None:
        """Set an engine up and keep it in step with the learner, as long as it lives."""
        done: Call | None = None
        try:
            for call in (Call("__ray_ready__"), *self._blueprint.setup):
                await engine.call(call)
            engine.health.started()
            self._changed()
            while True:
                await self._until(lambda: not self._publishing and self._sync is not done)
                done = await self._synced(engine, first=done is None) or done
        except Lost:
            if engine.could_not_start and not self._served:
                raise RuntimeError(f"an engine could not start: {engine.could_not_start}") from None

    async def _synced(self, engine: Engine, *, first: bool) -> Call | None:
        """The sync that the engine has made; None if it must be made again, for what it read was being replaced."""
        sync = self._sync
        assert sync is not None
        engine.reading = True
        try:
            await engine.call(sync)
            if first:  # the others prove it while they sample, and hand nothing out before
                await engine.call(Call("proved"))
        except Lost:
            raise
        except Exception:
            if self._is_newest(sync):
                raise
        finally:
            engine.reading = False
            self._changed()
        if not self._is_newest(sync):
            return None
        if first and engine.number >= self._size.start:
            self._say(f"engine {engine.number} serves: it has the policy's weights, proved")
        engine.health.synced()
        self._served = True
        self._changed()
        return sync

    def _is_newest(self, sync: Call) -> bool:
        return self._sync is sync and not self._publishing

    def _on_lost(self, engine: Member, reason: str) -> None:
        self._spawn(self._bury(self._engines[engine.number], reason))
        self._changed()

    async def _bury(self, engine: Engine, reason: str) -> None:
        """End what is left of it, tell what it was, and make room for another."""
        pieces = engine.pieces
        stacks, node_lives = await engine.bury()
        del self._engines[engine.number]
        if node_lives:
            self._failures.append(self._now)
        self._last_failure = f"engine {engine.number}: {reason}"
        place = "" if node_lives else " with its node"
        going = f"; {pieces} unfinished pieces of work go to the others" if pieces else ""
        self._say(f"engine {engine.number} is lost{place}: {reason}{going}", stacks)

    # Watching.

    async def _watch(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(LOOK_S)
            self._now += min(time.monotonic() - last, 2 * LOOK_S)
            last = time.monotonic()
            self._look()
            self._refill()
            self._check_enough()

    def _look(self) -> None:
        for engine in list(self._engines.values()):
            verdict = engine.look()
            if verdict is State.SUSPECT:
                still = f"no progress for {engine.still:.0f} s"
                self._say(f"engine {engine.number} is suspect: {still}; it gets no new work")
            elif verdict is not None and verdict is not State.DEAD:
                self._say(f"engine {engine.number} makes progress again")

    def _refill(self) -> None:
        """Start what is missing. A dead engine keeps its place until it is buried, and its resources are free."""
        self._failures = [when for when in self._failures if self._now - when < BUDGET_S]
        allowed = self._size.max_restarts
        if allowed is None or len(self._failures) > allowed:
            return
        while len(self._engines) < self._wanted:
            number = next(self._numbers)
            self._add(number, self._blueprint.start(ray.get_runtime_context().current_actor, number))
            self._say(f"engine {number} starts")

    def _check_enough(self) -> None:
        """End the run when fewer engines than it needs are up and no more will come."""
        up = [e for e in self._engines.values() if e.state is not State.DEAD and e.health.up]
        if len(up) >= self._size.least:
            self._short_since = None
            return
        have = f"{len(up)} of at least {self._size.least} engines are up"
        if len(self._engines) < self._size.least:  # none is started any more
            reason = f"{len(self._failures)} failed within an hour, rollout.max_restarts={self._size.max_restarts}"
            if self._size.max_restarts is None:
                reason = "none is replaced where rollout.weight_transfer is not memory"
            self._give_up(f"{have}, {reason}; the last that was lost: {self._last_failure}")
            return
        if self._short_since is None:
            self._short_since = self._now
        before, short = self._now - LOOK_S - self._short_since, self._now - self._short_since
        role, limit = self._blueprint.role, max(self._size.wait_s, PLACE_S)
        missing = f"{have}; one needs {role.cpus:g} CPU and {role.gpus:g} GPU"
        if short > limit:
            self._give_up(f"{missing}, and none found a place within {limit:g} s")
        elif before < PATIENCE_S <= short:
            self._say(f"waiting for engines: {missing}")

    def _give_up(self, text: str) -> None:
        if self._end is None:
            self._say(f"the run ends: {text}")
            self._fail(FleetExhausted(f"rollout: {text}. The last checkpoint is intact: the same command continues"))

    def _fail(self, error: Exception) -> None:
        """Whoever waits gets the error, now and later."""
        self._end = self._end or error
        self._changed()

    # Small things.

    def _in(self, *states: State) -> list[Engine]:
        """In their order."""
        return [engine for _, engine in sorted(self._engines.items()) if engine.state in states]

    def _up(self) -> list[Engine]:
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
        event, self._event = self._event, asyncio.Event()
        event.set()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while self._end is None and not condition():
            await self._event.wait()
        if self._end is not None:
            raise self._end
