"""What the sources of rewards gave to a shard's responses, and the one reward of each that comes of it.

Shapes: B responses. NaN marks a response that a source could not score and that its policy drops.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from rayllm.algorithms.advantages import has_signal
from rayllm.algorithms.rewards import RunningMoments, standardize
from rayllm.data.experience import Experience


@dataclass(frozen=True)
class Scores:
    """One source's, of one shard."""

    source: str
    sample_ids: tuple[str, ...]
    values: torch.Tensor
    """(B,) float32, before weight and normalisation; NaN: dropped."""

    num_failures: int = 0
    """Responses that could not be scored: dropped, or scored 0."""

    problem: str = ""
    """What happened to the last of them."""

    token_values: torch.Tensor | None = None
    """(B, T) float32 of a source that scores steps: at each step's last token, 0 elsewhere. ``values`` are the sums."""

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.sample_ids),):
            raise ValueError(f"{len(self.sample_ids)} sample ids, values have the shape {tuple(self.values.shape)}")


@dataclass(frozen=True, slots=True)
class SourceStats:
    """What a run logs about one source, of one shard."""

    moments: RunningMoments
    num_failures: int
    problem: str


@dataclass(frozen=True, slots=True)
class ShardStats:
    sources: dict[str, SourceStats]
    num_responses: int
    num_kept: int
    """Those that no source dropped."""


Mix = Mapping[str, tuple[float, float, float]]
"""Source -> (mean, deviation, weight): its score counts as weight * (score - mean) / deviation."""


def sample_ids_of(prompt_ids: torch.Tensor) -> tuple[str, ...]:
    """``17/0``, ``17/1``, ...: the prompt's id, and which response to it this is in the shard."""
    seen: Counter[int] = Counter()
    found = []
    for prompt_id in prompt_ids.tolist():
        found.append(f"{prompt_id}/{seen[prompt_id]}")
        seen[prompt_id] += 1
    return tuple(found)


def joined(scores: Sequence[Scores], sample_ids: tuple[str, ...]) -> torch.Tensor:
    """(B, S) values of all sources, by the order of ``sample_ids``, whatever the sources' own.

    Raises:
        RuntimeError: a source scored other responses than these.
    """
    columns = []
    for part in scores:
        if part.sample_ids == sample_ids:
            columns.append(part.values)
            continue
        place = {sample_id: row for row, sample_id in enumerate(part.sample_ids)}
        if place.keys() != set(sample_ids) or len(part.sample_ids) != len(sample_ids):
            raise RuntimeError(f"reward source {part.source} scored other responses than it was asked about")
        columns.append(part.values[torch.tensor([place[sample_id] for sample_id in sample_ids])])
    return torch.stack(columns, dim=1)


def mixed(shard: Experience, scores: Sequence[Scores], mix: Mix) -> torch.Tensor:
    """(B,) float32 rewards: the weighted sum of the normalised scores, and what the shard's turns earned; NaN where a
    source dropped the response."""
    values = joined(scores, sample_ids_of(shard.prompt_ids))
    total = torch.zeros(len(values))
    for part, column in zip(scores, values.unbind(1), strict=True):
        mean, std, weight = mix[part.source]
        total = total + weight * standardize(column, mean=mean, std=std)
    return total if shard.turn_rewards is None else total + shard.turn_rewards.sum(1)


def with_step_rewards(shard: Experience, scores: Sequence[Scores], mix: Mix) -> Experience:
    """The shard with what its steps earned among its turns' rewards: at the tokens that ended them. As it is where no
    source judges steps."""
    if all(part.token_values is None for part in scores):
        return shard
    total = torch.zeros(shard.sequences.shape) if shard.turn_rewards is None else shard.turn_rewards
    sample_ids = sample_ids_of(shard.prompt_ids)
    for part in scores:
        if part.token_values is not None:
            place = {sample_id: row for row, sample_id in enumerate(part.sample_ids)}
            rows = part.token_values[torch.tensor([place[sample_id] for sample_id in sample_ids])]
            total = total + mix[part.source][2] * rows
    return shard.replace(turn_rewards=total)


def stats(scores: Sequence[Scores]) -> ShardStats:
    """Moments of what each source scored, and what failed."""
    found = {}
    for part in scores:
        moments = RunningMoments().update(part.values[part.values.isfinite()])
        found[part.source] = SourceStats(moments, part.num_failures, part.problem)
    kept = joined(scores, scores[0].sample_ids).isfinite().all(1)
    return ShardStats(found, len(kept), int(kept.sum()))


def teaches(
    scores: Sequence[Scores], prompt_ids: torch.Tensor, turn_rewards: torch.Tensor | None = None
) -> torch.Tensor:
    """(B,) bool: some source, or the environment's turns (B, T), told two responses to this prompt apart.

    Dropped responses do not count; their prompt's others decide for them.
    """
    values = joined(scores, sample_ids_of(prompt_ids))
    if turn_rewards is not None:
        values = torch.cat([values, turn_rewards.sum(1, keepdim=True)], dim=1)
    kept = values.isfinite().all(1)
    found = torch.zeros(len(values), dtype=torch.bool)
    for column in values[kept].unbind(1):
        found[kept] |= has_signal(column, prompt_ids[kept])
    return torch.isin(prompt_ids, prompt_ids[found])
