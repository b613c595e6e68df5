"""Config of the `reward-model` job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rayllm.config.base import Config
from rayllm.config.common import TrainConfig
from rayllm.config.data import DataPaths


class EnsembleConfig(Config):
    num_heads: int = Field(1, ge=1)
    """Heads on one trunk. With several each learns from a bootstrap of the prompts of its own, drawn from `seed`, and
    the model is saved as a classifier with a label a head."""


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
    """Passes over the rankings; batch_size counts prompts, each with all its responses (InstructGPT, 3.5); with
    loss=pairwise it counts pairs."""

    loss: Literal["pairwise", "all_pairs", "plackett_luce"] = "all_pairs"
    """Bradley-Terry over all pairs of a prompt, read once (`all_pairs`, InstructGPT); the likelihood of the whole order
    (`plackett_luce`); or Bradley-Terry with each pair a row of its own, its responses read with every pair that they
    are in (`pairwise`)."""

    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Chance that a label is the wrong way round; not for loss=plackett_luce."""

    margin_coef: float = Field(0.0, ge=0)
    """Reward by which the better response must lead, per unit of difference in the rankings' `scores` (Llama 2); not
    for loss=plackett_luce."""

    center_coef: float = Field(1e-3, ge=0)
    """Weight of the mean squared reward, which keeps rewards around zero (Eisenstein et al. 2023)."""

    labeler_weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Labeler -> weight of the loss of their rankings; 1 for those not named."""

    ensemble: EnsembleConfig = EnsembleConfig()

    @model_validator(mode="after")
    def _loss_is_of_pairs(self) -> RewardModelConfig:
        for key in ("label_smoothing", "margin_coef"):
            if self.loss == "plackett_luce" and getattr(self, key):
                raise ValueError(
                    f"{key}={getattr(self, key):g} is about pairs, loss=plackett_luce has none: "
                    f"set {key}=0 or loss=all_pairs"
                )
        return self
