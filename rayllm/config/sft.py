"""Config of the `sft` job."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from rayllm.config.base import Config
from rayllm.config.common import TrainConfig
from rayllm.config.data import DataPaths


class ReplayConfig(Config):
    """Pretraining text mixed into every step, so that text completion does not get worse (InstructGPT, C.1)."""

    documents: Path | None = None
    """Text to replay: the pretraining documents. Null switches replay off."""

    weight: float = Field(0.3, ge=0)
    """Weight of the replayed text's loss beside the answers' loss."""

    batch_size: int = Field(2, ge=1)
    """Rows of replayed text per step, over all workers."""

    sequence_length: int = Field(64, ge=8)
    """Tokens per replayed row."""


class SftConfig(TrainConfig):
    model: Path
    """Model folder to start from."""

    data: DataPaths
    """Demonstrations: OpenAI messages, ShareGPT, prompt and completion, Alpaca; JSONL, JSON, CSV, Parquet, Arrow, a
    folder, hf://datasets/ORG/NAME; or a list of {path, weight}."""

    heldout_fraction: float = Field(0.02, gt=0, lt=0.5)
    """Share of the prompts whose rows are kept for the held-out loss."""

    max_length: int = Field(512, ge=8)
    """Longest conversation in tokens; longer rows are dropped and counted."""

    num_epochs: float = Field(3.7, gt=0)
    """Passes over the demonstrations."""

    replay: ReplayConfig = ReplayConfig()

    @model_validator(mode="after")
    def _replay_divides(self) -> SftConfig:
        ranks = self.workers.num_workers
        if self.replay.documents is not None and self.replay.batch_size % ranks:
            raise ValueError(
                f"replay.batch_size={self.replay.batch_size} does not divide over workers.num_workers={ranks}; "
                f"nearest that does: replay.batch_size={ranks}"
            )
        return self
