"""Config of the `reward-report` job."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from rayllm.config.common import ActorsConfig, DataJobConfig, PlacementConfig
from rayllm.config.data import DataPaths


class RewardReportConfig(DataJobConfig):
    model: Path
    """Model folder of the reward model: ours, or any classifier of one label for transformers."""

    rankings: DataPaths
    """Rankings that it was not trained on, or pairs, in any format that the reward-model job reads; a `category` column
    sorts them."""

    max_length: int = Field(512, ge=8)
    """Longest prompt with response, in tokens; longer responses are dropped and counted."""

    reward: ActorsConfig = ActorsConfig()

    placement: PlacementConfig = PlacementConfig()
