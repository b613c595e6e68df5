"""Config of the `reward-model` job."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from rayllm.config.common import TrainConfig


class RewardModelConfig(TrainConfig):
    model: Path
    """Model folder to start from: the SFT model; its head is replaced by a scalar."""

    rankings: Path
    """Rankings Parquet, as the label job writes it."""

    heldout_rankings: Path
    """Rankings for held-out pair accuracy, of prompts not in `rankings`."""

    max_length: int = Field(512, ge=8)
    """Longest prompt with response, in tokens; longer responses are dropped and counted."""

    num_epochs: float = Field(2, gt=0)
    """Passes over the rankings; batch_size counts prompts, each with all its pairs (InstructGPT, 3.5)."""

    center_coef: float = Field(1e-3, ge=0)
    """Weight of the mean squared reward, which keeps rewards around zero (Eisenstein et al. 2023)."""
