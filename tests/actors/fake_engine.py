"""A rollout engine without vLLM, for faults: the surface of ``VllmEngine``, so that the real ``RolloutActor`` runs over
it. It samples from a fixed distribution that depends on the weights, at once, and does what a test asks: dies, hangs, is
slow, gives NaN, keeps old weights, or claims another version."""

from __future__ import annotations

import asyncio
import math
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.publishing import Seat
from actors.rollout import RolloutActor
from actors.vllm_engine import Request, ResultT, Sampled, VllmEngine, stopped
from actors.weights import safetensors_shapes
from rayllm.models.folders import max_positions, vocabulary_size

MAX_TOKENS = 8


class FakeEngine(VllmEngine):
    """For arguments and errors see `VllmEngine`; ``overrides`` are kept and not read."""

    fixed_args: dict[str, Any] = {}

    def __init__(self, model_dir: str, *, stop_token_ids: list[int], overrides: dict[str, Any]) -> None:
        self.import_seconds = self.init_seconds = 0.001
        self.max_model_len, self.vocab_size = max_positions(Path(model_dir)), vocabulary_size(Path(model_dir))
        self.version = 0
        self.asleep = self._empty = False
        self.mood = "well"
        """`well`, `slow`, `hangs`, `nan`, `stale`: takes an update and does not use it."""

        self.updates: list[int] = []
        self._shapes = safetensors_shapes(model_dir)
        self._optional: set[str] = set()
        self._stops = stop_token_ids
        self._digest = 0.0
        self._dead: Exception | None = None

    async def generate(self, requests: list[Request], *, temperature: float, max_new_tokens: int) -> list[Sampled]:
        return await asyncio.gather(*(self._one(request, max_new_tokens) for request in requests))

    async def _one(self, request: Request, max_new_tokens: int) -> Sampled:
        await self._lives()
        rng = np.random.default_rng(request.seed)
        length = int(rng.integers(1, min(max_new_tokens, MAX_TOKENS) + 1))
        token_ids = rng.integers(self.vocab_size, size=length).tolist()
        ends = bool(self._stops) and length < max_new_tokens
        if ends:
            token_ids[-1] = self._stops[0]
        logprob = math.nan if self.mood == "nan" else -math.log(self.vocab_size)
        return Sampled(
            token_ids=tuple(token_ids),
            logprobs=(logprob,) * length,
            finish_reason="stop" if ends else "length",
            versions=(self.version,) * length,
        )

    async def _lives(self) -> None:
        if self._dead is not None:
            raise stopped(self._dead) from self._dead
        while self.mood == "hangs":
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5 if self.mood == "slow" else 0)

    async def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        await self._lives()
        return [-math.log(self.vocab_size) + self._digest] * (len(token_ids) - 1)

    async def _replace(
        self, named: Iterable[tuple[str, torch.Tensor]], *, version: int, keep_cache: bool
    ) -> None:
        digest = sum(float(tensor.float().abs().mean()) for _, tensor in named)
        if self.mood != "stale":
            self._digest = digest
        self.version = version
        self.updates.append(version)

    async def join(self, seat: Seat) -> None:
        raise NotImplementedError("weights come through memory")

    async def receive(self, *, version: int, keep_cache: bool = False) -> int:
        raise NotImplementedError("weights come through memory")

    async def _sleep(self, level: int) -> None:
        """It holds nothing."""

    async def _wake(self) -> None:
        """It holds nothing."""

    async def shutdown(self) -> None:
        self._dead = RuntimeError("it was shut down")

    # Never called: no vLLM behind it.

    def _import(self) -> None:
        raise NotImplementedError

    def _start(self, args: dict[str, Any]) -> Any:
        raise NotImplementedError

    async def _ask(
        self, prompts: list[Sequence[int]], params: list[Any], read: Callable[[Any], ResultT]
    ) -> list[ResultT]:
        raise NotImplementedError


class FakeEngineActor(RolloutActor):
    """The rollout actor over a `FakeEngine`."""

    make_engine = staticmethod(FakeEngine)  # type: ignore[assignment]
    _engine: FakeEngine

    async def feel(self, mood: str) -> None:
        """From now on the engine is in this mood; `dies` ends its process with SIGKILL."""
        if mood == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        self._engine.mood = mood
