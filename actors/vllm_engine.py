"""vLLM's LLMEngine inside this process, stepped by one thread.

The thread owns the engine: other threads only queue commands (add requests, change the weights), which it runs
between two steps. Requests of concurrent callers therefore share the engine's batches, and a weight update is
never seen half done.

One failure mode: when the thread fails, every open call gets the cause and the process exits, for whoever started
it to start another. Only what is refused before it touches the engine raises to its caller alone.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import set_num_threads  # vLLM replaces the attribute by a function that does nothing

from actors.weights import check_shapes, safetensors_shapes

ResultT = TypeVar("ResultT")

EXIT_CODE = 17
EXIT_GRACE_S = 2.0
"""Between telling the callers and leaving the process, so that the cause reaches them."""

TIED_HEAD = "lm_head.weight"
"""May be missing or present in the weights of a model with tied embeddings: vLLM takes the embedding."""

FIXED_ARGS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "generation_config": "vllm",  # nothing in the model folder changes the sampling
    "logprobs_mode": "processed_logprobs",  # of softmax(logits / temperature); vLLM's default ignores temperature
    "distributed_executor_backend": "uni",
    "async_scheduling": False,  # no step is in flight while the weights change
    "disable_log_stats": True,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One response to sample."""

    token_ids: Sequence[int]
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """One response, stop token included."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    versions: tuple[int, ...]
    """Policy version of each token."""


@dataclass(slots=True)
class _Call:
    """Requests that are answered together. Only the stepping thread changes it."""

    prompts: list[Sequence[int]]
    params: list[Any]  # vLLM's SamplingParams, one a prompt
    read: Callable[[Any], Any]  # makes the answer from vLLM's RequestOutput
    future: Future = field(default_factory=Future)
    request_ids: list[str] = field(default_factory=list)  # in the engine
    answers: dict[int, Any] = field(default_factory=dict)  # by place in prompts


def default_engine_args(device: str) -> dict[str, Any]:
    """Our choice of vLLM's EngineArgs for "cpu" or "cuda". The "cuda" branch has not been run."""
    if device == "cuda":
        return {"dtype": "bfloat16"}
    return {
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 128 << 20,  # an explicit size also skips a warm-up pass
        "block_size": 32,  # vLLM's 128 shares no prefix of a short prompt
        # A prompt cut by the batch's token budget makes vLLM turn back the request's random generator, which
        # generators on CPU cannot do: the engine would stop.
        "enable_chunked_prefill": False,
    }


def this_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def set_environment() -> None:
    """Set, where unset, the variables that vLLM and its libraries read at import; call it before importing them.

    On CPU it also makes the calling thread obey OMP_NUM_THREADS, which torch may have been imported without. Every
    thread that uses the engine needs that: vLLM fails where it meets another number of threads than it planned for.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if this_device() == "cpu":
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # the sampler compiles even in eager mode: 10 s
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that spin on busy cores cost 5-25x
        set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


class VllmEngine:
    """Samples from one model; one worker, tensor parallelism is not supported.

    Args:
        model_dir: local Hugging Face folder with safetensors weights.
        stop_token_ids: tokens that end a response; without any, nothing but its length does.
        overrides: EngineArgs by vLLM's own names, over ``default_engine_args``.

    Raises:
        ValueError: an override of what this class relies on, or vLLM's own refusal.
    """

    def __init__(self, model_dir: str, *, stop_token_ids: list[int], overrides: dict[str, Any]) -> None:
        clash = sorted(set(overrides) & {*FIXED_ARGS, "model"})
        if clash:
            raise ValueError(f"engine.{clash[0]} cannot be set: the rollout engine relies on its own value")
        set_environment()
        started = time.perf_counter()
        from vllm import EngineArgs, SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.llm_engine import LLMEngine

        self.import_seconds = time.perf_counter() - started
        started = time.perf_counter()
        args = {**default_engine_args(this_device()), **overrides, **FIXED_ARGS}
        self._llm = LLMEngine.from_engine_args(EngineArgs(model=model_dir, **args))
        self._llm.set_weight_version("0")
        self.init_seconds = time.perf_counter() - started

        config = self._llm.model_config
        self.max_model_len: int = config.max_model_len
        self.vocab_size: int = config.get_vocab_size()
        self.block_size: int = self._llm.vllm_config.cache_config.block_size
        self.version = 0
        self._shapes = safetensors_shapes(model_dir)
        self._optional = {TIED_HEAD} if config.hf_text_config.tie_word_embeddings else set()
        self._sampling_params = SamplingParams
        self._sampling: dict[str, Any] = {
            "stop_token_ids": stop_token_ids,
            "ignore_eos": not stop_token_ids,  # and no min_tokens, which would change the log-probabilities
            "logprobs": 0,  # the sampled token's only
            "detokenize": False,
            "output_kind": RequestOutputKind.FINAL_ONLY,
        }
        self._commands: queue.SimpleQueue = queue.SimpleQueue()
        self._open: set[Future] = set()
        self._error: BaseException | None = None
        self._lock = threading.Lock()  # of _error and _open, against a command queued while the thread dies
        self._calls: dict[str, tuple[_Call, int]] = {}  # by request id: the call and the place in it
        self._count = 0
        self._thread = threading.Thread(target=self._run, name="vllm-steps", daemon=True)
        self._thread.start()

    async def generate(
        self, requests: list[Request], *, temperature: float, max_new_tokens: int
    ) -> list[Sampled]:
        """Sample one response per request, in their order. Requests must have no ``problem``.

        At temperature 0 seeds play no part, and the log-probabilities are those of temperature 1.
        """
        if not requests:
            return []
        params = [
            self._sampling_params(
                temperature=temperature, max_tokens=max_new_tokens, seed=request.seed, **self._sampling
            )
            for request in requests
        ]
        return await self._ask([request.token_ids for request in requests], params, _sampled)

    async def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Nats of every token after the first, given those before it, at temperature 1; nothing out of the cache.

        Raises:
            RuntimeError: the engine took some of it from its prefix cache all the same.
        """
        params = self._sampling_params(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, **{**self._sampling, "logprobs": None}
        )
        ((num_cached, logprobs),) = await self._ask([token_ids], [params], _prompt_logprobs)
        if num_cached:
            raise RuntimeError(f"{num_cached} of {len(token_ids)} tokens of the probe came out of the prefix cache")
        return logprobs

    async def _ask(
        self, prompts: list[Sequence[int]], params: list[Any], read: Callable[[Any], ResultT]
    ) -> list[ResultT]:
        call = _Call(prompts=prompts, params=params, read=read)
        try:
            return await self._submit(lambda: self._add(call), call.future)
        except asyncio.CancelledError:
            self._commands.put((lambda: self._abort(call, RuntimeError("cancelled")), Future()))
            raise

    def problem(self, token_ids: Sequence[int], *, max_new_tokens: int) -> str | None:
        """What keeps the engine from continuing these tokens, or None. vLLM would cut silently, or break."""
        if not token_ids:
            return "is empty"
        if len(token_ids) + max_new_tokens > self.max_model_len:
            return (
                f"does not fit: {len(token_ids)} tokens + max_new_tokens={max_new_tokens} "
                f"> max_model_len={self.max_model_len}"
            )
        unknown = [token for token in token_ids if not 0 <= token < self.vocab_size]
        return f"has token {unknown[0]}, outside the vocabulary of {self.vocab_size}" if unknown else None

    async def update(
        self,
        named: Iterable[tuple[str, torch.Tensor]],
        shapes: dict[str, tuple[int, ...]],
        *,
        version: int,
        keep_cache: bool = False,
    ) -> int:
        """Replace the weights between two steps; running requests go on under the new ones.

        Args:
            named: checkpoint names and tensors, of any floating dtype.
            shapes: what ``named`` will yield.
            version: number of policy updates in them.
            keep_cache: running requests keep the keys and values that the old weights computed. Without it they are
                computed again, and a token's distribution is exactly that of the weights that sampled it.

        Raises:
            RuntimeError: from ``check_shapes``; nothing has been touched then.
        """
        check_shapes(shapes, expected=self._shapes, optional=self._optional)
        future: Future = Future()
        return await self._submit(lambda: self._apply(future, named, version, keep_cache), future)

    async def shutdown(self) -> None:
        """Stop the thread and free the engine; open calls fail."""
        future: Future = Future()
        await self._submit(lambda: self._stop(future), future)
        await asyncio.to_thread(self._thread.join)

    def _submit(self, command: Callable[[], None], future: Future) -> asyncio.Future:
        """Queue a command for the thread; the command resolves the future, at once or later."""
        with self._lock:
            if self._error is not None:
                raise _stopped(self._error) from self._error
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

    def _add(self, call: _Call) -> None:
        try:
            for place, (token_ids, params) in enumerate(zip(call.prompts, call.params, strict=True)):
                self._count += 1
                request_id = str(self._count)
                # The salt keeps new requests from the cache of older weights, where that is kept for running ones.
                prompt: Any = {"prompt_token_ids": list(token_ids), "cache_salt": str(self.version)}
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
        if not keep_cache:
            self._llm.reset_prefix_cache(reset_running_requests=True)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named})
        self._llm.apply_model(retie)
        self._llm.set_weight_version(str(version))
        self.version = version
        future.set_result(version)

    def _stop(self, future: Future) -> None:
        self._fail(RuntimeError("it was shut down"), but=future)
        self._llm.engine_core.shutdown()
        future.set_result(None)

    def _fail(self, error: BaseException, *, but: Future | None = None) -> None:
        with self._lock:
            self._error = error
            unanswered = [future for future in self._open if future is not but]
        for future in unanswered:
            if future.running() or future.set_running_or_notify_cancel():
                future.set_exception(_stopped(error))


def retie(model: torch.nn.Module) -> None:
    """Pack a tied output head again from the embedding. On CPU only; elsewhere it finds nothing to do.

    On CPU vLLM packs each linear layer into a oneDNN handle. A reload rebuilds the handles of the layers that it
    loads, but a tied head loads nothing itself and would go on with the old weights.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)


def _sampled(output: Any) -> Sampled:
    (completion,) = output.outputs
    token_ids = tuple(completion.token_ids)
    return Sampled(
        token_ids=token_ids,
        logprobs=tuple(p[t].logprob for p, t in zip(completion.logprobs, token_ids, strict=True)),
        finish_reason=completion.finish_reason,
        versions=tuple(int(s.version) for s in completion.weight_versions for _ in range(s.start, s.end)),
    )


def _prompt_logprobs(output: Any) -> tuple[int, list[float]]:
    """Number of tokens that came out of the prefix cache, and the log-probabilities."""
    token_ids = output.prompt_token_ids[1:]
    logprobs = [p[t].logprob for p, t in zip(output.prompt_logprobs[1:], token_ids, strict=True)]
    return output.num_cached_tokens or 0, logprobs


def _stopped(error: BaseException) -> RuntimeError:
    return RuntimeError(f"the rollout engine stopped: {error!r}")
