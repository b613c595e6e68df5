"""Config of the `process-reward-model` job."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from rayllm.config.common import TrainConfig
from rayllm.config.data import DataPaths


class ProcessRewardModelConfig(TrainConfig):
    model: Path
    """Model folder to start from: the SFT model; its head is replaced by a scalar."""

    steps: DataPaths
    """Responses in steps: `prompt`, `completions` (the steps) and `labels` (a bool each)."""

    heldout_steps: DataPaths
    """Such rows for held-out accuracy, of prompts not in `steps`."""

    separator: str = Field("\n", min_length=1)
    """Text between two steps, which one token must hold; stored with the model."""

    max_length: int = Field(512, ge=8)
    """Longest prompt with response, in tokens; longer rows are dropped and counted."""

    num_epochs: float = Field(2, gt=0)
    """Passes over the rows; batch_size counts rows, each with all its steps."""
