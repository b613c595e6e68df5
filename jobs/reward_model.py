"""Reward model: the SFT model with a scalar head, taught by rankings (Bradley-Terry or Plackett-Luce)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
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
from rayllm.lineage import write_json
from rayllm.models.engine import Engine
from rayllm.models.folders import check_model_dir, load_tokenizer
from rayllm.models.heads import ScalarModel, sequence_rewards
from rayllm.models.loading import save_model
from rayllm.models.partial import plan_trained
from rayllm.report.html import write_report
from rayllm.report.reward import REPORT, Scored, pair_accuracy, reward_report
from rayllm.report.run import Run
from rayllm.report.terminal import mark_example, print_preamble


@dataclass(frozen=True)
class MicroBatch:
    """All responses of some prompts (or pairs), and the share of these in the step's batch."""

    tokens: torch.Tensor  # (B, T) int64
    attention_mask: torch.Tensor  # (B, T) bool
    ranks: torch.Tensor  # (B,) int64
    prompt_ids: torch.Tensor  # (B,) int64
    scores: torch.Tensor  # (B,) float32, the labeler's; 0 where none were given
    weights: torch.Tensor  # (B, H) float32
    share: float


@dataclass(frozen=True)
class Example:
    """What makes one row of a batch: a ranking, or a pair of one."""

    ranking: Ranking
    weights: np.ndarray  # (H,) of the loss of each head


@dataclass
class RewardModelTask(TrainTask):
    """The loss is the mean over heads of the mean over rows of their weighted losses."""

    config: RewardModelConfig
    train: list[Example]
    heldout: list[Ranking]
    pad_token_id: int
    num_steps: int
    scored: Scored | None = None
    """Held-out scores of the last evaluation."""

    def build(self) -> torch.nn.Module:
        return ScalarModel.from_folder(
            self.config.model, seed=self.config.seed, num_heads=self.config.ensemble.num_heads
        )

    def micro_batches(self, step: int, rank: int, world_size: int) -> Sequence[MicroBatch]:
        rows = [self.train[row] for row in self._order.rows(step)][rank::world_size]
        size = self._rows_at_once([example.ranking for example in self.train])
        return [self._collate(rows[i : i + size]) for i in range(0, len(rows), size)]

    def loss(self, engine: Engine, micro_batch: MicroBatch) -> torch.Tensor:
        config = self.config
        rewards = self._rewards(engine, micro_batch)
        ranks, prompt_ids = micro_batch.ranks.to(rewards.device), micro_batch.prompt_ids.to(rewards.device)
        margins = micro_batch.scores.to(rewards.device) * config.margin_coef if config.margin_coef else None
        losses = [
            kwise_loss(
                head,
                ranks,
                prompt_ids,
                kind="plackett_luce" if config.loss == "plackett_luce" else "all_pairs",
                label_smoothing=config.label_smoothing,
                scores=margins,
                weights=weights,
            )
            for head, weights in zip(rewards.T, micro_batch.weights.to(rewards.device).T, strict=True)
        ]
        sizes = torch.bincount(prompt_ids)
        off_center = (rewards.square().mean(1) / sizes[prompt_ids]).sum() / len(sizes)
        return micro_batch.share * (torch.stack(losses).mean() + config.center_coef * off_center)

    def num_tokens(self, micro_batch: MicroBatch) -> int:
        return int(micro_batch.attention_mask.sum())

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """Every rank scores its part of the held-out responses; all get all the scores."""
        firsts = np.cumsum([0, *(len(ranking.ranks) for ranking in self.heldout)])
        scores = torch.zeros(int(firsts[-1]), self.config.ensemble.num_heads, dtype=torch.float64)
        size = self._rows_at_once(self.heldout)
        for start in range(0, len(self.heldout), engine.world_size * size):
            together = range(start, min(start + engine.world_size * size, len(self.heldout)))
            mine = together[engine.rank :: engine.world_size]
            rows = [Example(self.heldout[row], np.ones(1)) for row in mine or range(1)]  # idle ranks keep pace
            rewards = self._rewards(engine, self._collate(rows)).double().cpu()
            for row, part in zip(mine, rewards.split([len(example.ranking.ranks) for example in rows]), strict=False):
                scores[firsts[row] : firsts[row + 1]] = part
        self.scored = Scored(self.heldout, engine.sum_tensor(scores).numpy())
        accuracy, margin = pair_accuracy(self.scored)
        return {
            "eval/accuracy": accuracy,
            "eval/margin": margin,
            "eval/reward_mean": float(self.scored.mean.mean()),
            "eval/reward_std": float(self.scored.std.mean()),
        }

    def save(self, module: Any, state_dict: Mapping[str, torch.Tensor], folder: Path) -> None:
        assert self.scored is not None
        classifier, tokenizer = module.classifier, load_tokenizer(self.config.model)
        weights = {name.removeprefix("classifier."): tensor for name, tensor in state_dict.items()}
        for name, value in (("reward_mean", self.scored.mean), ("reward_std", self.scored.std)):
            # read back by the reward actor, kept by transformers
            setattr(classifier.config, name, value.tolist() if len(value) > 1 else float(value[0]))
        if tokenizer.pad_token_id == tokenizer.eos_token_id:
            classifier.config.pad_token_id = None  # or transformers would take an end of turn for padding
        save_model(classifier, tokenizer, folder, state_dict=weights)
        write_json(folder.parent / REPORT, reward_report(self.scored, tokenizer))

    def _rows_at_once(self, rankings: Sequence[Ranking]) -> int:
        return max(1, self.config.micro_batch_size // max(len(ranking.ranks) for ranking in rankings))

    @cached_property
    def _order(self) -> BatchOrder:
        return BatchOrder(len(self.train), self.config.batch_size, seed=self.config.seed)

    def _rewards(self, engine: Engine, batch: MicroBatch) -> torch.Tensor:
        """(B, H)"""
        mask = batch.attention_mask.to(engine.device)
        rewards = sequence_rewards(engine(input_ids=batch.tokens.to(engine.device), attention_mask=mask), mask)
        return rewards[:, None] if rewards.dim() == 1 else rewards

    def _collate(self, examples: Sequence[Example]) -> MicroBatch:
        rankings = [example.ranking for example in examples]
        tokens, mask = pad_right([s for ranking in rankings for s in ranking.sequences], self.pad_token_id)
        counts = [len(ranking.ranks) for ranking in rankings]
        weights = np.repeat(np.stack([example.weights for example in examples]), counts, axis=0)
        return MicroBatch(
            tokens,
            mask,
            ranks=torch.tensor([rank for ranking in rankings for rank in ranking.ranks]),
            prompt_ids=torch.tensor([i for i, count in enumerate(counts) for _ in range(count)]),
            scores=torch.tensor([s for ranking in rankings for s in ranking.scores or [0.0] * len(ranking.ranks)]),
            weights=torch.from_numpy(weights).float(),
            share=len(rankings) / self.config.batch_size,
        )


def make_examples(rankings: Sequence[Ranking], config: RewardModelConfig) -> list[Example]:
    """What is trained on: rankings, or their pairs, with their weights for every head.

    Weights are scaled to a mean of 1 over the rankings of each head.

    Raises:
        InputError: a weight for a labeler who is not there, or no ranking with a weight above 0.
    """
    labelers = {ranking.labeler for ranking in rankings}
    unknown = sorted(set(config.labeler_weights) - {str(name) for name in labelers})
    if unknown:
        known = ", ".join(sorted(map(repr, map(str, labelers))))
        raise InputError(f"labeler_weights: nobody called {unknown[0]!r} ranked; known: {known}")
    trust = np.array([config.labeler_weights.get(str(ranking.labeler), 1.0) for ranking in rankings])
    weights = trust[:, None] * bootstraps(len(rankings), config.ensemble.num_heads, seed=config.seed)
    if not weights.any(0).all():
        raise InputError("labeler_weights: no ranking is left with a weight above 0")
    weights = weights / weights.mean(0)
    examples = [Example(*row) for row in zip(rankings, weights, strict=True)]
    if config.loss != "pairwise":
        return examples
    return [Example(e.ranking.select(pair), e.weights) for e in examples for pair in e.ranking.pairs]


def bootstraps(num_rows: int, num_heads: int, *, seed: int) -> np.ndarray:
    """(num_rows, num_heads): how often each head's bootstrap holds a row; one head alone takes every row once."""
    if num_heads == 1:
        return np.ones((num_rows, 1))
    draws = [np.random.default_rng((seed, head)).integers(num_rows, size=num_rows) for head in range(num_heads)]
    return np.stack([np.bincount(drawn, minlength=num_rows) for drawn in draws], axis=1).astype(float)


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
        examples = make_examples(rankings, config) if rankings else []
        if len(examples) < config.batch_size or not heldout:
            rows = "pairs" if config.loss == "pairwise" else "prompts with a pair"
            raise InputError(
                f"rankings: {len(examples)} {rows} to train on, {len(heldout)} rankings held out; "
                f"batch_size={config.batch_size} needs at least {config.batch_size} and 1"
            )
        num_steps = max(1, int(len(examples) * config.num_epochs / config.batch_size))
        task = RewardModelTask(config, examples, heldout, int(tokenizer.pad_token_id), num_steps)
        best = rankings[0].sequences[rankings[0].ranks.index(min(rankings[0].ranks))]
        scored = [index == len(best) - 1 for index in range(len(best))]
        print_preamble(
            console,
            job,
            example=mark_example(tokenizer, best, scored),
            placement=placement(config),
            trained={
                "model": plan_trained(
                    config.model, config.learner, scalar=True, num_heads=config.ensemble.num_heads
                )
            },
        )
        train(job, task, console, verbose=verbose)
        write_report(config.run_dir)
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
