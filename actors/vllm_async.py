"""vLLM's AsyncLLM: the engine for GPUs, in processes of its own; tensor and pipeline parallel by vLLM's own settings.

New weights go to the workers through memory that they share with this process, of which each loads its part: one copy
out, one in, and the same way for every number of workers.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import pickle
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch

from actors.counters import count
from actors.memory import Memory
from actors.publishing import Seat
from actors.vllm_engine import EXIT_CODE, EXIT_GRACE_S, FIXED_ARGS, ResultT, VllmEngine, stopped
from actors.vllm_reload import retie
from actors.weight_group import WeightGroup
from actors.weights import pack, unpack


class WorkerExtension:
    """What vLLM's workers can do besides, by ``collective_rpc``."""

    model_runner: Any
    reload_weights: Callable[..., Any]
    rank: int
    device: torch.device

    def load_published(self, message: bytes) -> None:
        """Load the weights of a pickled `WeightBundle` without a buffer, the buffer's `Place` and its length."""
        bundle, place, nbytes = pickle.loads(message)
        bundle = dataclasses.replace(bundle, buffer=place.read(nbytes))
        self._load(unpack(bundle))

    def join(self, seat: tuple[Any, ...]) -> None:
        """Meet the learner; ``seat`` is the first worker's."""
        self._group = WeightGroup(Seat(*seat).moved(self.rank), self.device)

    def receive(self, message: bytes) -> None:
        """Load what the learner sends; the message is a pickled pair of expected shapes and optional names."""
        expected, optional = pickle.loads(message)
        self._load(self._group.receive(expected, optional))

    def _load(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.reload_weights(weights_iterator=named)
        retie(self.model_runner.get_model())


class AsyncEngine(VllmEngine):
    """For arguments and errors see `VllmEngine`. Make it where an event loop runs or will."""

    fixed_args: ClassVar[dict[str, Any]] = {**FIXED_ARGS, "worker_extension_cls": "actors.vllm_async.WorkerExtension"}

    def __init__(self, model_dir: str, *, stop_token_ids: list[int], overrides: dict[str, Any]) -> None:
        super().__init__(model_dir, stop_token_ids=stop_token_ids, overrides=overrides)
        self._ids = itertools.count()
        self._memory = Memory()

    def _import(self) -> None:
        from vllm.v1.engine import async_llm  # noqa: F401

    def _start(self, args: dict[str, Any]) -> Any:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**args))
        return self._llm.vllm_config

    async def _ask(
        self, prompts: list[Sequence[int]], params: list[Any], read: Callable[[Any], ResultT]
    ) -> list[ResultT]:
        calls = [self._one(prompt, param, read) for prompt, param in zip(prompts, params, strict=True)]
        tasks = [asyncio.create_task(call) for call in calls]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # AsyncLLM gives up a request whose task is cancelled
                task.cancel()

    async def _one(self, prompt: Sequence[int], params: Any, read: Callable[[Any], ResultT]) -> ResultT:
        from vllm.v1.engine.exceptions import EngineDeadError

        said: Any = self._prompt(prompt)
        try:
            (output,) = [found async for found in self._llm.generate(said, params, str(next(self._ids)))]
        except EngineDeadError as error:
            raise _end_process(error) from error
        count("responses")
        return read(output)

    async def _replace(
        self, named: Iterable[tuple[str, torch.Tensor]], *, version: int, keep_cache: bool
    ) -> None:
        bundle = await asyncio.to_thread(pack, named, version=version, memory=self._memory)
        header = dataclasses.replace(bundle, buffer=bundle.buffer[:0])
        message = pickle.dumps((header, self._memory.place(), bundle.buffer.nbytes))
        await self._change("load_published", message, version=version, keep_cache=keep_cache)

    async def join(self, seat: Seat) -> None:
        await self._llm.collective_rpc("join", args=(tuple(seat),))

    async def receive(self, *, version: int, keep_cache: bool = False) -> int:
        message = pickle.dumps((self._shapes, self._optional))
        await self._change("receive", message, version=version, keep_cache=keep_cache)
        return version

    async def _change(self, method: str, message: bytes, *, version: int, keep_cache: bool) -> None:
        """Let every worker run the method of `WorkerExtension` between two steps."""
        try:
            if self.asleep:  # paused, its cache dropped
                await self._llm.wake_up(["weights"])
            else:
                await self._llm.pause_generation(mode="keep", clear_cache=not keep_cache)
            await self._llm.collective_rpc(method, args=(message,))
            self.version = version
            await self._llm.update_weight_version(str(version))
            if self.asleep:
                await self._llm.wake_up(["kv_cache"])
                self.asleep = self._empty = False
            else:
                await self._llm.resume_generation()
            count("weights")
        except Exception as error:  # the workers may have loaded a part
            raise _end_process(error) from error

    async def _sleep(self, level: int) -> None:
        await self._llm.sleep(level)

    async def _wake(self) -> None:
        await self._llm.wake_up()

    async def shutdown(self) -> None:
        self._llm.shutdown()


def _end_process(error: Exception) -> RuntimeError:
    """What to tell the caller; the process exits when it has been told."""
    threading.Timer(EXIT_GRACE_S, os._exit, (EXIT_CODE,)).start()
    return stopped(error)
