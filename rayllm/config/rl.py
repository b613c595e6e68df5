"""Sections of the `ppo` job's config: roles, algorithm, shaping, evaluation. What holds between them: ``ppo.py``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from rayllm.algorithms.kinds import ADVANTAGE_KINDS, POLICY_KINDS, AdvantageKind
from rayllm.config.base import Config
from rayllm.config.common import ActorsConfig, LearnerConfig, OptimizerConfig, PlacementConfig, check_optimizer
from rayllm.config.label import RolloutConfig


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


class CriticConfig(LearnerActorsConfig):
    """Runs only where the advantage needs values (`gae`)."""

    model: Path | None = None
    """Folder that the critic starts from: a reward model, a critic of an earlier run, or a language model, which gets
    a new head. Null: the reward model (InstructGPT), or without one the policy's model."""

    warmup_steps: int = Field(3, ge=0)
    """First steps in which only the critic learns."""


class ReferenceConfig(ActorsConfig):
    """The model that the policy is held near to."""

    update_every: int | None = Field(None, ge=1)
    """Steps after which the reference moves towards the policy; null: it never does."""

    ema: float = Field(0.0, ge=0, lt=1)
    """Share of itself that the reference keeps when it moves: 0 copies the policy, 0.99 follows it slowly."""


PARTNERS = {"reference": "policy", "reward": "critic"}
"""Role -> the one whose GPUs it shares in `pairs`."""


class PPOPlacementConfig(PlacementConfig):
    mode: Literal["split", "colocated", "pairs"] = "split"
    """Which roles share GPUs, each a part of it: none (`split`); all (`colocated`), where engines sleep while the
    learners update, and optimizer states lie in the host's memory while they do not; or the policy with the reference
    and the critic with the reward model (`pairs`). Roles that share one have gpus_per_actor of at most 1."""

    def shares(self, roles: Sequence[str]) -> list[list[str]]:
        """The roles in sets that share their GPUs, each behind the one that says where they go."""
        if self.mode == "colocated":
            return [list(roles)]
        sets: dict[str, list[str]] = {}
        for role in roles:
            partner = PARTNERS.get(role.split(".")[0]) if self.mode == "pairs" else None
            sets.setdefault(partner if partner in roles else role, []).append(role)  # type: ignore[arg-type]
        return list(sets.values())


class AlgorithmConfig(Config):
    """What is computed from a step's responses. The defaults are PPO as in InstructGPT (Ouyang et al. 2022)."""

    advantage: str = "gae"
    """How much better a token was than expected: by the critic (`gae`), by the other responses to its prompt (`grpo`,
    `dr_grpo`, `rloo`, `reinforce_baseline`), by the batch (`reinforce_pp`) or by the greedy response (`remax`)."""

    gamma: float = Field(1.0, ge=0, le=1)
    """Discount per token (InstructGPT: none)."""

    gae_lambda: float = Field(0.95, ge=0, le=1)
    """Bias against variance of `gae` (Schulman et al. 2015)."""

    policy_loss: str = "ppo"
    """`ppo` clips each token's probability ratio, `gspo` that of the whole response, `cispo` the ratio as a weight."""

    clip_range: float = Field(0.2, ge=0, le=1)
    """How far below 1 the probability ratio counts (Schulman et al. 2017)."""

    clip_range_high: float | None = Field(None, gt=0)
    """How far above 1; null: as far as below (DAPO: 0.28)."""

    dual_clip: float | None = Field(None, gt=1)
    """Bound on the loss of tokens with a negative advantage, as a multiple of it; null: none (Ye et al. 2020: 3)."""

    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """Every token of the minibatch counts the same; every response does; or its tokens over a constant length (Dr.
    GRPO)."""

    entropy_coef: float = Field(0.0, ge=0)
    """Bonus per nat of the policy's entropy."""

    value_clip_range: float | None = Field(0.2, gt=0)
    """Bound on the change of a value per step; null for none (OpenAI baselines)."""

    kl_coef: float = Field(0.1, ge=0)
    """Penalty per nat of drift from the reference. 0 runs without a reference."""

    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the drift (http://joschu.net/blog/kl-approx.html). In the loss k2 or k3: k1 has no gradient."""

    kl_in: Literal["reward", "loss"] = "reward"
    """Where the penalty goes: off each token's reward (InstructGPT), or into the loss (GRPO)."""

    kl_target: float | None = Field(None, gt=0)
    """Drift in nats per response that `kl_coef` is steered towards; null: `kl_coef` is fixed (Ziegler et al. 2019)."""

    kl_horizon: int = Field(10_000, ge=1)
    """Responses over which `kl_coef` follows the drift."""

    off_policy: Literal["none", "token", "sequence", "mask", "sequence_mask"] | None = None
    """Correction for responses sampled by an older or a numerically different policy: importance weights by `token` or
    `sequence`, cut at `off_policy_high`, or a `mask` over tokens (IcePop) or sequences outside the bounds. Null:
    `token` where max_policy_lag is above 0, else `none`."""

    off_policy_low: float = Field(0.5, ge=0, le=1)
    """Least ratio of learner to sampler that a mask keeps."""

    off_policy_high: float = Field(2.0, ge=1)
    """Largest ratio of learner to sampler."""

    num_epochs: int = Field(2, ge=1)
    """Passes over each step's experience."""

    num_minibatches: int = Field(3, ge=1)
    """Optimizer steps per pass."""

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of one step."""
        return self.num_epochs * self.num_minibatches

    @property
    def advantage_kind(self) -> AdvantageKind:
        """What `advantage` needs."""
        return ADVANTAGE_KINDS[self.advantage]

    @field_validator("advantage", "policy_loss")
    @classmethod
    def _is_registered(cls, name: str, info: ValidationInfo) -> str:
        known = tuple(ADVANTAGE_KINDS) if info.field_name == "advantage" else POLICY_KINDS
        if name not in known:
            raise ValueError(f"{name!r} is not known; known: {', '.join(known)}")
        return name


class ShapingConfig(Config):
    """From the score of a response to its reward."""

    normalize: Literal["none", "group"] = "none"
    """`group`: rewards by mean and deviation of those of the responses to one prompt. For the scale of one source over
    the run: `reward.normalize`."""

    clip: float | None = Field(3.0, gt=0)
    """Bound on the absolute reward; null for none."""

    missing_eos_penalty: float = Field(1.0, ge=0)
    """Taken off the reward of a response that did not end its turn."""

    overlong_buffer: int = Field(0, ge=0)
    """Last tokens before `rollout.max_new_tokens` in which the reward falls linearly by 1 (DAPO); 0 for none."""

    length_penalty: float = Field(0.0, ge=0)
    """Taken off the reward for every token of the response."""

    resample_rounds: int = Field(0, ge=0)
    """DAPO's dynamic sampling: prompts whose responses all got the same reward teach nothing; they are replaced by
    others, sampled in at most this many more rounds. 0 keeps them."""


class PtxConfig(Config):
    """PPO-ptx: pretraining text mixed into the policy's update, so that text completion does not get worse
    (InstructGPT, eq. 2)."""

    documents: Path | None = None
    """Text to mix in: the pretraining documents. Null switches it off."""

    coef: float = Field(1.0, gt=0)
    """Weight of the text's mean loss per token beside the policy's (InstructGPT's gamma)."""

    batch_size: int = Field(8, ge=1)
    """Rows of text per optimizer step, over all policy ranks."""

    sequence_length: int = Field(64, ge=8)
    """Tokens per row."""


class FleetConfig(Config):
    """Engines that come, go and fail while the run goes on."""

    min_engines: int = Field(1, ge=1)
    """Fewest engines with which the run goes on. With fewer, and none that comes within placement.wait_s, it ends with
    status 3 and its last checkpoint. At most num_actors, with which it starts."""

    max_engines: int | None = Field(None, ge=1)
    """Most engines: while the run goes on, more than num_actors are started as the cluster has room for them or an
    autoscaler brings nodes. Null: num_actors."""

    stall_s: float = Field(600, gt=0)
    """Seconds for which an engine with work may make no progress: no step of it, on a GPU no finished response. Then
    its process is ended, its work goes to the others, and it is started anew. After half of them it gets no more
    work."""

    max_restarts: int = Field(5, ge=0)
    """Engines that are started anew within an hour because they failed. One that goes with its node does not count."""


class PPORolloutConfig(RolloutConfig, FleetConfig):
    cut_tail: bool = False
    """Train on the responses that are done first, not on those begun first: long ones are carried over to later steps,
    as far as max_policy_lag allows. Needs max_policy_lag above 0."""

    keep_cache: bool = False
    """Responses under way when the weights change keep the keys and values that the old weights computed. It saves
    computing them again; what is sampled then is of no policy exactly."""


    weight_transfer: Literal["memory", "broadcast", "ipc"] = "memory"
    """How new weights reach the engines: through `memory` of the host, adapters alone where only they train; or from
    GPU to GPU, by `broadcast` (NCCL) or, where policy rank i and engine i share a GPU (placement.mode=colocated), by
    CUDA `ipc`. Only through memory can engines come and go, and not where they are colocated: otherwise the first one
    that is lost ends the run, with status 3."""

    @model_validator(mode="after")
    def _sizes_in_order(self) -> PPORolloutConfig:
        if self.min_engines > self.num_actors:
            raise ValueError(
                f"rollout.min_engines={self.min_engines} is more than the rollout.num_actors={self.num_actors} that "
                "the run starts with; lower it or raise num_actors"
            )
        if self.max_engines is not None and self.max_engines < self.num_actors:
            raise ValueError(
                f"rollout.max_engines={self.max_engines} is less than rollout.num_actors={self.num_actors}; "
                "raise it or set it to null"
            )
        if self.weight_transfer != "memory" and (self.max_engines or 0) > self.num_actors:
            raise ValueError(
                f"rollout.max_engines={self.max_engines} lets engines join a running job, which the fixed group of "
                f"rollout.weight_transfer={self.weight_transfer} does not; set weight_transfer=memory or "
                "max_engines=null"
            )
        return self


class RecoveryConfig(Config):
    """Models that fail while the run goes on."""

    max_rebuilds: int = Field(5, ge=0)
    """Times within an hour that policy, critic, reference or a source of rewards may be started anew inside the run
    because a process of theirs ended. One more ends the run with status 3, its last checkpoint whole."""

    stall_s: float = Field(600, gt=0)
    """Seconds for which a process of theirs may make no progress while it is asked for something: no micro-batch, no
    byte to or from a disk. Then all ranks of its role are ended, and started anew."""


class EvalConfig(Config):
    prompts: Path | None = None
    """Held-out prompts for the periodic evaluation; null for none."""

    every_steps: int = Field(10, ge=1)
    """Steps between evaluations."""

    num_prompts: int = Field(128, ge=1)
    """Prompts of each evaluation, from the start of the file."""

    judge: Literal["gold", "none"] = "none"
    """`gold`: the toy world's exact judge; `none`: reward model only."""

    documents: Path | None = None
    """Held-out text; each evaluation measures the policy's bits per byte on it. Null for none."""
