"""What Ray takes by itself for the calls of a PPO step: the floor under `bench.overhead`.

Who calls whom, who waits for whom and how large the arrays are that go along is as in the loop with one rank of each
learner. The actors are plain ones that hand out zeros: none of rayllm's code runs.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray


@dataclass(frozen=True)
class Sizes:
    """Bytes."""

    answer: int
    """Of an engine."""

    scores: int
    """Of a shard: a figure for each response."""

    column: int
    """What a model makes of the shard: a figure for each token."""

    experience: int
    """The shard with all of them."""


class Engine:
    async def sync(self, weights: str) -> int:
        return 0

    async def answer(self, nbytes: int) -> Any:
        return np.zeros(nbytes, np.uint8)


class Fleet:
    """Between the driver and the engines."""

    def __init__(self, engines: list[Any]) -> None:
        self._engines = engines
        self._synced = asyncio.Event()

    async def readers(self) -> None:
        return None

    async def sync(self, weights: str) -> int:
        await asyncio.gather(*[engine.sync.remote(weights) for engine in self._engines])
        self._synced.set()
        return len(self._engines)

    async def synced(self) -> None:
        await self._synced.wait()
        self._synced.clear()

    async def work(self, shard: int, num_shards: int, nbytes: int) -> list[Any]:
        engines = self._engines[shard::num_shards] or self._engines
        return await asyncio.gather(*[engine.answer.remote(nbytes) for engine in engines])


class Model:
    """Policy, critic and reference."""

    def array(self, nbytes: int, *given: Any) -> Any:
        return np.zeros(nbytes, np.uint8)

    def figures(self, *given: Any) -> dict[str, float]:
        return {}


class Source:
    """Of rewards: it runs an event loop."""

    async def scores(self, nbytes: int, shard: Any) -> Any:
        return np.zeros(nbytes, np.uint8)

    async def stats(self, *scores: Any) -> dict[str, float]:
        return {}


class RayAlone:
    """The actors, and a step of the loop over them. ``calls`` counts the driver's."""

    def __init__(self, num_engines: int, *, cpus: float) -> None:
        def start(cls: type, *arguments: Any) -> Any:
            remote_cls: Any = ray.remote(cls)
            actor = remote_cls.options(num_cpus=cpus).remote(*arguments)
            self._actors.append(actor)
            return actor

        self.calls = 0
        self._actors: list[Any] = []
        self._fleet = start(Fleet, [start(Engine) for _ in range(num_engines)])
        self._policy, self._critic, self._reference = (start(Model) for _ in range(3))
        self._reward = start(Source)
        ray.get([actor.__ray_ready__.remote() for actor in self._actors])

    def step(self, num_shards: int, sizes: Sizes) -> None:
        """`jobs.ppo.train` and `Roles.sync_weights`, call by call."""
        every = range(num_shards)
        shards = [self._call(self._fleet.work, shard, num_shards, sizes.answer) for shard in every]
        scores = [self._call(self._reward.scores, sizes.scores, shard) for shard in shards]
        references = [self._call(self._reference.array, sizes.column, shard) for shard in shards]
        values = [self._call(self._critic.array, sizes.column, shard) for shard in shards]
        ray.wait(shards, num_returns=num_shards, fetch_local=False)
        stats = self._call(self._reward.stats, *scores)
        given = zip(shards, references, values, scores, strict=True)
        experience = [self._call(self._policy.array, sizes.experience, *row) for row in given]
        ray.wait(experience, num_returns=num_shards, fetch_local=False)
        ray.get([self._call(learner.figures, *experience) for learner in (self._policy, self._critic)])

        weights = self._call(self._policy.figures, self._call(self._fleet.readers))
        self._call(self._policy.figures, self._call(self._fleet.synced))
        synced = self._call(self._fleet.sync, weights)
        ray.get([weights, synced, stats])

    def stop(self) -> None:
        """End the processes."""
        for actor in self._actors:
            ray.kill(actor)

    def _call(self, method: Any, *arguments: Any) -> Any:
        self.calls += 1
        return method.remote(*arguments)
