"""Config of the `label` job."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from rayllm.config.base import Config
from rayllm.config.common import ActorsConfig, DataJobConfig, PlacementConfig


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

    long_prompts: Literal["drop", "cut", "stop"] = "drop"
    """What becomes of a prompt behind which max_new_tokens do not fit into the model: `drop` leaves it out and counts
    it, `cut` keeps its end, `stop` ends the job before anything starts."""

    ignore_stop: bool = False
    """Sample max_new_tokens always, through end-of-turn tokens; for benchmarks."""

    timeout_s: float = Field(1800, gt=0)
    """Seconds after which responses that were asked for and are not done fail the job: an engine hangs, or waits for
    more work than it can do."""

    engine: dict[str, Any] = {}
    """vLLM engine arguments by vLLM's own names, over our defaults."""


class BestConfig(Config):
    """Which prompts' best answers are kept as demonstrations (best of n, rejection sampling)."""

    min_score: float | None = None
    """Least score of a best answer, in standard deviations of the reward model's rewards; null keeps all."""

    top_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the prompts that is kept: those whose best answers score highest."""


class LabelConfig(DataJobConfig):
    model: Path
    """Model folder that answers."""

    prompts: Path
    """Prompts to answer and rank: `prompt` (messages or text), OpenAI messages or GSM8K's columns."""

    heldout_prompts: Path | None = None
    """labeler=gold: prompts whose rankings, without label noise, measure the reward model."""

    num_prompts: int = Field(2_000, ge=1)
    """Prompts of `prompts` that are ranked, taken from its start."""

    num_heldout_prompts: int = Field(250, ge=1)
    """Prompts of `heldout_prompts` that are ranked."""

    num_responses: int = Field(4, ge=2)
    """Answers sampled for each prompt (k, or n in best of n)."""

    labeler: Literal["gold", "reward-model"] = "gold"
    """Who ranks: `gold`, the toy world's judge standing in for people, or a reward model."""

    noise: float = Field(0.2, ge=0)
    """labeler=gold: scale of the Gumbel noise on the judge's score before ranking, in score units: 0.2 to 0.8 agree
    with each other as often as people do."""

    reward_model: Path | None = None
    """labeler=reward-model: model folder of the reward model."""

    heldout_rankings: Path | None = None
    """labeler=reward-model: people's rankings of prompts that the reward model was not trained on. It scores their
    answers, and the job reports how often it agrees with people, and people with each other where several ranked the
    same answers."""

    set_aside_below: float = Field(0.75, ge=0.5, lt=1)
    """labeler=reward-model: least probability that an order is right for it to be written as a label. Where that of
    the best two answers is lower, the prompt goes to people."""

    best: BestConfig = BestConfig()

    rollout: RolloutConfig = RolloutConfig()
    placement: PlacementConfig = PlacementConfig()

    reward: ActorsConfig = ActorsConfig()

    max_actors: int | None = Field(None, ge=1)
    """Most engines: while prompts wait and the cluster has room or can grow, more than rollout.num_actors are started.
    Null: no more than these."""

    @model_validator(mode="after")
    def _labeler_has_what_it_needs(self) -> LabelConfig:
        needs = {"gold": "heldout_prompts", "reward-model": "reward_model"}
        if getattr(self, needs[self.labeler]) is None:
            raise ValueError(f"labeler={self.labeler} needs {needs[self.labeler]}")
        others = {"gold": ("reward_model", "heldout_rankings"), "reward-model": ("heldout_prompts",)}
        for key in others[self.labeler]:
            if getattr(self, key) is not None:
                raise ValueError(f"labeler={self.labeler} does not use {key}={getattr(self, key)}; leave it out")
        if self.max_actors is not None and self.max_actors < self.rollout.num_actors:
            raise ValueError(
                f"max_actors={self.max_actors} is less than rollout.num_actors={self.rollout.num_actors}; "
                "raise it or set it to null"
            )
        return self
