"""The sources of rewards of an RL run: an actor group each, asked side by side, and what their scores come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import ray

from actors.group import Role, collect
from actors.placement import Placement
from actors.reward_source import SourceActor
from actors.watchman import WatchedGroup, Watching
from rayllm.algorithms.rewards import RunningMoments
from rayllm.config.ppo import PPOConfig
from rayllm.config.reward import RewardConfig, SourcesConfig
from rayllm.data.prompts import PromptData
from rayllm.data.scores import Mix, ShardStats
from rayllm.errors import RewardError

ShardScores = tuple[Any, ...]
"""References to one shard's ``Scores``, a source each."""


class RewardGroups:
    """All sources. Their scores stay in the object store; the driver holds references."""

    def __init__(self, config: RewardConfig, groups: Mapping[str, WatchedGroup[Any]]) -> None:
        self.config, self.groups = config, dict(groups)
        self.any = next(iter(self.groups.values()))
        """For what needs no source: its actors' loops are never blocked."""

    @staticmethod
    def needs(config: PPOConfig) -> list[Role]:
        """Resources, a role each: `reward` for one source, `reward.NAME` where they are several."""
        sources = {name: s for name, s in config.roles.items() if name.split(".")[0] == "reward"}
        return [Role(name, s.num_actors, s.cpus_per_actor, s.gpus_per_actor) for name, s in sources.items()]

    @classmethod
    def start(cls, config: PPOConfig, prompts: PromptData, placement: Placement, watching: Watching) -> RewardGroups:
        """Start all actors; they come up in parallel."""
        shared = {
            "tokenizer": str(config.model),
            "rows": ray.put(prompts.rows),
            "reward_models": [str(folder) for folder in config.reward_models],
        }
        groups: dict[str, WatchedGroup[Any]] = {}
        for role, (name, source) in zip(cls.needs(config), config.reward.by_name.items(), strict=True):
            arguments = {"name": name, "source": source, **shared}
            groups[name] = WatchedGroup(
                role,
                SourceActor,
                lambda rank, arguments=arguments: arguments,  # type: ignore[misc]
                placement.seats(role),
                watching=watching,
            )
        return cls(config.reward, groups)

    def score(self, shards: list[Any], rows: Any = None) -> list[ShardScores]:
        """Of every shard; ``rows`` (a reference) where its prompts are not the training ones."""
        given = {} if rows is None else {"rows": rows}
        by_source = [group.map(SourceActor.scores, shards, **given) for group in self.groups.values()]
        return list(zip(*by_source, strict=True))

    def stats(self, scores: list[ShardScores]) -> Any:
        """Reference to a list of what every shard's scores amount to."""
        return self.any.submit(SourceActor.stats, *(part for shard in scores for part in shard), rank=0)[0]

    def count_without_signal(self, shards: list[Any], scores: list[ShardScores]) -> list[int]:
        """Prompts of every shard whose responses no source tells apart."""
        counts = self.any.map(SourceActor.count_without_signal, shards, *zip(*scores, strict=True))
        return collect(counts, "reward")

    def replace_without_signal(
        self, shards: list[Any], spare: list[Any], scores: list[ShardScores], spare_scores: list[ShardScores]
    ) -> tuple[list[Any], list[ShardScores]]:
        """The shards, and their scores, with prompts that teach nothing replaced by those of ``spare`` that do."""
        columns = [shards, spare, *zip(*scores, strict=True), *zip(*spare_scores, strict=True)]
        filled = self.any.map(SourceActor.replace_without_signal, *columns)
        places = range(len(self.groups))
        by_source = [
            self.any.map(SourceActor.replaced_scores, [place] * len(shards), *columns) for place in places
        ]
        return filled, list(zip(*by_source, strict=True))


class RewardScales:
    """Mean and deviation of each source's scores over the run, and what a step's scores amount to."""

    def __init__(self, config: RewardConfig) -> None:
        self.sources = config.by_name
        self.moments = {name: RunningMoments() for name in self.sources}

    @property
    def needs_all(self) -> bool:
        """Whether a step goes on only when all its scores are there: a source is normalised by what it scored so far,
        or may drop responses."""
        return any(s.normalize == "running" or s.on_failure == "drop" for s in self.sources.values())

    def mix(self, *, running: bool = True) -> Mix:
        """How the scores count now; ``running=False``: on the sources' own scale, the same at every step."""
        scales = {
            name: (moments.mean, moments.std) if running and self.sources[name].normalize == "running" else (0.0, 1.0)
            for name, moments in self.moments.items()
        }
        return {name: (*scale, self.sources[name].weight) for name, scale in scales.items()}

    def add(self, step: list[ShardStats]) -> None:
        """All shards of a step."""
        for shard in step:
            for name, stats in shard.sources.items():
                self.moments[name] = self.moments[name].merge(stats.moments)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {name: astuple(moments) for name, moments in self.moments.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on after a checkpoint; a source that is new begins anew."""
        self.moments |= {name: RunningMoments(*values) for name, values in state.items() if name in self.sources}


def step_metrics(step: list[ShardStats]) -> dict[str, float]:
    """``reward/NAME/mean``, ``/std`` and ``/failures`` of each source, over a step's shards."""
    metrics: dict[str, float] = {}
    for name in step[0].sources:
        parts = [shard.sources[name] for shard in step]
        moments = RunningMoments()
        for part in parts:
            moments = moments.merge(part.moments)
        if moments.count:
            std = moments.std if moments.m2 > 0 else 0.0
            metrics |= {f"reward/{name}/mean": moments.mean, f"reward/{name}/std": std}
        metrics[f"reward/{name}/failures"] = float(sum(part.num_failures for part in parts))
    return metrics


def problems(step: list[ShardStats]) -> list[str]:
    """What went wrong with the sources in a step, each once."""
    return list(dict.fromkeys(s.problem for shard in step for s in shard.sources.values() if s.problem))


def check_failures(step: list[ShardStats], sources: Mapping[str, SourcesConfig]) -> None:
    """Raise RewardError when a source failed on more of a step than it may, or nothing of it is left to learn from."""
    total = sum(shard.num_responses for shard in step)
    for name, source in sources.items():
        failed = sum(shard.sources[name].num_failures for shard in step)
        if failed > source.max_failed * total:
            raise RewardError(
                f"reward source {name} failed on {failed} of the step's {total} responses, more than "
                f"max_failed={source.max_failed:g} of them: {'; '.join(problems(step))}"
            )
    if not any(shard.num_kept for shard in step):
        raise RewardError(f"no response of the step is left to learn from: {'; '.join(problems(step))}")
