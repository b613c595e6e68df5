"""Supervised fine-tuning: the loss falls on what the assistant says, its end-of-turn token included."""

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
from rayllm.algorithms.logprobs import token_logprobs
from rayllm.config.base import Loaded
from rayllm.config.sft import SftConfig
from rayllm.data.batching import BatchOrder
from rayllm.data.chat import ChatExample, check_chat_template, read_conversations
from rayllm.data.files import check_data_file
from rayllm.data.padding import pad_right
from rayllm.data.sources import check_sources, kept, shown_paths
from rayllm.data.text import PackedRows, tokenize_documents
from rayllm.errors import InputError
from rayllm.models.engine import Engine
from rayllm.models.folders import check_model_dir, load_tokenizer
from rayllm.models.loading import load_causal_lm, save_model
from rayllm.models.partial import plan_trained
from rayllm.report.run import Run
from rayllm.report.terminal import mark_example, print_preamble


@dataclass(frozen=True)
class MicroBatch:
    """Rows for one forward pass and the weight of each token's loss in the step's loss."""

    tokens: torch.Tensor  # (B, T) int64
    attention_mask: torch.Tensor  # (B, T) bool
    weights: torch.Tensor  # (B, T) float32, 0 where no loss falls


@dataclass
class SftTask(TrainTask):
    """Rows of similar length share a batch; the loss is the mean over the answers' tokens of the global batch, plus
    the mean over the replayed text's tokens times its weight."""

    config: SftConfig
    train: list[ChatExample]
    heldout: list[ChatExample]
    replay_tokens: Path | None
    pad_token_id: int
    num_steps: int

    def build(self) -> torch.nn.Module:
        return load_causal_lm(self.config.model)

    def micro_batches(self, step: int, rank: int, world_size: int) -> Sequence[MicroBatch]:
        chosen = [self.train[row] for row in self._order.rows(step)]
        loss_tokens = sum(int(example.loss_mask[1:].sum()) for example in chosen)
        batches = self._split([(e.token_ids, e.loss_mask / loss_tokens) for e in chosen[rank::world_size]])
        if self._replay is not None:  # apart from the conversations, which would be padded to its length
            text = self._replay.batch(step)
            weight = self.config.replay.weight / (text.shape[0] * (text.shape[1] - 1))
            batches += self._split([(row, np.full(len(row), weight)) for row in text[rank::world_size]])
        return batches

    def loss(self, engine: Engine, micro_batch: MicroBatch) -> torch.Tensor:
        tokens = micro_batch.tokens.to(engine.device)
        logits = engine(input_ids=tokens, attention_mask=micro_batch.attention_mask.to(engine.device)).logits
        return -(token_logprobs(logits, tokens) * micro_batch.weights.to(engine.device)).sum()

    def num_tokens(self, micro_batch: MicroBatch) -> int:
        return int(micro_batch.attention_mask.sum())

    def evaluate(self, engine: Engine) -> dict[str, float]:
        size = self.config.micro_batch_size * engine.world_size
        total = torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(self.heldout), size):
            mine = self.heldout[start : start + size][engine.rank :: engine.world_size]
            rows = mine or self.heldout[:1]  # an idle rank still takes part in the forward pass
            loss = self.loss(engine, self._collate([(e.token_ids, e.loss_mask * 1.0) for e in rows])).item()
            if mine:
                total += torch.tensor([loss, sum(int(e.loss_mask[1:].sum()) for e in mine)], dtype=torch.float64)
        loss_sum, count = engine.sum_tensor(total).tolist()
        return {"eval/loss": loss_sum / count}

    def save(self, module: Any, state_dict: Mapping[str, torch.Tensor], folder: Path) -> None:
        save_model(module, load_tokenizer(self.config.model), folder, state_dict=state_dict)

    @cached_property
    def _order(self) -> BatchOrder:
        lengths = [len(example.token_ids) for example in self.train]
        return BatchOrder(len(self.train), self.config.batch_size, seed=self.config.seed, lengths=lengths)

    @cached_property
    def _replay(self) -> PackedRows | None:
        if self.replay_tokens is None:
            return None
        replay = self.config.replay
        tokens = np.load(self.replay_tokens, mmap_mode="r")
        return PackedRows(tokens, replay.sequence_length, replay.batch_size, seed=self.config.seed)

    def _split(self, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[MicroBatch]:
        size = self.config.micro_batch_size
        return [self._collate(rows[i : i + size]) for i in range(0, len(rows), size)]

    def _collate(self, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> MicroBatch:
        """Pad (token ids, loss weights) rows; a row's first token has no prediction and its weight no effect."""
        tokens, mask = pad_right([ids for ids, _ in rows], self.pad_token_id)
        weights = torch.zeros(tokens.shape)
        for row, (ids, row_weights) in enumerate(rows):
            weights[row, : len(ids)] = torch.from_numpy(row_weights)
        return MicroBatch(tokens, mask, weights)


def run(loaded: Loaded[SftConfig], console: Console, *, verbose: bool = False) -> Run:
    """The `sft` job."""
    config = loaded.config
    check_model_dir(config.model, key="model")
    check_sources(config.data, key="data")
    if config.replay.documents is not None:
        check_data_file(config.replay.documents, key="replay.documents")
    job = Run("sft", loaded)
    if job.done:
        return job
    with job:
        tokenizer = load_tokenizer(config.model)
        check_chat_template(tokenizer, config.model)
        task = prepare(job, config)
        shown = task.train[0]
        print_preamble(
            console,
            job,
            example=mark_example(tokenizer, shown.token_ids, shown.loss_mask),
            placement=placement(config),
            trained={"model": plan_trained(config.model, config.learner)},
        )
        train(job, task, console, verbose=verbose)
    return job


def prepare(job: Run, config: SftConfig) -> SftTask:
    """Read and encode the demonstrations; keep some prompts out for the held-out loss."""
    tokenizer = load_tokenizer(config.model)
    data = read_conversations(
        config.data, tokenizer, max_length=config.max_length, max_bad_rows=config.max_bad_rows
    )
    split = data.origins.split(config.heldout_fraction, seed=config.seed)
    train_rows, heldout = (kept(data.examples, rows) for rows in split)
    job.add_data(
        "data",
        **data.origins.facts,
        rows=len(data.examples),
        tokens=data.num_tokens,
        loss_tokens=data.num_loss_tokens,
        heldout_rows=len(heldout),
        dropped=data.dropped,
    )
    if len(train_rows) < config.batch_size or not heldout:
        raise InputError(
            f"data: {shown_paths(config.data)} leaves {len(train_rows)} rows to train on and {len(heldout)} held out; "
            f"batch_size={config.batch_size} needs at least {config.batch_size} and 1"
        )
    replay_path = None
    if config.replay.documents is not None:
        stream = tokenize_documents(config.replay.documents, tokenizer, max_bad_rows=config.max_bad_rows)
        replay_path = (job.dir / "replay.npy").absolute()
        stream.save(replay_path)
        counts = {"rows": stream.num_documents, "tokens": len(stream.tokens)}
        job.add_data("replay.documents", **stream.facts, **counts, dropped={})
    num_steps = max(1, int(len(train_rows) * config.num_epochs / config.batch_size))
    return SftTask(config, train_rows, heldout, replay_path, int(tokenizer.pad_token_id), num_steps)


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("sft")
