"""Config of the `ppo` job."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from rayllm.config.base import Config
from rayllm.config.common import CheckpointConfig, JobConfig, LearnerConfig, OptimizerConfig, check_optimizer
from rayllm.config.label import RolloutConfig


class ActorsConfig(Config):
    """One role's Ray actors."""

    num_actors: int = Field(1, ge=1)
    """Processes; for policy and critic these are data-parallel ranks."""

    cpus_per_actor: float = Field(1, gt=0)
    """CPUs that Ray reserves for each."""

    gpus_per_actor: float = Field(0, ge=0)
    """GPUs that Ray reserves for each; 0 computes on CPU."""

    micro_batch_size: int = Field(64, ge=1)
    """Most rows in one forward pass."""


class LearnerActorsConfig(ActorsConfig):
    """A trained role: DeepSpeed over its ranks."""

    micro_batch_tokens: int | None = Field(None, ge=1)
    """Most tokens in one forward pass, padding included (rows x longest row); a longer row goes alone. When set,
    passes are cut by it and not by micro_batch_size. Changes speed and memory, nothing else."""

    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-4, schedule="linear", final_ratio=0.1, warmup_steps=0, weight_decay=0.0
    )
    learner: LearnerConfig = LearnerConfig()

    @model_validator(mode="after")
    def _optimizer_fits(self) -> LearnerActorsConfig:
        check_optimizer(self.optimizer, self.learner)
        return self


class AlgorithmConfig(Config):
    """PPO as in InstructGPT (Ouyang et al. 2022) and Schulman et al. 2017."""

    num_epochs: int = Field(2, ge=1)
    """Passes over each step's experience."""

    num_minibatches: int = Field(3, ge=1)
    """Optimizer steps per pass."""

    clip_range: float = Field(0.2, gt=0)
    """PPO's bound on the probability ratio, 1 - c to 1 + c (Schulman et al. 2017)."""

    value_clip_range: float | None = Field(0.2, gt=0)
    """Bound on the change of a value per step; null for none (OpenAI baselines)."""

    gamma: float = Field(1.0, ge=0, le=1)
    """Discount per token (InstructGPT: none)."""

    gae_lambda: float = Field(0.95, ge=0, le=1)
    """Bias against variance of the advantage (Schulman et al. 2015)."""

    kl_coef: float = Field(0.1, ge=0)
    """Penalty per nat of drift from the reference, taken off each token's reward."""

    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the drift (http://joschu.net/blog/kl-approx.html)."""

    reward_clip: float = Field(3.0, gt=0)
    """Bound on the reward after it was standardised by the reward model's own mean and deviation."""

    missing_eos_penalty: float = Field(1.0, ge=0)
    """Taken off the reward of a response that did not end its turn."""

    critic_warmup_steps: int = Field(3, ge=0)
    """First steps in which only the critic learns."""


class EvalConfig(Config):
    prompts: Path | None = None
    """Held-out prompts for the periodic evaluation; null for none."""

    every_steps: int = Field(10, ge=1)
    """Steps between evaluations."""

    num_prompts: int = Field(128, ge=1)
    """Prompts of each evaluation, from the start of the file."""

    judge: Literal["gold", "none"] = "none"
    """`gold`: the toy world's exact judge; `none`: reward model only."""


class PPOConfig(JobConfig):
    model: Path
    """Model folder that policy and reference start from: the SFT model."""

    reward_model: Path
    """Model folder of the reward model; the critic starts from it too."""

    prompts: Path
    """Prompts to learn on: Parquet or JSONL with a `prompt` column (messages or text)."""

    num_steps: int = Field(40, ge=1)
    """Steps: one batch of rollouts and its update each."""

    prompts_per_step: int = Field(96, ge=1)
    """Prompts of one step, over all rollout actors."""

    samples_per_prompt: int = Field(1, ge=1)
    """Responses sampled for each prompt."""

    max_logprob_mismatch: float = Field(0.05, gt=0)
    """Stop when the sampler's and the learner's log-probabilities of the same tokens differ by more than this on
    average, in nats: the weights are then not in step. Below 1e-4 in float32, about 0.02 in bfloat16."""

    algorithm: AlgorithmConfig = AlgorithmConfig()
    policy: LearnerActorsConfig = LearnerActorsConfig()
    critic: LearnerActorsConfig = LearnerActorsConfig(
        optimizer=OptimizerConfig(
            learning_rate=3e-4, schedule="constant", warmup_steps=0, weight_decay=0.0
        )
    )
    reference: ActorsConfig = ActorsConfig()
    reward: ActorsConfig = ActorsConfig()
    rollout: RolloutConfig = RolloutConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig(every_steps=10)

    @property
    def num_shards(self) -> int:
        """Parts of a step's batch: whole prompts, the same number for every learner rank, and enough that every
        rollout actor has work and scoring can start before the last response is done."""
        from math import lcm

        ranks = lcm(self.policy.num_actors, self.critic.num_actors)
        wanted = max(2, self.rollout.num_actors)
        return ranks * -(-wanted // ranks)

    @model_validator(mode="after")
    def _divides(self) -> PPOConfig:
        shards = self.num_shards
        if self.prompts_per_step % shards:
            near = max(shards, round(self.prompts_per_step / shards) * shards)
            raise ValueError(
                f"prompts_per_step={self.prompts_per_step} does not divide into {shards} shards "
                f"(policy.num_actors={self.policy.num_actors}, critic.num_actors={self.critic.num_actors}, "
                f"rollout.num_actors={self.rollout.num_actors}); nearest that does: prompts_per_step={near}"
            )
        for role, num_actors in (("policy", self.policy.num_actors), ("critic", self.critic.num_actors)):
            rows = self.prompts_per_step * self.samples_per_prompt // num_actors
            if self.algorithm.num_minibatches > rows:
                raise ValueError(
                    f"algorithm.num_minibatches={self.algorithm.num_minibatches} is more than the {rows} responses "
                    f"of a {role} rank; set it to at most {rows}"
                )
        return self
