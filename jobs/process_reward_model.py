"""Process reward model: the SFT model with a scalar head that says, at the end of each step, how likely it is right.

Lightman et al. 2023, https://arxiv.org/abs/2305.20050; Uesato et al. 2022, https://arxiv.org/abs/2211.14275.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn.functional import binary_cross_entropy_with_logits

from actors.trainer import TrainTask
from jobs.training import placement, train
from rayllm.config.base import Loaded
from rayllm.config.process_reward_model import ProcessRewardModelConfig
from rayllm.data.batching import BatchOrder
from rayllm.data.padding import pad_right
from rayllm.data.sources import check_sources
from rayllm.data.steps import LabelledSteps, read_steps
from rayllm.errors import InputError
from rayllm.models.engine import Engine
from rayllm.models.folders import check_model_dir, load_tokenizer
from rayllm.models.heads import ScalarModel
from rayllm.models.loading import save_model
from rayllm.models.partial import plan_trained
from rayllm.report.run import Run
from rayllm.report.terminal import mark_example, print_preamble


@dataclass(frozen=True)
class MicroBatch:
    """Some responses; S steps in all."""

    tokens: torch.Tensor  # (B, T) int64
    attention_mask: torch.Tensor  # (B, T) bool
    rows: torch.Tensor  # (S,) int64: the response of each step
    ends: torch.Tensor  # (S,) int64: its last token
    labels: torch.Tensor  # (S,) float32: 1 right, 0 wrong
    normalizer: float
    """Steps in the whole batch, over all ranks."""


@dataclass
class ProcessRewardModelTask(TrainTask):
    """The loss is the mean binary cross-entropy over the batch's steps."""

    config: ProcessRewardModelConfig
    train: list[LabelledSteps]
    heldout: list[LabelledSteps]
    pad_token_id: int
    num_steps: int

    def build(self) -> torch.nn.Module:
        return ScalarModel.from_folder(self.config.model, seed=self.config.seed)

    def micro_batches(self, step: int, rank: int, world_size: int) -> Sequence[MicroBatch]:
        rows = [self.train[row] for row in self._order.rows(step)]
        count = float(sum(len(row.labels) for row in rows))
        mine, size = rows[rank::world_size], self.config.micro_batch_size
        return [self._collate(mine[i : i + size], count) for i in range(0, len(mine), size)]

    def loss(self, engine: Engine, micro_batch: MicroBatch) -> torch.Tensor:
        logits = self._logits(engine, micro_batch)
        labels = micro_batch.labels.to(logits.device)
        return binary_cross_entropy_with_logits(logits, labels, reduction="sum") / micro_batch.normalizer

    def num_tokens(self, micro_batch: MicroBatch) -> int:
        return int(micro_batch.attention_mask.sum())

    def evaluate(self, engine: Engine) -> dict[str, float]:
        totals = torch.zeros(4, dtype=torch.float64)  # right, loss, labelled right, steps
        size = engine.world_size * self.config.micro_batch_size
        for start in range(0, len(self.heldout), size):
            mine = self.heldout[start : start + size][engine.rank :: engine.world_size]
            batch = self._collate(mine or self.heldout[:1], 1.0)
            logits, labels = self._logits(engine, batch).double().cpu(), batch.labels.double()
            if mine:
                loss = binary_cross_entropy_with_logits(logits, labels, reduction="sum")
                right = ((logits > 0) == (labels > 0)).sum()
                totals += torch.stack([right.double(), loss, labels.sum(), torch.tensor(float(len(labels)))])
        right, loss, positive, count = engine.sum_tensor(totals).tolist()
        return {"eval/accuracy": right / count, "eval/loss": loss / count, "eval/right_steps": positive / count}

    def save(self, module: Any, state_dict: Mapping[str, torch.Tensor], folder: Path) -> None:
        classifier = module.classifier
        weights = {name.removeprefix("classifier."): tensor for name, tensor in state_dict.items()}
        classifier.config.step_separator = self.config.separator  # read back by the source of rewards
        save_model(classifier, load_tokenizer(self.config.model), folder, state_dict=weights)

    @cached_property
    def _order(self) -> BatchOrder:
        return BatchOrder(len(self.train), self.config.batch_size, seed=self.config.seed)

    def _logits(self, engine: Engine, batch: MicroBatch) -> torch.Tensor:
        """(S,) float32 at the steps' ends."""
        mask = batch.attention_mask.to(engine.device)
        scores = engine(input_ids=batch.tokens.to(engine.device), attention_mask=mask)
        return scores[batch.rows.to(scores.device), batch.ends.to(scores.device)]

    def _collate(self, rows: Sequence[LabelledSteps], normalizer: float) -> MicroBatch:
        tokens, mask = pad_right([row.token_ids for row in rows], self.pad_token_id)
        return MicroBatch(
            tokens,
            mask,
            rows=torch.tensor([index for index, row in enumerate(rows) for _ in row.ends]),
            ends=torch.tensor([end for row in rows for end in row.ends]),
            labels=torch.tensor([float(label) for row in rows for label in row.labels]),
            normalizer=normalizer,
        )


def run(loaded: Loaded[ProcessRewardModelConfig], console: Console, *, verbose: bool = False) -> Run:
    """The `process-reward-model` job."""
    config = loaded.config
    check_model_dir(config.model, key="model")
    check_sources(config.steps, key="steps")
    check_sources(config.heldout_steps, key="heldout_steps")
    job = Run("process_reward_model", loaded)
    if job.done:
        return job
    with job:
        tokenizer = load_tokenizer(config.model)
        data = {}
        limits = {"max_length": config.max_length, "max_bad_rows": config.max_bad_rows}
        for key in ("steps", "heldout_steps"):
            found = read_steps(getattr(config, key), tokenizer, separator=config.separator, **limits)
            data[key] = found.rows
            figures = {"rows": len(found.rows), "steps": found.num_steps, "tokens": found.num_tokens}
            job.add_data(key, **found.origins.facts, **figures, dropped=found.dropped)
        rows, heldout = data["steps"], data["heldout_steps"]
        if len(rows) < config.batch_size or not heldout:
            raise InputError(
                f"steps: {len(rows)} usable rows, heldout_steps: {len(heldout)}; batch_size={config.batch_size} needs "
                f"at least {config.batch_size} and 1"
            )
        num_steps = max(1, int(len(rows) * config.num_epochs / config.batch_size))
        task = ProcessRewardModelTask(config, rows, heldout, int(tokenizer.pad_token_id), num_steps)
        first = rows[0]
        print_preamble(
            console,
            job,
            example=mark_example(tokenizer, first.token_ids, [i in first.ends for i in range(len(first.token_ids))]),
            placement=placement(config),
            trained={"model": plan_trained(config.model, config.learner, scalar=True)},
        )
        train(job, task, console, verbose=verbose)
    return job


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("process-reward-model")
