"""Pretraining: next-token prediction on packed documents (Ray Train + DeepSpeed)."""

from __future__ import annotations

import math
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
from rayllm.algorithms.losses import language_model_loss
from rayllm.config.base import Loaded
from rayllm.config.pretrain import PretrainConfig
from rayllm.data.files import check_data_file
from rayllm.data.text import PackedRows, tokenize_documents
from rayllm.errors import InputError
from rayllm.models.engine import Engine
from rayllm.models.folders import check_tokenizer_dir, load_tokenizer
from rayllm.models.loading import create_causal_lm, save_model
from rayllm.report.run import Run
from rayllm.report.terminal import mark_example, print_preamble

EVAL_ROWS = 64
"""Held-out rows in one forward pass."""


@dataclass
class PretrainTask(TrainTask):
    """Rows of packed tokens; the loss is the mean over all predicted tokens of the global batch."""

    config: PretrainConfig
    tokens: Path
    heldout: Path
    heldout_bytes: int
    num_steps: int

    def build(self) -> torch.nn.Module:
        tokenizer = load_tokenizer(self.config.tokenizer)
        config = self.config
        return create_causal_lm(config.model.architecture, tokenizer, config.model.shape(), seed=config.seed)

    def micro_batches(self, step: int, rank: int, world_size: int) -> Sequence[torch.Tensor]:
        rows = torch.from_numpy(self._rows.batch(step)[rank::world_size])
        return rows.split(self.config.micro_batch_size)

    @cached_property
    def _rows(self) -> PackedRows:
        config = self.config
        tokens = np.load(self.tokens, mmap_mode="r")
        return PackedRows(tokens, config.sequence_length, config.batch_size, seed=config.seed)

    def loss(self, engine: Engine, micro_batch: torch.Tensor) -> torch.Tensor:
        rows = micro_batch.to(engine.device)
        predicted = self.config.batch_size * (self.config.sequence_length - 1)
        return language_model_loss(engine(input_ids=rows).logits, rows, normalizer=predicted)

    def num_tokens(self, micro_batch: torch.Tensor) -> int:
        return micro_batch.numel()

    def evaluate(self, engine: Engine) -> dict[str, float]:
        length = self.config.sequence_length
        tokens = np.load(self.heldout, mmap_mode="r")
        usable = len(tokens) // length * length
        rows = torch.from_numpy(tokens[:usable].astype(np.int64)).view(-1, length)
        nats = mean_nats(engine, rows)
        return {"eval/loss": nats, "eval/bits_per_byte": nats * len(tokens) / math.log(2) / self.heldout_bytes}

    def save(self, module: Any, state_dict: Mapping[str, torch.Tensor], folder: Path) -> None:
        save_model(module, load_tokenizer(self.config.tokenizer), folder, state_dict=state_dict)


def mean_nats(engine: Engine, rows: torch.Tensor) -> float:
    """Mean loss per predicted token over (R, T) rows, shared out over the ranks in equal numbers of passes."""
    ranks = engine.world_size
    total = torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(rows), EVAL_ROWS * ranks):
        part = rows[start : start + EVAL_ROWS * ranks][engine.rank :: ranks]
        weight = len(part)
        part = part if weight else rows[:1]  # an idle rank still takes part in the forward pass
        loss = language_model_loss(engine(input_ids=part.to(engine.device)).logits, part.to(engine.device))
        total += torch.tensor([loss.item() * weight, weight], dtype=torch.float64)
    loss_sum, count = engine.sum_tensor(total).tolist()
    return loss_sum / count


def run(loaded: Loaded[PretrainConfig], console: Console, *, verbose: bool = False) -> Run:
    """The `pretrain` job."""
    config = loaded.config
    check_data_file(config.documents, key="documents")
    check_data_file(config.heldout, key="heldout")
    check_tokenizer_dir(config.tokenizer, key="tokenizer")
    job = Run("pretrain", loaded)
    if job.done:
        return job
    with job:
        tokenizer = load_tokenizer(config.tokenizer)
        create_causal_lm(config.model.architecture, tokenizer, config.model.shape(), seed=0)  # fails here, not later
        task = prepare(job, config)
        tokens = np.load(task.tokens, mmap_mode="r")[:32].tolist()
        print_preamble(
            console, job, example=mark_example(tokenizer, tokens, [True] * len(tokens)), placement=placement(config)
        )
        train(job, task, console, verbose=verbose)
    return job


def prepare(job: Run, config: PretrainConfig) -> PretrainTask:
    """Encode both files once, in the run folder."""
    tokenizer = load_tokenizer(config.tokenizer)
    streams, paths = {}, {}
    for key in ("documents", "heldout"):
        stream = streams[key] = tokenize_documents(
            getattr(config, key), tokenizer, max_bad_rows=config.max_bad_rows
        )
        if len(stream.tokens) < config.sequence_length * (config.batch_size if key == "documents" else 1) * 2:
            raise InputError(f"{key}: {getattr(config, key)} has only {len(stream.tokens)} tokens")
        paths[key] = (job.dir / f"{key}.npy").absolute()
        stream.save(paths[key])
        counts = {"rows": stream.num_documents, "tokens": len(stream.tokens), "bytes": stream.num_bytes}
        job.add_data(key, **stream.facts, **counts, dropped={})
    return PretrainTask(
        config, paths["documents"], paths["heldout"], streams["heldout"].num_bytes, num_steps=config.num_steps
    )


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("pretrain")
