"""Config of the `ppo` job."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from rayllm.config.common import ActorsConfig, CheckpointConfig, DataJobConfig, LearnerConfig, OptimizerConfig
from rayllm.config.data import DataPaths
from rayllm.config.environment import EnvironmentConfig
from rayllm.config.label import RolloutConfig
from rayllm.config.reward import RewardConfig
from rayllm.config.rl import (
    AlgorithmConfig,
    CriticConfig,
    EvalConfig,
    LearnerActorsConfig,
    PPOPlacementConfig,
    PPORolloutConfig,
    PtxConfig,
    RecoveryConfig,
    ReferenceConfig,
    ShapingConfig,
)

PROMPTS_HELP = "Prompts to learn on: a file with a `prompt` column, OpenAI messages or GSM8K's columns."

SHARDS_A_RANK = 2
"""Enough that one can be scored while the other is sampled. Each costs five calls, whatever its size."""


class PPOConfig(DataJobConfig):
    model: Path
    """Model folder that policy and reference start from: the SFT model."""

    reward_model: Path | tuple[Path, ...] | None = None
    """Model folder of the reward model, or a list of several, which score as an ensemble (`reward.uncertainty`); the
    critic starts from the first. Needed where a source of rewards is a model that names no folder of its own."""

    prompts: DataPaths | None = None
    """Prompts to learn on: `prompt` (messages, text or token ids), OpenAI messages or GSM8K's columns; or a list of
    {path, weight}. Needed unless an environment makes its own."""

    num_steps: int = Field(40, ge=1)
    """Steps: one batch of rollouts and its update each."""

    prompts_per_step: int = Field(96, ge=1)
    """Prompts of one step, over all rollout actors."""

    samples_per_prompt: int = Field(1, ge=1)
    """Responses sampled for each prompt."""

    max_policy_lag: int = Field(0, ge=0)
    """Policy updates that a response may be older than the update which trains on it. 0: sampling and learning take
    turns; 1: the next step is sampled while this one is learned; more: further ahead. Weights change under way, between
    two tokens."""

    max_logprob_mismatch: float | None = Field(None, gt=0)
    """Nats a token by which sampler and learner may differ about the same text, on average: in every step, and in the
    proof after every sync. More means other weights, and stops the run. Null: 0.01 where both compute in float32, else
    0.25, for half precision is coarse on improbable tokens."""

    on_alarm: Literal["note", "stop"] = "note"
    """When the drift from the reference explodes, a step moves the policy too far, or its entropy is gone
    (rayllm/algorithms/alarms.py): `note` says so on the screen and in events.jsonl, `stop` ends the run after 3 such
    steps in a row."""

    algorithm: AlgorithmConfig = AlgorithmConfig()
    shaping: ShapingConfig = ShapingConfig()
    ptx: PtxConfig = PtxConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    policy: LearnerActorsConfig = LearnerActorsConfig()
    critic: CriticConfig = CriticConfig(
        optimizer=OptimizerConfig(
            learning_rate=3e-4, schedule="constant", warmup_steps=0, weight_decay=0.0
        )
    )
    reference: ReferenceConfig = ReferenceConfig()
    reward: RewardConfig = RewardConfig()
    rollout: PPORolloutConfig = PPORolloutConfig()
    placement: PPOPlacementConfig = PPOPlacementConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig(every_steps=10)

    @property
    def critic_start(self) -> Path:
        """Folder that the critic starts from."""
        return self.critic.model or next(iter(self.reward_models), self.model)

    @property
    def reward_models(self) -> tuple[Path, ...]:
        """The reward models' folders, none in a run without."""
        given = self.reward_model
        return given if isinstance(given, tuple) else () if given is None else (given,)

    @property
    def roles(self) -> dict[str, ActorsConfig | RolloutConfig]:
        """Role -> its section, of this run's roles; `reward.NAME` is one of several sources."""
        found: dict[str, ActorsConfig | RolloutConfig] = {"policy": self.policy}
        if self.algorithm.advantage_kind.needs_critic:
            found["critic"] = self.critic
        if self.algorithm.kl_coef > 0 and self.policy.learner.lora.rank is None:  # else the policy without its adapters
            found["reference"] = self.reference
        several = bool(self.reward.sources)
        found |= {f"reward.{name}" if several else "reward": s for name, s in self.reward.by_name.items()}
        return found | {"rollout": self.rollout}

    @property
    def engine(self) -> dict[str, Any]:
        """`rollout.engine`, and what engines that share their GPUs need: to sleep, and to leave half of the memory for
        the models that stay."""
        if self.placement.mode != "colocated" or not self.rollout.gpus_per_actor:
            return self.rollout.engine
        return {"gpu_memory_utilization": 0.5, "enable_sleep_mode": True, **self.rollout.engine}

    @property
    def off_policy(self) -> str:
        """The off-policy correction of this run."""
        return self.algorithm.off_policy or ("token" if self.max_policy_lag else "none")

    @property
    def learner_ranks(self) -> dict[str, int]:
        """Role -> number of ranks, of the roles that learn in this run."""
        ranks = {"policy": self.policy.num_actors}
        return ranks | ({"critic": self.critic.num_actors} if self.algorithm.advantage_kind.needs_critic else {})

    @property
    def num_shards(self) -> int:
        """Parts of a step's batch that are scored, and wait for each other, as one: whole prompts, the same number for
        every learner rank, and enough that scoring can start before the last response is done. More of them only where
        the tail is cut: what comes late is a shard."""
        from math import lcm

        ranks = lcm(*self.learner_ranks.values())
        wanted = max(2, self._engines)
        if not self.rollout.cut_tail:
            wanted = min(wanted, SHARDS_A_RANK * ranks)
        return ranks * -(-wanted // ranks)

    @property
    def pieces_per_shard(self) -> int:
        """Calls in which a shard is sampled: as many for every rollout actor."""
        from math import gcd

        return self._engines // gcd(self._engines, self.num_shards)

    @property
    def _engines(self) -> int:
        return self.rollout.max_engines or self.rollout.num_actors

    @model_validator(mode="after")
    def _divides(self) -> PPOConfig:
        shards = self.num_shards
        if self.prompts_per_step % shards:
            near = max(shards, round(self.prompts_per_step / shards) * shards)
            counts = ", ".join(f"{role}.num_actors={count}" for role, count in self.learner_ranks.items())
            most = self.rollout.max_engines
            counts += f", rollout.max_engines={most}" if most else f", rollout.num_actors={self.rollout.num_actors}"
            raise ValueError(
                f"prompts_per_step={self.prompts_per_step} does not divide into {shards} shards ({counts}); "
                f"nearest that does: prompts_per_step={near}"
            )
        for role, num_actors in self.learner_ranks.items():
            rows = self.prompts_per_step * self.samples_per_prompt // num_actors
            if self.algorithm.num_minibatches > rows:
                raise ValueError(
                    f"algorithm.num_minibatches={self.algorithm.num_minibatches} is more than the {rows} responses "
                    f"of a {role} rank; set it to at most {rows}"
                )
        return self

    @model_validator(mode="after")
    def _every_engine_has_a_rank(self) -> PPOConfig:
        if self.rollout.weight_transfer != "ipc":
            return self
        if self.policy.num_actors != self.rollout.num_actors:
            raise ValueError(
                f"rollout.weight_transfer=ipc needs a policy rank on the GPU of every engine: "
                f"policy.num_actors={self.policy.num_actors} and rollout.num_actors={self.rollout.num_actors} differ; "
                "make them equal, or set rollout.weight_transfer=broadcast"
            )
        if self.placement.mode != "colocated":
            raise ValueError(
                "rollout.weight_transfer=ipc needs a policy rank on the GPU of every engine, which "
                f"placement.mode={self.placement.mode} does not give: set placement.mode=colocated, or "
                "rollout.weight_transfer=broadcast"
            )
        return self

    @model_validator(mode="after")
    def _shares_gpus(self) -> PPOConfig:
        """Roles that share GPUs take one each, and go to one type of nodes."""
        mode, types = self.placement.mode, self.placement.node_types
        for first, *others in self.placement.shares(list(self.roles)):
            for role in (first, *others) if others else ():
                gpus = self.roles[role].gpus_per_actor
                if gpus > 1:
                    raise ValueError(
                        f"{role}.gpus_per_actor={gpus:g} with placement.mode={mode}: roles that share GPUs take one "
                        "for each actor; set it to 1, or placement.mode=split"
                    )
                kind, leader = role.split(".")[0], first.split(".")[0]
                where = self.placement.node_type(leader, labelled=True)
                if kind in types and self.placement.node_type(kind, labelled=True) != where:
                    raise ValueError(
                        f"placement.node_types.{kind}={types[kind]} with placement.mode={mode}: it shares the nodes of "
                        f"{leader}, which go to {where or 'any'}; set placement.node_types.{leader} alone"
                    )
        return self

    @model_validator(mode="after")
    def _takes_turns(self) -> PPOConfig:
        """Colocated: sampling and learning have the GPUs one after the other."""
        if self.placement.mode != "colocated":
            return self
        if self.max_policy_lag:
            raise ValueError(
                f"placement.mode=colocated with max_policy_lag={self.max_policy_lag}: engines that share their GPUs "
                "with the learners cannot sample while these learn; set max_policy_lag=0, or placement.mode=split"
            )
        for role in self.learner_ranks:
            learner: LearnerConfig = getattr(self, role).learner
            if learner.zero_stage not in (1, 2) and not learner.offload_optimizer:
                raise ValueError(
                    f"placement.mode=colocated with {role}.learner.zero_stage={learner.zero_stage}: optimizer states "
                    "move out between phases, which needs zero_stage 1 or 2; set one of these, or, with zero_stage=3, "
                    f"{role}.learner.offload_optimizer=true, which keeps them out for good"
                )
        if self.rollout.weight_transfer == "broadcast":
            raise ValueError(
                "placement.mode=colocated with rollout.weight_transfer=broadcast: NCCL takes one process a GPU, and "
                "policy and engine share it; set rollout.weight_transfer=ipc or memory"
            )
        if self.rollout.engine.get("enable_sleep_mode", True) is not True:
            raise ValueError("rollout.engine.enable_sleep_mode=false with placement.mode=colocated: leave it out")
        return self

    @model_validator(mode="after")
    def _has_rewards(self) -> PPOConfig:
        for name, source in self.reward.by_name.items():
            if source.kind == "model" and source.model is None and not self.reward_models:
                where = f"reward.sources.{name}" if self.reward.sources else "reward"
                raise ValueError(
                    f"reward_model: required but not given, {where} needs one (with reward.source=gold none is needed)"
                )
        if self.reward.has("process"):
            if self.algorithm.advantage_kind.needs_groups or self.algorithm.advantage_kind.needs_greedy_baseline:
                raise ValueError(
                    f"algorithm.advantage={self.algorithm.advantage} knows one score a response; a source of "
                    "kind process, in reward.sources, scores its steps: use gae or reinforce_pp"
                )
            if self.shaping.resample_rounds:
                raise ValueError(
                    f"shaping.resample_rounds={self.shaping.resample_rounds} compares whole responses; a source of "
                    "kind process, in reward.sources, scores their steps: set 0"
                )
        return self

    @model_validator(mode="after")
    def _fits_its_environment(self) -> PPOConfig:
        if self.prompts is None and self.environment.name is None:
            raise ValueError("prompts: required but not given. " + PROMPTS_HELP)
        if self.reward.has("environment") and self.environment.name is None:
            raise ValueError("reward.source=environment: no environment.name given")
        if self.environment.name is not None and self.algorithm.advantage_kind.needs_greedy_baseline:
            raise ValueError(
                f"algorithm.advantage={self.algorithm.advantage} compares with one greedy response; an environment "
                "has whole conversations: use another one"
            )
        if self.environment.name is not None and self.rollout.ignore_stop:
            raise ValueError(
                "rollout.ignore_stop=true: a turn that does not end leaves the environment nothing to answer; set false"
            )
        if self.environment.name is not None and self.shaping.normalize != "none":
            raise ValueError(
                f"shaping.normalize={self.shaping.normalize} would move the scale of an environment's turns; set none"
            )
        return self

    @model_validator(mode="after")
    def _fits_its_sampling(self) -> PPOConfig:
        if self.rollout.cut_tail and not self.max_policy_lag:
            raise ValueError("rollout.cut_tail=true carries responses over to later steps: set max_policy_lag above 0")
        groups = {
            f"algorithm.advantage={self.algorithm.advantage}": self.algorithm.advantage_kind.needs_groups,
            "shaping.normalize=group": self.shaping.normalize == "group",
            "shaping.resample_rounds": self.shaping.resample_rounds > 0,
        }
        for setting, on in groups.items():
            if on and self.samples_per_prompt < 2:
                raise ValueError(
                    f"{setting} compares the responses to one prompt, samples_per_prompt is 1; set it to 2 or more"
                )
        if self.shaping.normalize == "group" and self.algorithm.advantage_kind.needs_greedy_baseline:
            raise ValueError(
                f"shaping.normalize=group takes away the mean of a prompt's responses, and with it what "
                f"algorithm.advantage={self.algorithm.advantage} compares them with: set none"
            )
        return self

    @model_validator(mode="after")
    def _stays_near_its_reference(self) -> PPOConfig:
        if self.algorithm.kl_coef and self.algorithm.kl_in == "loss" and self.algorithm.kl_estimator == "k1":
            raise ValueError(
                "algorithm.kl_in=loss with algorithm.kl_estimator=k1: on average k1 has no gradient, and nothing would "
                "hold the policy near the reference; set k3 (GRPO) or k2"
            )
        if self.reference.update_every is not None and self.policy.learner.lora.rank is not None:
            raise ValueError(
                f"reference.update_every={self.reference.update_every} with policy.learner.lora.rank="
                f"{self.policy.learner.lora.rank}: the reference is the policy without its adapters, which stays as it "
                "is; set reference.update_every=null"
            )
        without_reference = {
            "algorithm.kl_target": self.algorithm.kl_target, "reference.update_every": self.reference.update_every
        }  # fmt: skip
        for setting, value in without_reference.items():
            if value is not None and not self.algorithm.kl_coef:
                raise ValueError(f"{setting}={value} needs a reference: set algorithm.kl_coef above 0")
        return self

    @model_validator(mode="after")
    def _text_divides(self) -> PPOConfig:
        if self.ptx.documents is not None and self.ptx.batch_size % self.policy.num_actors:
            raise ValueError(
                f"ptx.batch_size={self.ptx.batch_size} does not divide over policy.num_actors={self.policy.num_actors}"
            )
        return self
