"""Config of the `evaluate` job."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from rayllm.config.common import DataJobConfig, PlacementConfig
from rayllm.config.label import RolloutConfig


class EvaluateConfig(DataJobConfig):
    models: dict[str, Path]
    """Name -> model folder, oldest first; each is compared with the one it was trained from, or, where that is not
    among them, with the one before it. Drift (KL) is measured from the model named by `reference`."""

    reference: str = "sft"
    """Name, in `models`, of the model that KL is measured from."""

    reward_model: Path
    """Model folder of the reward model."""

    prompts: dict[str, Path]
    """Split -> prompts with the toy world's columns."""

    heldout_documents: Path
    """Text for bits per byte."""

    num_prompts: int = Field(400, ge=1)
    """Prompts of each split, from the start of its file."""

    num_shown: int = Field(12, ge=0)
    """Prompts whose answers are kept side by side for the report."""

    rollout: RolloutConfig = RolloutConfig()
    placement: PlacementConfig = PlacementConfig()

    @model_validator(mode="after")
    def _reference_is_a_model(self) -> EvaluateConfig:
        if self.reference not in self.models:
            raise ValueError(f"reference={self.reference!r} is not one of models: {', '.join(self.models)}")
        return self
