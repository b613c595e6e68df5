"""Which engine samples what, and with which weights: one actor routes the work of a run to its engines.

Work comes in pieces and goes to the engine with the fewest tokens before it. When an engine is lost its unfinished
pieces go to the others; what a sample says depends on seeds and weights alone, so nothing else changes. An answer
passes through this process, unopened: it outlives the engine, and the node, that made it.

The engines are supervised (``supervisor.py``): one that is lost is replaced. Whoever starts later than the others is
set up like them, and makes the last sync, proved, before its first piece of work.
"""

from __future__ import annotations

import asyncio
import reprlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray

from actors.carried import Carried, Delivery
from actors.health import Deadlines, State
from actors.member import Call, Lost, Member
from actors.proof import Answer, Proof, Served
from actors.supervisor import Blueprint, Size, Supervisor

MAX_LOSSES = 3
"""Engines that may be lost with one piece of work under way: the next one would die of it too."""

DUE = 16
"""Syncs for which an answer may be on its way."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    number: int
    state: State
    pid: int | None
    node: str | None
    served: int
    """Pieces of work that it finished."""


class Sync(NamedTuple):
    """What every engine is to do with the newest weights, and to show then."""

    call: Call
    proof: Proof | None


class Engine(Member):
    """A member of the fleet with what it has to do."""

    noun = "engine"
    tokens = 0
    pieces = 0
    served = 0
    reading = False
    """New weights, from where the learner left them."""

    proved = False
    """It has made a sync, and proved that it serves what it was given."""

    due: tuple[Proof, ...] = ()
    """Of its newest syncs: an answer that is on its way tells of an older one."""

    async def check(self, served: Served | None) -> None:
        """Raise RuntimeError unless it serves the policy's weights, as far as there is a proof to be had."""
        if not self.due:
            return
        proofs = {proof.version: proof for proof in self.due}
        if served is None or served.version not in proofs:
            said = "nothing of its weights" if served is None else f"that it serves version {served.version}"
            raise RuntimeError(f"{self.name} says {said}, after the sync of version {self.due[-1].version}")
        await proofs[served.version].check(served, self.name)

    def leaves(self) -> str:
        return f"; {self.pieces} unfinished pieces of work go to the others" if self.pieces else ""


class FleetActor(Supervisor[Engine]):
    """The actor itself: one to a run, without a GPU, on the driver's node."""

    def __init__(self, blueprint: Blueprint, size: Size, deadlines: Deadlines) -> None:
        super().__init__(Engine, blueprint, size, deadlines)
        self._sync: Sync | None = None
        self._announced = asyncio.Event()
        """Set, and replaced, when there is another sync to make."""
        self._publishing = False
        self._syncs = 0
        """That are over, whatever came of them."""
        self._sync_failed: Exception | None = None
        """What kept an engine from making the newest sync; until `begin_again` it ends the run."""
        self._again = False
        self._served = False
        """Whether any engine ever did: before, one that cannot start is a mistake of whoever asked for it."""

    async def work(
        self,
        method: str,
        work: Sequence[Any],
        tokens: Sequence[int],
        join: Carried[Callable[[list[Any]], Any]] | None,
        arguments: Mapping[str, Any],
    ) -> Delivery[Any]:
        """What the method of some engine returns, or of several engines, joined where it arrives.

        Args:
            work: pieces; one that is a reference is waited for and goes on as a reference.
            tokens: what each costs.
            join: makes one of several answers.

        Raises:
            FleetExhausted: too few engines are left.
            RuntimeError: engine after engine was lost with a piece under way.
            Exception: whatever the method raised.
        """
        pieces = [self._piece(method, piece, cost, arguments) for piece, cost in zip(work, tokens, strict=True)]
        return Delivery(await asyncio.gather(*pieces), join)

    async def _piece(self, method: str, piece: Any, tokens: int, arguments: Mapping[str, Any]) -> Carried[Any]:
        if isinstance(piece, ray.ObjectRef):  # an engine that waits for it would look as if it hung
            await asyncio.to_thread(ray.wait, [piece], fetch_local=False)
        lost: list[str] = []
        while len(lost) < MAX_LOSSES:
            await self._unless_failed(lambda: any(e.state is State.READY for e in self._members.values()))
            engine = min(self._in(State.READY), key=lambda e: e.tokens)
            engine.tokens += tokens
            engine.pieces += 1
            try:
                answer: Answer = await engine.call(Call("answer", (method, piece, arguments)))
                await engine.check(answer.served)
                engine.served += 1
                return answer.value
            except Lost as error:
                lost.append(str(error))
            finally:
                engine.tokens -= tokens
                engine.pieces -= 1
        raise RuntimeError(f"{', '.join(lost)} were lost, one by one, with the same work: {reprlib.repr([piece])}")

    async def readers(self) -> list[str] | None:
        """Nodes whose engines will read the weights that are published next; None: any may. From now until they are
        announced by `sync` nobody begins to read, for what is read now changes."""
        self._publishing = True
        await self._unless_failed(lambda: not any(engine.reading for engine in self._members.values()))
        role, nodes = self._blueprint.role, await asyncio.to_thread(ray.nodes)
        if self._size.most > self._size.start or not all(node["Alive"] for node in nodes):
            return None  # others may come
        fits = [node for node in nodes if node["Alive"] and role.cpus <= node["Resources"].get("CPU", 0)]
        return sorted(node["NodeID"] for node in fits if role.gpus <= node["Resources"].get("GPU", 0))

    async def synced(self, count: int) -> None:
        """Until so many syncs are over; at once where the next one's engines are to prove it before: what they wait for
        to do so may wait for this."""
        if self._known():
            await self._when(lambda: self._syncs >= count)

    async def sync(self, call: Call, proof: Proof | None = None) -> int:
        """Let every engine make the call, and every later one before it serves; returns how many serve. Does not wait
        for an engine that makes no progress: it serves no more until it has made the call. References among the call's
        arguments are waited for first: while the weights are written nobody is to wait for them in an engine.

        Args:
            proof: that every engine gives before anything that it sampled under these weights is handed out; None asks
                for none.
        """
        try:
            return await self._make(call, proof)
        finally:
            self._syncs += 1
            self._changed()

    async def _make(self, call: Call, proof: Proof | None) -> int:
        args = [await value if isinstance(value, ray.ObjectRef) else value for value in call.args]
        call = call._replace(args=tuple(args))
        if not self._served:
            await self.started()
        self._sync, self._publishing = Sync(call, proof and proof.begun()), False
        serving = self._up()
        if self._known():
            serving = [engine for engine in self._in(State.READY, State.SUSPECT) if engine.proved]
        self._again = False
        for engine in self._members.values():
            engine.health.behind()
        announced, self._announced = self._announced, asyncio.Event()
        announced.set()

        def made() -> bool:  # asked after every engine: each is looked at once
            while serving and serving[-1].state is not State.SYNCING:
                serving.pop()
            return not serving

        await self._unless_failed(made)
        return len(self._in(State.READY))

    async def prove(self) -> None:
        """Until every engine that has served has proved what it serves now."""

        async def prove(engine: Engine) -> None:
            with suppress(Lost):
                await engine.check(await engine.call(Call("served")))

        await asyncio.gather(*[prove(engine) for engine in self._up() if engine.proved])

    async def begin_again(self) -> None:
        """Whoever writes the weights died, perhaps over the newest sync, and another one will write them. Until then no
        engine reads; what a sync came to is forgotten."""
        self._publishing, self._sync_failed, self._again = True, None, True

    async def each(self, method: str, rows: Sequence[tuple[Any, ...]], kwargs: Mapping[str, Any]) -> list[Any]:
        """A method of every engine that is up, in their order; of one that is lost meanwhile nothing."""
        if not self._served:
            await self.started()
        engines = self._up()
        given = rows or [()] * len(engines)
        calls = [engine.call(Call(method, row, kwargs)) for engine, row in zip(engines, given, strict=True)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        kept = [answer for answer in answers if not isinstance(answer, Lost)]
        for answer in kept:
            if isinstance(answer, BaseException):
                raise answer
        return kept

    async def status(self) -> list[EngineStatus]:
        """Of all engines that are not buried yet."""
        found = []
        for engine in self._members.values():
            pid, node = (engine.report.pid, engine.report.node) if engine.report else (None, None)
            found.append(EngineStatus(engine.number, engine.state, pid, node, engine.served))
        return found

    async def _keep(self, engine: Engine) -> None:
        """Set an engine up and keep it in step with the learner, as long as it lives."""
        done: Sync | None = None
        try:
            for call in (Call("__ray_ready__"), *self._blueprint.setup):
                await engine.call(call)
            engine.health.started()
            self._changed()
            while True:
                while self._publishing or self._sync is done:
                    await self._announced.wait()
                try:
                    done = await self._synced(engine) or done
                finally:
                    self._changed()
        except Lost:
            if engine.could_not_start and not self._served:
                raise RuntimeError(f"an engine could not start: {engine.could_not_start}") from None

    async def _synced(self, engine: Engine) -> Sync | None:
        """The sync that the engine has made, or that failed; None if it must be made again, for what it read was being
        replaced."""
        sync = self._sync
        assert sync is not None
        engine.reading = True
        try:
            engine.due = (*engine.due[1 - DUE :], sync.proof) if sync.proof else ()
            await engine.call(sync.call)
            if not engine.proved:  # the others prove it with what they sample
                await engine.check(await engine.call(Call("served")))
        except Lost:
            raise
        except Exception as error:
            if self._is_newest(sync):
                self._sync_failed = self._sync_failed or error
                return sync
        finally:
            engine.reading = False
        if not self._is_newest(sync):
            return None
        if not engine.proved and engine.number >= self._size.start:
            self._say(f"engine {engine.number} serves: it has the policy's weights, proved")
        engine.proved = True
        engine.health.synced()
        self._served = True
        return sync

    async def _unless_failed(self, condition: Callable[[], bool]) -> None:
        await self._until(lambda: self._sync_failed is not None or condition())
        if self._sync_failed is not None:
            raise self._sync_failed

    def _known(self) -> bool:
        """Whether a sync waits for those that served, which prove it with what they sample, and for no other."""
        return self._served and not self._again

    def _is_newest(self, sync: Sync) -> bool:
        return self._sync is sync and not self._publishing
