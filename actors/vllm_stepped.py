"""vLLM's LLMEngine inside this process, stepped by one thread.

The thread owns the engine: other threads only queue commands (add requests, change the weights), which it runs
between two steps. Requests of concurrent callers therefore share the engine's batches, and a weight update is
never seen half done.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from actors.counters import count
from actors.publishing import Seat
from actors.vllm_engine import (
    EXIT_CODE,
    EXIT_GRACE_S,
    FIXED_ARGS,
    ResultT,
    VllmEngine,
    set_environment,
    stopped,
)
from actors.vllm_reload import Renewal, renewable, retie
from actors.weight_group import WeightGroup


@dataclass(slots=True)
class _Call:
    """Requests that are answered together. Only the stepping thread changes it."""

    prompts: list[Sequence[int]]
    params: list[Any]  # vLLM's SamplingParams, one a prompt
    read: Callable[[Any], Any]  # makes the answer from vLLM's RequestOutput
    future: Future = field(default_factory=Future)
    request_ids: list[str] = field(default_factory=list)  # in the engine
    answers: dict[int, Any] = field(default_factory=dict)  # by place in prompts


class SteppedEngine(VllmEngine):
    """One worker; tensor parallelism is not supported. For arguments and errors see `VllmEngine`."""

    fixed_args: ClassVar[dict[str, Any]] = {
        **FIXED_ARGS,
        "distributed_executor_backend": "uni",
        "async_scheduling": False,  # no step is in flight while the weights change
    }

    def __init__(self, model_dir: str, *, stop_token_ids: list[int], overrides: dict[str, Any]) -> None:
        super().__init__(model_dir, stop_token_ids=stop_token_ids, overrides=overrides)
        self._commands: queue.SimpleQueue = queue.SimpleQueue()
        self._open: set[Future] = set()
        self._error: BaseException | None = None
        self._lock = threading.Lock()  # of _error and _open, against a command queued while the thread dies
        self._calls: dict[str, tuple[_Call, int]] = {}  # by request id: the call and the place in it
        self._count = 0
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="vllm-packs", initializer=set_environment)
        self._thread = threading.Thread(target=self._run, name="vllm-steps", daemon=True)
        self._thread.start()

    def _import(self) -> None:
        from vllm.v1.engine import llm_engine  # noqa: F401

    def _start(self, args: dict[str, Any]) -> Any:
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self._llm = LLMEngine.from_engine_args(EngineArgs(**args))
        (self._renewal,) = self._llm.apply_model(lambda model: Renewal(model) if renewable(model) else None)
        return self._llm.vllm_config

    async def _ask(
        self, prompts: list[Sequence[int]], params: list[Any], read: Callable[[Any], ResultT]
    ) -> list[ResultT]:
        call = _Call(prompts=prompts, params=params, read=read)
        try:
            return await self._submit(lambda: self._add(call), call.future)
        except asyncio.CancelledError:
            self._commands.put((lambda: self._abort(call, RuntimeError("cancelled")), Future()))
            raise

    async def _replace(
        self, named: Iterable[tuple[str, torch.Tensor]], *, version: int, keep_cache: bool
    ) -> None:
        future: Future = Future()
        await self._submit(lambda: self._apply(future, named, version, keep_cache), future)

    async def join(self, seat: Seat) -> None:
        self._group = await asyncio.to_thread(WeightGroup, seat, torch.device("cpu"))

    async def receive(self, *, version: int, keep_cache: bool = False) -> int:
        await self._replace(self._group.receive(self._shapes, self._optional), version=version, keep_cache=keep_cache)
        return version

    async def _sleep(self, level: int) -> None:
        await self._between_steps(lambda: self._llm.sleep(level))

    async def _wake(self) -> None:
        await self._between_steps(lambda: self._llm.wake_up())

    async def _between_steps(self, call: Callable[[], Any]) -> None:
        future: Future = Future()
        await self._submit(lambda: future.set_result(call()), future)

    async def shutdown(self) -> None:
        """Stop the thread and free the engine; open calls fail."""
        future: Future = Future()
        await self._submit(lambda: self._stop(future), future)
        await asyncio.to_thread(self._thread.join)

    def _submit(self, command: Callable[[], None], future: Future) -> asyncio.Future:
        """Queue a command for the thread; the command resolves the future, at once or later."""
        with self._lock:
            if self._error is not None:
                raise stopped(self._error) from self._error
            self._open.add(future)
            future.add_done_callback(self._open.discard)
            self._commands.put((command, future))
        return asyncio.wrap_future(future)

    # What follows runs in the stepping thread.

    def _run(self) -> None:
        try:
            set_environment()
            while self._error is None:
                self._run_commands()
                if self._error is None and self._llm.has_unfinished_requests():
                    for output in self._llm.step():
                        self._deliver(output)
                    count("engine_steps")
        except BaseException as error:
            traceback.print_exc()
            self._fail(error)
            time.sleep(EXIT_GRACE_S)
            os._exit(EXIT_CODE)

    def _run_commands(self) -> None:
        """Run what is queued; wait for a command when there is nothing to step."""
        block = not self._llm.has_unfinished_requests()
        while self._error is None:
            try:
                command, future = self._commands.get(block=block)
            except queue.Empty:
                return
            block = False
            if future.set_running_or_notify_cancel():
                command()
                count("commands")

    def _add(self, call: _Call) -> None:
        try:
            for place, (token_ids, params) in enumerate(zip(call.prompts, call.params, strict=True)):
                self._count += 1
                request_id = str(self._count)
                prompt: Any = self._prompt(token_ids)
                self._llm.add_request(request_id, prompt, params)
                self._calls[request_id] = (call, place)
                call.request_ids.append(request_id)
        except ValueError as error:  # vLLM refuses a request
            self._abort(call, error)

    def _abort(self, call: _Call, error: Exception) -> None:
        self._llm.abort_request([r for r in call.request_ids if self._calls.pop(r, None)])
        if not call.future.done():
            call.future.set_exception(error)

    def _deliver(self, output: Any) -> None:
        call, place = self._calls.pop(output.request_id)
        call.answers[place] = call.read(output)
        if len(call.answers) == len(call.prompts):
            call.future.set_result([call.answers[place] for place in range(len(call.prompts))])

    def _apply(
        self, future: Future, named: Iterable[tuple[str, torch.Tensor]], version: int, keep_cache: bool
    ) -> None:
        if self.asleep:
            self._llm.wake_up(["weights"])
        elif not keep_cache:
            self._llm.reset_prefix_cache(reset_running_requests=True)
        if self._renewal is not None:
            self._renewal.load(named, self._helper)
        else:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named})
            self._llm.apply_model(retie)
        self._llm.set_weight_version(str(version))
        if self.asleep:
            self._llm.wake_up(["kv_cache"])
            self.asleep = self._empty = False
        self.version = version
        future.set_result(version)

    def _stop(self, future: Future) -> None:
        self._fail(RuntimeError("it was shut down"), but=future)
        self._llm.engine_core.shutdown()
        self._helper.shutdown()
        future.set_result(None)

    def _fail(self, error: BaseException, *, but: Future | None = None) -> None:
        with self._lock:
            self._error = error
            unanswered = [future for future in self._open if future is not but]
        for future in unanswered:
            if future.running() or future.set_running_or_notify_cancel():
                future.set_exception(stopped(error))
