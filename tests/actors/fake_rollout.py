"""The rollout engine's interface without a model: for tests of who samples what, and of what happens when an engine
dies, hangs or lies. It samples slowly, and what it samples depends on what a real one's does: seed, step, prompt, number
of the sample, weights."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import ray

from actors.counters import count
from actors.proof import Proof, Prover, Served
from actors.seeds import sample_seed
from rayllm.errors import EngineStopped


class Sample(NamedTuple):
    prompt_id: int
    token_ids: tuple[int, ...]
    version: int


class FakeRollout(Prover):
    """Keeps `RolloutActor`'s interface.

    Args:
        number: of the engine.
        folder: where it writes its pid, and looks for what to do wrong: a file `TROUBLE-NUMBER`.
        token_s: seconds that it takes over a token.
    """

    def __init__(self, number: int, folder: Path, token_s: float = 0.02) -> None:
        if (folder / "cannot-start").exists():
            raise ValueError("no such model")
        self.number, self.folder, self.token_s = number, folder, token_s
        self.weights: int | None = None
        self.settings: dict[str, Any] = {}
        self.syncs: list[tuple[int, str]] = []
        (folder / f"pid-{number}").write_text(str(os.getpid()))

    async def set_prompts(self, **settings: Any) -> None:
        self.settings = settings

    async def generate(
        self, prompts: list[tuple[int, list[int]]], *, num_samples: int, temperature: float, max_new_tokens: int, step: int
    ) -> list[Sample]:
        assert self.weights is not None and self.settings, "asked before it was set up and synced"
        (self.folder / f"generates-{self.number}").touch()
        samples = []
        for prompt_id, _ in prompts:
            for sample in range(num_samples):
                seed = sample_seed(0, step, prompt_id, sample, 0)
                tokens = []
                for place in range(max_new_tokens):
                    await self._token()
                    tokens.append((seed + 31 * place + 7 * self.weights) % 1000)
                samples.append(Sample(prompt_id, tuple(tokens), self.weights))
        return samples

    async def _token(self) -> None:
        try:
            await asyncio.sleep(self.token_s)
        except asyncio.CancelledError:
            (self.folder / f"gave-up-{self.number}").touch()
            raise
        if self._trouble("stops"):
            raise EngineStopped("the rollout engine stopped: broken on purpose")
        if self._trouble("exits"):
            os._exit(17)
        if self._trouble("blocks"):
            time.sleep(3600)  # the whole event loop; the thread that reports goes on
        while self._trouble("hangs"):  # answers everything else
            await asyncio.sleep(0.05)
        count("tokens")

    def _trouble(self, kind: str) -> bool:
        return (self.folder / f"{kind}-{self.number}").exists() or (self.folder / f"{kind}-all").exists()

    async def sync(self, weights: int, **settings: Any) -> int:
        while self._trouble("hangs-in-sync"):
            await asyncio.sleep(0.05)
        while self._trouble("slow-in-sync"):
            await asyncio.sleep(0.05)
            count("loading")
        if self._trouble("stops-in-sync"):
            raise EngineStopped("the rollout engine stopped: broken on purpose")
        if (self.folder / "writer-is-gone").exists():
            raise FileNotFoundError("no such process wrote weights")
        self.weights = weights
        (self.folder / f"synced-{self.number}").write_text(str(weights))
        return weights

    async def served(self) -> Served | None:
        while self._trouble("unproved"):  # slow, but not stuck
            await asyncio.sleep(0.05)
            count("proof")
        if self.weights is None:
            return None
        return Served(self.weights, [0.0] if self._trouble("lies") else [-1.0 * self.weights])

    async def ping(self) -> int:
        return self.number


def proof_of(version: int) -> Proof:
    """What an engine must say that serves these weights."""
    return Proof(version, [ray.put([-1.0 * version])], 0.01)


def expected(prompt_ids: list[int], *, num_samples: int, max_new_tokens: int, step: int, version: int) -> list[Sample]:
    """What any engine with these weights samples."""
    return [
        Sample(
            prompt_id,
            tuple(
                (sample_seed(0, step, prompt_id, sample, 0) + 31 * place + 7 * version) % 1000
                for place in range(max_new_tokens)
            ),
            version,
        )
        for prompt_id in prompt_ids
        for sample in range(num_samples)
    ]
