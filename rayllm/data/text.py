"""Documents as one stream of tokens, and rows cut from it for next-token prediction."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayllm.data.batching import BatchOrder
from rayllm.data.files import read_texts
from rayllm.data.rows import BadRows
from rayllm.data.tokenizer import end_of_text_id

BATCH = 1_000
HELD_OUT_LENGTH = 128


@dataclass(frozen=True, slots=True)
class TokenStream:
    """Documents end to end, each begun by the end-of-text token."""

    tokens: np.ndarray  # (N,) uint32; memory-mapped when it came from a file
    num_documents: int
    num_bytes: int
    facts: dict[str, Any] = field(default_factory=dict)
    """Bad rows that were passed over, for the run record."""

    def save(self, path: Path) -> None:
        np.save(path, self.tokens)

    def rows(self, sequence_length: int, *, offset: int = 0) -> np.ndarray:
        """(R, sequence_length): the stream from ``offset`` on, cut into whole rows."""
        usable = (len(self.tokens) - offset) // sequence_length * sequence_length
        return self.tokens[offset : offset + usable].reshape(-1, sequence_length)


def tokenize_documents(path: Path, tokenizer: Any, *, max_bad_rows: int = 0) -> TokenStream:
    """Read the `text` column and encode it; memory holds the tokens and a thousand documents at a time."""
    bad = BadRows(max_bad_rows)
    separator = end_of_text_id(tokenizer)
    parts: list[np.ndarray] = []
    num_documents = num_bytes = 0
    for texts in _batches(read_texts(path, bad)):
        for encoded in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False):
            parts.append(np.array([separator, *encoded.ids], dtype=np.uint32))
        num_documents += len(texts)
        num_bytes += sum(len(text.encode()) for text in texts)
    tokens = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)
    return TokenStream(tokens, num_documents, num_bytes, bad.facts())


def held_out_text(path: Path, tokenizer: Any, *, max_bad_rows: int = 0) -> tuple[torch.Tensor, float]:
    """(R, 128) int64 rows of documents, and the factor from mean nats per token to bits per byte."""
    stream = tokenize_documents(path, tokenizer, max_bad_rows=max_bad_rows)
    rows = torch.from_numpy(stream.rows(HELD_OUT_LENGTH).astype(np.int64))
    return rows, len(stream.tokens) / stream.num_bytes / math.log(2)


class PackedRows:
    """Rows of ``sequence_length`` tokens in a seeded order. Each epoch cuts the stream at another offset, so that
    the model sees each token at many positions."""

    def __init__(self, tokens: np.ndarray, sequence_length: int, batch_size: int, *, seed: int) -> None:
        self.tokens, self.sequence_length, self.seed = tokens, sequence_length, seed
        num_rows = (len(tokens) - sequence_length + 1) // sequence_length
        self.order = BatchOrder(num_rows, batch_size, seed=seed)

    def batch(self, step: int) -> np.ndarray:
        """(batch_size, sequence_length) int64 tokens of the step."""
        epoch = step // self.order.steps_per_epoch
        offset = int(np.random.default_rng((self.seed, epoch, 1)).integers(self.sequence_length))
        starts = offset + self.order.rows(step) * self.sequence_length
        return self.tokens[starts[:, None] + np.arange(self.sequence_length)].astype(np.int64)


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
