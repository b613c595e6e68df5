"""Config of the `reward-model` job."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from rayllm.config.common import TrainConfig
from rayllm.config.data import DataPaths


class RewardModelConfig(TrainConfig):
    model: Path
    """Model folder to start from: the SFT model; its head is replaced by a scalar."""

    rankings: DataPaths
    """Rankings as the label job writes them, preference pairs, Anthropic HH strings or scored completions; JSONL, JSON,
    CSV, Parquet, Arrow, a folder, hf://datasets/ORG/NAME; or a list of {path, weight}."""

    heldout_rankings: DataPaths | None = None
    """Rankings for held-out pair accuracy; those of prompts that stand in `rankings` are left out. Null sets a part of
    `rankings` aside."""

    heldout_fraction: float = Field(0.1, gt=0, lt=0.5)
    """Share of the prompts of `rankings` that are set aside where heldout_rankings is null."""

    max_length: int = Field(512, ge=8)
    """Longest prompt with response, in tokens; longer responses are dropped and counted."""

    num_epochs: float = Field(2, gt=0)
    """Passes over the rankings; batch_size counts prompts, each with all its pairs (InstructGPT, 3.5)."""

    center_coef: float = Field(1e-3, ge=0)
    """Weight of the mean squared reward, which keeps rewards around zero (Eisenstein et al. 2023)."""
