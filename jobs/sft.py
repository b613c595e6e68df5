"""Supervised fine-tuning: the loss falls on what the assistant says, its end-of-turn token included."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from actors.trainer import TrainTask
from jobs.training import placement, train
from rayllm.algorithms.losses import language_model_loss
from rayllm.config.base import Loaded
from rayllm.config.sft import SftConfig
from rayllm.data.batching import BatchOrder
from rayllm.data.chat import ChatData, ChatExample, check_chat_template, read_conversations
from rayllm.data.files import check_data_file
from rayllm.data.padding import pad_right
from rayllm.data.text import PackedRows, tokenize_documents
from rayllm.errors import InputError
from rayllm.models.engine import Engine
from rayllm.models.loading import check_model_dir, load_causal_lm, load_tokenizer, save_model
from rayllm.report.run import Run
from rayllm.report.terminal import mark_example, print_preamble

IGNORED = -100


@dataclass(frozen=True)
class MicroBatch:
    """Rows for one forward pass and the weight of each of their loss tokens in the step's loss."""

    tokens: torch.Tensor  # (B, T) int64
    attention_mask: torch.Tensor  # (B, T) bool
    labels: torch.Tensor  # (B, T) int64, IGNORED where no loss falls
    normalizer: float


@dataclass
class SftTask(TrainTask):
    """Rows of similar length share a batch; the loss is the mean over the answers' tokens of the global batch."""

    config: SftConfig
    train: list[ChatExample]
    heldout: list[ChatExample]
    replay_tokens: Path | None
    pad_token_id: int
    num_steps: int

    def build(self) -> torch.nn.Module:
        return load_causal_lm(self.config.model)

    def micro_batches(self, step: int, rank: int, world_size: int) -> Sequence[MicroBatch]:
        rows = [self.train[row] for row in self._order.rows(step)]
        loss_tokens = sum(int(row.loss_mask[1:].sum()) for row in rows)
        size = self.config.micro_batch_size
        mine = rows[rank::world_size]
        batches = [self._collate(mine[i : i + size], loss_tokens) for i in range(0, len(mine), size)]
        if self._replay is not None:
            text = torch.from_numpy(self._replay.batch(step)[rank::world_size])
            predicted = self.config.replay.batch_size * (text.shape[1] - 1)
            everywhere = torch.ones_like(text, dtype=torch.bool)
            batches.append(MicroBatch(text, everywhere, text, predicted / max(self.config.replay.weight, 1e-12)))
        return batches

    def loss(self, engine: Engine, micro_batch: MicroBatch) -> torch.Tensor:
        device = engine.device
        logits = engine(
            input_ids=micro_batch.tokens.to(device), attention_mask=micro_batch.attention_mask.to(device)
        ).logits
        return language_model_loss(logits, micro_batch.labels.to(device), normalizer=micro_batch.normalizer)

    def num_tokens(self, micro_batch: MicroBatch) -> int:
        return int(micro_batch.attention_mask.sum())

    def evaluate(self, engine: Engine) -> dict[str, float]:
        size = self.config.micro_batch_size * engine.world_size
        total = torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(self.heldout), size):
            mine = self.heldout[start : start + size][engine.rank :: engine.world_size]
            batch = self._collate(mine or self.heldout[:1], 1.0)  # an idle rank still takes part in the forward pass
            if mine:
                total[1] += sum(int(example.loss_mask[1:].sum()) for example in mine)
            total[0] += self.loss(engine, batch).item() if mine else 0.0 * self.loss(engine, batch).item()
        loss_sum, count = engine.sum_tensor(total).tolist()
        return {"eval/loss": loss_sum / count}

    def save(self, module: torch.nn.Module, state_dict: Mapping[str, torch.Tensor], folder: Path) -> None:
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

    def _collate(self, examples: Sequence[ChatExample], normalizer: float) -> MicroBatch:
        tokens, mask = pad_right([example.token_ids for example in examples], self.pad_token_id)
        trained, _ = pad_right([example.loss_mask for example in examples], 0)
        return MicroBatch(tokens, mask, tokens.masked_fill(trained == 0, IGNORED), normalizer)


def run(loaded: Loaded[SftConfig], console: Console, *, verbose: bool = False) -> Run:
    """The `sft` job."""
    config = loaded.config
    check_model_dir(config.model, key="model")
    check_data_file(config.data, key="data")
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
            console, job, example=mark_example(tokenizer, shown.token_ids, shown.loss_mask), placement=placement(config)
        )
        train(job, task, console, verbose=verbose)
    return job


def prepare(job: Run, config: SftConfig) -> SftTask:
    """Read and encode the demonstrations; keep some prompts out for the held-out loss."""
    tokenizer = load_tokenizer(config.model)
    data, first_turns = read_conversations(config.data, tokenizer, max_length=config.max_length)
    train_rows, heldout = split_by_text(data, first_turns, config.heldout_fraction)
    job.add_data(
        "data",
        rows=len(data.examples),
        tokens=data.num_tokens,
        loss_tokens=data.num_loss_tokens,
        heldout_rows=len(heldout),
        dropped=data.dropped,
    )
    if len(train_rows) < config.batch_size or not heldout:
        raise InputError(
            f"data: {config.data} leaves {len(train_rows)} rows to train on and {len(heldout)} held out; "
            f"batch_size={config.batch_size} needs at least {config.batch_size} and 1"
        )
    replay_path = None
    if config.replay.documents is not None:
        stream = tokenize_documents(config.replay.documents, tokenizer)
        replay_path = (job.dir / "replay.npy").absolute()
        stream.save(replay_path)
        job.add_data("replay.documents", rows=stream.num_documents, tokens=len(stream.tokens), dropped={})
    num_steps = max(1, int(len(train_rows) * config.num_epochs / config.batch_size))
    return SftTask(config, train_rows, heldout, replay_path, int(tokenizer.pad_token_id), num_steps)


def split_by_text(
    data: ChatData, first_turns: Sequence[str], fraction: float
) -> tuple[list[ChatExample], list[ChatExample]]:
    """(train, held out), split by the first turn's text, so that one prompt is never in both."""
    parts: tuple[list[ChatExample], list[ChatExample]] = ([], [])
    for example, text in zip(data.examples, first_turns, strict=True):
        parts[zlib.crc32(text.encode()) / 2**32 < fraction].append(example)
    return parts


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("sft")
