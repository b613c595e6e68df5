"""Reward model: the SFT model with a scalar head, taught by rankings (Bradley-Terry over all pairs of a prompt)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from actors.trainer import TrainTask
from jobs.training import placement, train
from rayllm.algorithms.ranking import kwise_loss
from rayllm.config.base import Loaded
from rayllm.config.reward_model import RewardModelConfig
from rayllm.data.batching import BatchOrder
from rayllm.data.padding import pad_right
from rayllm.data.preferences import Ranking, RankingData, read_rankings
from rayllm.data.sources import check_sources, kept
from rayllm.errors import InputError
from rayllm.models.engine import Engine
from rayllm.models.heads import ScalarModel, sequence_rewards
from rayllm.models.loading import check_model_dir, load_tokenizer, save_model
from rayllm.models.partial import plan_trained
from rayllm.report.run import Run
from rayllm.report.terminal import mark_example, print_preamble


@dataclass(frozen=True)
class MicroBatch:
    """All responses of some prompts, and the share of these prompts in the step's batch."""

    tokens: torch.Tensor  # (B, T) int64
    attention_mask: torch.Tensor  # (B, T) bool
    ranks: torch.Tensor  # (B,) int64
    prompt_ids: torch.Tensor  # (B,) int64
    weight: float


@dataclass
class RewardModelTask(TrainTask):
    """The loss is the mean over prompts of the mean over a prompt's pairs."""

    config: RewardModelConfig
    train: list[Ranking]
    heldout: list[Ranking]
    pad_token_id: int
    num_steps: int
    statistics: dict[str, float] = field(default_factory=dict)

    def build(self) -> torch.nn.Module:
        return ScalarModel.from_folder(self.config.model, seed=self.config.seed)

    def micro_batches(self, step: int, rank: int, world_size: int) -> Sequence[MicroBatch]:
        rows = [self.train[row] for row in self._order.rows(step)][rank::world_size]
        most = max(len(ranking.ranks) for ranking in self.train)
        size = max(1, self.config.micro_batch_size // most)
        return [self._collate(rows[i : i + size]) for i in range(0, len(rows), size)]

    def loss(self, engine: Engine, micro_batch: MicroBatch) -> torch.Tensor:
        rewards = self._rewards(engine, micro_batch)
        ranks, prompt_ids = micro_batch.ranks.to(rewards.device), micro_batch.prompt_ids.to(rewards.device)
        pairs = kwise_loss(rewards, ranks, prompt_ids, kind="all_pairs")
        return micro_batch.weight * (pairs + self.config.center_coef * rewards.square().mean())

    def num_tokens(self, micro_batch: MicroBatch) -> int:
        return int(micro_batch.attention_mask.sum())

    def evaluate(self, engine: Engine) -> dict[str, float]:
        totals = torch.zeros(6, dtype=torch.float64)  # right, pairs, margin, rewards, squares, responses
        for start in range(0, len(self.heldout), engine.world_size * self._eval_prompts):
            rows = self.heldout[start : start + engine.world_size * self._eval_prompts]
            mine = rows[engine.rank :: engine.world_size]
            rewards = self._rewards(engine, self._collate(mine or self.heldout[:1])).double().cpu()
            if mine:
                totals += _pair_totals(rewards, mine)
        right, pairs, margin, reward_sum, square_sum, count = engine.sum_tensor(totals).tolist()
        mean = reward_sum / count
        std = max(square_sum / count - mean * mean, 1e-12) ** 0.5
        self.statistics = {"reward_mean": mean, "reward_std": std}
        return {
            "eval/accuracy": right / pairs,
            "eval/margin": margin / pairs,
            "eval/reward_mean": mean,
            "eval/reward_std": std,
        }

    def save(self, module: Any, state_dict: Mapping[str, torch.Tensor], folder: Path) -> None:
        classifier = module.classifier
        weights = {name.removeprefix("classifier."): tensor for name, tensor in state_dict.items()}
        for name, value in self.statistics.items():  # read back by the reward actor, kept by transformers
            setattr(classifier.config, name, value)
        save_model(classifier, load_tokenizer(self.config.model), folder, state_dict=weights)

    @property
    def _eval_prompts(self) -> int:
        most = max(len(ranking.ranks) for ranking in self.heldout)
        return max(1, self.config.micro_batch_size // most)

    @cached_property
    def _order(self) -> BatchOrder:
        return BatchOrder(len(self.train), self.config.batch_size, seed=self.config.seed)

    def _rewards(self, engine: Engine, batch: MicroBatch) -> torch.Tensor:
        mask = batch.attention_mask.to(engine.device)
        return sequence_rewards(engine(input_ids=batch.tokens.to(engine.device), attention_mask=mask), mask)

    def _collate(self, rankings: Sequence[Ranking]) -> MicroBatch:
        tokens, mask = pad_right([s for ranking in rankings for s in ranking.sequences], self.pad_token_id)
        return MicroBatch(
            tokens,
            mask,
            ranks=torch.tensor([rank for ranking in rankings for rank in ranking.ranks]),
            prompt_ids=torch.tensor([i for i, ranking in enumerate(rankings) for _ in ranking.ranks]),
            weight=len(rankings) / self.config.batch_size,
        )


def _pair_totals(rewards: torch.Tensor, rankings: Sequence[Ranking]) -> torch.Tensor:
    right = pairs = margin = 0.0
    start = 0
    for ranking in rankings:
        scores = rewards[start : start + len(ranking.ranks)].tolist()
        start += len(scores)
        for better, better_rank in enumerate(ranking.ranks):
            for worse, worse_rank in enumerate(ranking.ranks):
                if better_rank < worse_rank:
                    gap = scores[better] - scores[worse]
                    right, pairs, margin = right + (gap > 0), pairs + 1, margin + gap
    moments = [float(rewards.sum()), float(rewards.square().sum()), float(len(rewards))]
    return torch.tensor([right, pairs, margin, *moments], dtype=torch.float64)


def run(loaded: Loaded[RewardModelConfig], console: Console, *, verbose: bool = False) -> Run:
    """The `reward-model` job."""
    config = loaded.config
    check_model_dir(config.model, key="model")
    check_sources(config.rankings, key="rankings")
    if config.heldout_rankings is not None:
        check_sources(config.heldout_rankings, key="heldout_rankings")
    job = Run("reward_model", loaded)
    if job.done:
        return job
    with job:
        tokenizer = load_tokenizer(config.model)
        rankings, heldout = read_data(job, config, tokenizer)
        if len(rankings) < config.batch_size or not heldout:
            raise InputError(
                f"rankings: {len(rankings)} prompts with a pair to train on, {len(heldout)} held out; "
                f"batch_size={config.batch_size} needs at least {config.batch_size} and 1"
            )
        num_steps = max(1, int(len(rankings) * config.num_epochs / config.batch_size))
        task = RewardModelTask(config, rankings, heldout, int(tokenizer.pad_token_id), num_steps)
        best = rankings[0].sequences[rankings[0].ranks.index(min(rankings[0].ranks))]
        scored = [index == len(best) - 1 for index in range(len(best))]
        print_preamble(
            console,
            job,
            example=mark_example(tokenizer, best, scored),
            placement=placement(config),
            trained={"model": plan_trained(config.model, config.learner, scalar=True)},
        )
        train(job, task, console, verbose=verbose)
    return job


def read_data(job: Run, config: RewardModelConfig, tokenizer: Any) -> tuple[list[Ranking], list[Ranking]]:
    """(rankings to train on, held-out ones), no prompt in both."""
    limits = {"max_length": config.max_length, "max_bad_rows": config.max_bad_rows}
    data = read_rankings(config.rankings, tokenizer, **limits)
    if config.heldout_rankings is None:
        train_rows, heldout_rows = data.origins.split(config.heldout_fraction, seed=config.seed)
        note_data(job, "rankings", data, heldout_rows=len(heldout_rows))
        return kept(data.rankings, train_rows), kept(data.rankings, heldout_rows)
    note_data(job, "rankings", data)
    heldout = read_rankings(config.heldout_rankings, tokenizer, **limits).apart_from(data)
    note_data(job, "heldout_rankings", heldout)
    rows = data.origins.mix(range(len(data.rankings)), seed=config.seed)
    return kept(data.rankings, rows), heldout.rankings


def note_data(job: Run, key: str, data: RankingData, **more: int) -> None:
    """Into the run record."""
    counts = {"rows": len(data.rankings), "pairs": data.num_pairs, "tokens": data.num_tokens, **more}
    job.add_data(key, **data.origins.facts, **counts, dropped=data.dropped)


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("reward-model")
