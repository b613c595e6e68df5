"""What the rollout actor asks of vLLM: token ids in, tokens with log-probabilities out, weights replaced under way.

Two engines serve behind one surface: on CPU one stepped by a thread of this process (``vllm_stepped.py``: half the
start-up time and memory), on GPU vLLM's AsyncLLM with processes of its own (``vllm_async.py``). Both have one failure
mode: when the engine fails, every open call gets the cause and the process exits, for whoever started it to start
another. Only what is refused before it touches the engine raises to its caller alone.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import set_num_threads  # vLLM replaces the attribute by a function that does nothing

from actors.publishing import Seat
from actors.weights import check_shapes, safetensors_shapes
from rayllm.errors import EngineStopped
from rayllm.startup import without_garbage_collection

ResultT = TypeVar("ResultT")

EXIT_CODE = 17
EXIT_GRACE_S = 2.0
"""Between telling the callers and leaving the process, so that the cause reaches them."""

UNCHANGED = "default"
"""VLLM's name for the version of the weights that an engine started with."""

TIED_HEAD = "lm_head.weight"
"""May be missing or present in the weights of a model with tied embeddings: vLLM takes the embedding."""

FIXED_ARGS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "generation_config": "vllm",  # nothing in the model folder changes the sampling
    "logprobs_mode": "processed_logprobs",  # of softmax(logits / temperature); vLLM's default ignores temperature
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


class VllmEngine(ABC):
    """Samples from one model.

    Args:
        model_dir: local Hugging Face folder with safetensors weights.
        stop_token_ids: tokens that end a response; without any, nothing but its length does.
        overrides: EngineArgs by vLLM's own names, over ``default_engine_args``.

    Raises:
        ValueError: an override of what this class relies on, or vLLM's own refusal.
    """

    fixed_args: ClassVar[dict[str, Any]]

    def __init__(self, model_dir: str, *, stop_token_ids: list[int], overrides: dict[str, Any]) -> None:
        clash = sorted(set(overrides) & {*self.fixed_args, "model"})
        if clash:
            raise ValueError(f"engine.{clash[0]} cannot be set: the rollout engine relies on its own value")
        set_environment()
        started = time.perf_counter()
        with without_garbage_collection():
            from vllm import SamplingParams
            from vllm.sampling_params import RequestOutputKind

            self._import()
        self.import_seconds = time.perf_counter() - started
        started = time.perf_counter()
        args = {**default_engine_args(this_device()), **overrides, **self.fixed_args}
        config = self._start({"model": model_dir, **args})
        self.init_seconds = time.perf_counter() - started

        self.max_model_len: int = config.model_config.max_model_len
        self.vocab_size: int = config.model_config.get_vocab_size()
        self.version = 0
        self.asleep = False
        self._empty = False  # asleep without weights
        self._num_calls = 0
        self._shapes = safetensors_shapes(model_dir)
        self._optional = {TIED_HEAD} if config.model_config.hf_text_config.tie_word_embeddings else set()
        self._sampling_params = SamplingParams
        self._sampling: dict[str, Any] = {
            "stop_token_ids": stop_token_ids,
            "ignore_eos": not stop_token_ids,  # and no min_tokens, which would change the log-probabilities
            "logprobs": 0,  # the sampled token's only
            "detokenize": False,
            "output_kind": RequestOutputKind.FINAL_ONLY,
        }

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
        return await self._answer([request.token_ids for request in requests], params, _sampled)

    async def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Nats of every token after the first, given those before it, at temperature 1; nothing out of the cache.

        Raises:
            RuntimeError: the engine took some of it from its prefix cache all the same.
        """
        params = self._sampling_params(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, **{**self._sampling, "logprobs": None}
        )
        ((num_cached, logprobs),) = await self._answer([token_ids], [params], _prompt_logprobs)
        if num_cached:
            raise RuntimeError(f"{num_cached} of {len(token_ids)} tokens of the probe came out of the prefix cache")
        return logprobs

    async def _answer(
        self, prompts: list[Sequence[int]], params: list[Any], read: Callable[[Any], ResultT]
    ) -> list[ResultT]:
        if self.asleep:
            raise RuntimeError("the rollout engine sleeps; new weights, or `wake`, come before new work")
        self._num_calls += 1
        try:
            return await self._ask(prompts, params, read)
        finally:
            self._num_calls -= 1

    async def sleep(self, *, keep_weights: bool = False) -> None:
        """Leave the GPU's memory to others, until new weights come or `wake` is called. On CPU vLLM frees nothing; the
        engine stops to serve all the same.

        Args:
            keep_weights: in the memory of the host. Without them only new ones wake the engine.

        Raises:
            RuntimeError: calls are under way; vLLM would end their responses where they are.
        """
        if self._num_calls:
            raise RuntimeError(f"the rollout engine cannot sleep: {self._num_calls} calls are under way")
        if not self.asleep:
            self.asleep, self._empty = True, not keep_weights
            await self._sleep(1 if keep_weights else 2)

    async def wake(self) -> None:
        """Serve again, with the weights of before.

        Raises:
            RuntimeError: they were not kept.
        """
        if self._empty:
            raise RuntimeError("the rollout engine sleeps without its weights: only new ones wake it")
        if self.asleep:
            await self._wake()
            self.asleep = False

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
        """Replace the weights between two steps; running requests go on under the new ones. A sleeping engine wakes.

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
        await self._replace(named, version=version, keep_cache=keep_cache)
        return version

    @abstractmethod
    async def join(self, seat: Seat) -> None:
        """Let the engine's workers meet the learner; ``seat`` is the first one's, the others' follow."""

    @abstractmethod
    async def receive(self, *, version: int, keep_cache: bool = False) -> int:
        """Like `update`, with what the learner sends to the group that was joined. A failure ends the process: a part
        may have been loaded."""

    def _prompt(self, token_ids: Sequence[int]) -> dict[str, Any]:
        """The salt keeps new requests from the cache of older weights, where that is kept for running ones."""
        return {"prompt_token_ids": list(token_ids), "cache_salt": str(self.version)}

    @abstractmethod
    def _import(self) -> None:
        """Import what `_start` needs."""

    @abstractmethod
    def _start(self, args: dict[str, Any]) -> Any:
        """Start the engine; returns vLLM's config."""

    @abstractmethod
    async def _ask(
        self, prompts: list[Sequence[int]], params: list[Any], read: Callable[[Any], ResultT]
    ) -> list[ResultT]:
        """What ``read`` makes of vLLM's RequestOutput for each prompt, in their order."""

    @abstractmethod
    async def _replace(
        self, named: Iterable[tuple[str, torch.Tensor]], *, version: int, keep_cache: bool
    ) -> None:
        """Replace the weights, which fit, and set ``self.version``; no step sees them half replaced. Of an engine that
        sleeps, wake the weights before and the rest after."""

    @abstractmethod
    async def _sleep(self, level: int) -> None:
        """As vLLM's own: level 1 keeps the weights in the memory of the host, 2 drops them."""

    @abstractmethod
    async def _wake(self) -> None:
        """After level 1."""

    @abstractmethod
    async def shutdown(self) -> None:
        """Free the engine; open calls fail."""


def make_engine(model_dir: str, *, stop_token_ids: list[int], overrides: dict[str, Any]) -> VllmEngine:
    """The engine for this device; arguments are those of `VllmEngine`."""
    if this_device() == "cuda":
        from actors.vllm_async import AsyncEngine

        return AsyncEngine(model_dir, stop_token_ids=stop_token_ids, overrides=overrides)
    from actors.vllm_stepped import SteppedEngine

    return SteppedEngine(model_dir, stop_token_ids=stop_token_ids, overrides=overrides)


def _version(name: str) -> int:
    return 0 if name == UNCHANGED else int(name)


def _sampled(output: Any) -> Sampled:
    (completion,) = output.outputs
    token_ids = tuple(completion.token_ids)
    return Sampled(
        token_ids=token_ids,
        logprobs=tuple(p[t].logprob for p, t in zip(completion.logprobs, token_ids, strict=True)),
        finish_reason=completion.finish_reason,
        versions=tuple(_version(s.version) for s in completion.weight_versions for _ in range(s.start, s.end)),
    )


def _prompt_logprobs(output: Any) -> tuple[int, list[float]]:
    """Number of tokens that came out of the prefix cache, and the log-probabilities."""
    token_ids = output.prompt_token_ids[1:]
    logprobs = [p[t].logprob for p, t in zip(output.prompt_logprobs[1:], token_ids, strict=True)]
    return output.num_cached_tokens or 0, logprobs


def stopped(error: BaseException) -> EngineStopped:
    return EngineStopped(f"the rollout engine stopped: {error!r}")
