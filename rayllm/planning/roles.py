"""From a job's config to what has to be placed: its roles, their processes and what the largest pass of each holds."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from rayllm.config.common import LearnerConfig
from rayllm.config.plan import WorkloadConfig
from rayllm.config.ppo import PPOConfig
from rayllm.config.pretrain import PretrainConfig
from rayllm.config.reward_model import RewardModelConfig
from rayllm.config.rl import LearnerActorsConfig
from rayllm.config.sft import SftConfig
from rayllm.errors import InputError
from rayllm.planning.memory import CPU_RUNTIME, Memory, engine_memory, frozen_memory, learner_memory
from rayllm.planning.roofline import Machine
from rayllm.planning.shapes import ModelShape, find_shape, from_config

Job = PPOConfig | SftConfig | PretrainConfig | RewardModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleSpec:
    """One role of a run: identical processes."""

    name: str
    section: str
    """The part of the job's config that is about it: ``policy``, or ``workers`` of a training job."""

    kind: str
    """`learner`, `frozen`, `engine` or `plain` (no model)."""

    shape: ModelShape | None
    num_actors: int
    cpus: float
    gpus: float
    rows: int = 0
    """Of the largest pass."""

    tokens: int = 0
    """Of its rows, padding included."""

    by_tokens: bool = False
    """Micro-batches are cut by tokens and not by rows."""

    learner: LearnerConfig | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    sequences: int = 0
    """That an engine has to sample in a step."""

    share: tuple[str, ...] = ()
    """The roles that have the same GPUs, itself among them; empty: it has its own."""

    takes_turns: bool = False
    """Of a share: engines sleep while learners update, and optimizer states are in the host's memory while they do
    not."""

    def memory(self, machine: Machine) -> Memory:
        """Of one of its processes."""
        on_gpu = self.gpus > 0
        if self.kind == "plain" or self.shape is None:
            return Memory(weights=0.0, runtime=CPU_RUNTIME["plain"], moment="always")
        if self.kind == "engine":
            gpu_memory = machine.gpu.memory if on_gpu and machine.gpu else None
            return engine_memory(
                self.shape, self.engine, sequences=self.sequences, tokens=self.tokens, gpu_memory=gpu_memory
            )
        if self.kind == "frozen":
            return frozen_memory(self.shape, rows=self.rows, tokens=self.tokens, on_gpu=on_gpu)
        assert self.learner is not None
        found = learner_memory(
            self.shape, self.learner, ranks=self.num_actors, rows=self.rows, tokens=self.tokens, on_gpu=on_gpu
        )
        moved = found.optimizer if self.takes_turns and on_gpu else 0.0
        return replace(found, host=found.host + moved)

    @property
    def split(self) -> int:
        """GPUs over which one engine's model is split."""
        return int(self.engine.get("tensor_parallel_size", 1)) if self.kind == "engine" else 1


def roles_of(config: Job, workload: WorkloadConfig) -> list[RoleSpec]:
    """The roles of a run. Raises InputError for a model that is not known, or too short for the workload."""
    if isinstance(config, PPOConfig):
        return _ppo_roles(config, workload)
    return [_training_role(config, workload)]


def _ppo_roles(config: PPOConfig, workload: WorkloadConfig) -> list[RoleSpec]:
    shape = find_shape(config.model)
    longest = (workload.longest_prompt_tokens or workload.prompt_tokens) + config.rollout.max_new_tokens
    limit = int(config.rollout.engine.get("max_model_len", shape.max_positions))
    if longest > limit:
        raise InputError(
            f"workload: a prompt of {longest - config.rollout.max_new_tokens} tokens and "
            f"rollout.max_new_tokens={config.rollout.max_new_tokens} are {longest}; the engine takes {limit} "
            "(rollout.engine.max_model_len, or the model's own)"
        )
    roles = [_learner("policy", config.policy, shape, config, longest)]
    if "critic" in config.roles:
        critic = find_shape(config.critic_start, key="critic.model").with_scalar_head()
        roles.append(_learner("critic", config.critic, critic, config, longest))
    shard = config.prompts_per_step * config.samples_per_prompt // config.num_shards
    if "reference" in config.roles:
        reference = config.reference
        rows = min(reference.micro_batch_size, shard)
        roles.append(_actors("reference", "frozen", reference, shape=shape, rows=rows, tokens=longest))
    if config.reward.sources or len(config.reward_models) > 1:
        raise InputError("reward: a plan knows one source of rewards with one model; plan the run with one of them")
    (source,) = config.reward.by_name.values()
    if source.kind == "model":
        scorer = find_shape(config.reward_models[0], key="reward_model").with_scalar_head()
        rows = min(source.micro_batch_size, shard)
        roles.append(_actors("reward", "frozen", source, shape=scorer, rows=rows, tokens=longest))
    else:
        roles.append(_actors("reward", "plain", source))
    sequences = -(-config.prompts_per_step * config.samples_per_prompt // config.rollout.num_actors)
    roles.append(
        _actors(
            "rollout", "engine", config.rollout, shape=shape, tokens=longest, engine=config.engine, sequences=sequences
        )
    )
    shares = {name: tuple(names) for names in config.placement.shares(list(config.roles)) for name in names}
    in_turns = config.placement.mode == "colocated"
    return [
        replace(role, share=shares[role.name], takes_turns=in_turns) if len(shares[role.name]) > 1 else role
        for role in roles
    ]


def _actors(name: str, kind: str, section: Any, *, shape: ModelShape | None = None, **more: Any) -> RoleSpec:
    return RoleSpec(
        name=name, section=name, kind=kind, shape=shape, num_actors=section.num_actors,
        cpus=section.cpus_per_actor, gpus=section.gpus_per_actor, **more,
    )  # fmt: skip


def _learner(name: str, section: LearnerActorsConfig, shape: ModelShape, config: PPOConfig, longest: int) -> RoleSpec:
    on_rank = config.prompts_per_step * config.samples_per_prompt // section.num_actors
    shard = config.prompts_per_step * config.samples_per_prompt // config.num_shards
    most = max(-(-on_rank // config.algorithm.num_minibatches), shard)
    rows = min(section.micro_batch_size, most)
    if section.micro_batch_tokens is not None:
        rows = min(max(1, section.micro_batch_tokens // longest), most)
    return _actors(
        name, "learner", section, shape=shape, rows=rows, tokens=longest, learner=section.learner,
        by_tokens=section.micro_batch_tokens is not None,
    )  # fmt: skip


def _training_role(config: SftConfig | PretrainConfig | RewardModelConfig, workload: WorkloadConfig) -> RoleSpec:
    workers = config.workers
    rows = config.batch_size // workers.num_workers
    if isinstance(config, PretrainConfig):
        shape, tokens = _pretrain_shape(config), config.sequence_length
    else:
        shape, tokens = find_shape(config.model), config.max_length
    size = config.micro_batch_size
    if isinstance(config, RewardModelConfig):
        shape = shape.with_scalar_head()
        rows *= workload.responses_per_prompt  # all responses to a prompt are in one micro-batch
        size = max(1, size // workload.responses_per_prompt) * workload.responses_per_prompt
    return RoleSpec(
        name="worker", section="workers", kind="learner", shape=shape, num_actors=workers.num_workers,
        cpus=workers.cpus_per_worker, gpus=workers.gpus_per_worker, rows=min(size, rows), tokens=tokens,
        learner=config.learner,
    )  # fmt: skip


def _pretrain_shape(config: PretrainConfig) -> ModelShape:
    """Of the decoder that is to be made; the vocabulary is the tokenizer's, or that of a known model."""
    file = config.tokenizer / "tokenizer.json"
    if file.is_file():
        tree = json.loads(file.read_text())
        added = [token["id"] for token in tree.get("added_tokens", ())]
        vocab = max([*tree["model"]["vocab"].values(), *added]) + 1
    else:
        vocab = find_shape(config.tokenizer, key="tokenizer").vocab
    tree = {**config.model.shape(), "model_type": config.model.architecture, "vocab_size": vocab}
    return from_config(tree, name="new model", key="model.architecture")
