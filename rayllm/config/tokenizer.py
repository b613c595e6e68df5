"""Config of the `tokenizer` job."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from rayllm.config.common import DataJobConfig


class TokenizerConfig(DataJobConfig):
    documents: Path
    """Text to train on: a Parquet or JSONL file with a `text` column."""

    vocab_size: int = Field(1024, ge=300)
    """Tokens, the 256 bytes and the special tokens included."""

    max_length: int = Field(512, ge=16)
    """Longest sequence that models of this tokenizer are meant for, in tokens."""
