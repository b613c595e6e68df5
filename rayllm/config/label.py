"""Config of the `label` job."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rayllm.config.base import Config
from rayllm.config.common import DataJobConfig


class RolloutConfig(Config):
    """vLLM rollout actors."""

    num_actors: int = Field(1, ge=1)
    """Engines, each in its own process."""

    cpus_per_actor: float = Field(1, gt=0)
    """CPUs that Ray reserves for each engine."""

    gpus_per_actor: float = Field(0, ge=0)
    """GPUs that Ray reserves for each engine; 0 runs vLLM on CPU."""

    temperature: float = Field(0.7, gt=0)
    """Sampling temperature; the same in sampling and in the log-probabilities."""

    max_new_tokens: int = Field(48, ge=1)
    """Most tokens in a response."""

    ignore_stop: bool = False
    """Sample max_new_tokens always, through end-of-turn tokens; for benchmarks."""

    timeout_s: float = Field(1800, gt=0)
    """Seconds after which responses that were asked for and are not done fail the job: an engine hangs, or waits for
    more work than it can do."""

    engine: dict[str, Any] = {}
    """vLLM engine arguments by vLLM's own names, over our defaults."""


class LabelConfig(DataJobConfig):
    model: Path
    """Model folder that answers."""

    prompts: Path
    """Prompts to answer and rank: `prompt` (messages or text), OpenAI messages or GSM8K's columns."""

    heldout_prompts: Path
    """Prompts whose rankings, without label noise, measure the reward model."""

    num_prompts: int = Field(2_000, ge=1)
    """Prompts of `prompts` that are ranked, taken from its start."""

    num_heldout_prompts: int = Field(250, ge=1)
    """Prompts of `heldout_prompts` that are ranked."""

    num_responses: int = Field(4, ge=2)
    """Answers sampled for each prompt (k)."""

    labeler: Literal["gold"] = "gold"
    """Who ranks: `gold`, the toy world's judge standing in for people."""

    noise: float = Field(0.2, ge=0)
    """Scale of the Gumbel noise on the judge's score before ranking, in score units: 0.2 to 0.8 agree with each
    other as often as people do."""

    rollout: RolloutConfig = RolloutConfig()
