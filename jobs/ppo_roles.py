"""The actor groups of an RL run: which of them a config needs, how they start, and what they do as one."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from actors.critic import CriticActor
from actors.fleet import (
    Dispatcher,
    engine_dtype,
    engine_workers,
    logprob_tolerance,
    probe_tokens,
    rollout_role,
    start_rollout_actors,
)
from actors.group import ActorGroup, Role, collect
from actors.policy import PolicyActor
from actors.reference import ReferenceActor
from actors.rollout import RolloutActor, Sent
from actors.weight_group import Seat
from jobs.ppo_rewards import RewardGroups
from rayllm.config.ppo import PPOConfig
from rayllm.data.prompts import PromptData
from rayllm.models.loading import max_positions, vocabulary_size
from rayllm.report.run import Run


@dataclass(frozen=True)
class Roles:
    """``critic`` and ``reference`` are None in a run that has no use for them."""

    config: PPOConfig
    policy: ActorGroup[PolicyActor]
    critic: ActorGroup[CriticActor] | None
    reference: ActorGroup[ReferenceActor] | None
    reward: RewardGroups
    rollout: ActorGroup[RolloutActor]
    dispatcher: Dispatcher
    probe: list[int]
    rollout_nodes: set[str] = field(default_factory=set)
    """Where the rollout actors live."""

    setups: dict[str, list[Any]] = field(default_factory=dict)
    """Role -> the calls that make it ready."""

    @staticmethod
    def needs(config: PPOConfig) -> list[Role]:
        """Resources of every role of the run."""
        names = ["policy"]
        names += ["critic"] if needs_critic(config) else []
        names += ["reference"] if needs_reference(config) else []
        sections = {name: getattr(config, name) for name in names}
        roles = [Role(name, s.num_actors, s.cpus_per_actor, s.gpus_per_actor) for name, s in sections.items()]
        return [*roles, *RewardGroups.needs(config), rollout_role(config.rollout)]

    @classmethod
    def start(cls, config: PPOConfig, prompts: PromptData, *, ptx_tokens: Path) -> Roles:
        """Start all roles side by side; `wait` until they are ready."""
        needed = {role.name: role for role in cls.needs(config)}
        learner = {"config": config, "ptx_tokens": ptx_tokens.absolute() if config.ptx.documents else None}
        rollout = start_rollout_actors(
            config.rollout, config.model, seed=config.seed, environment=config.environment
        )
        roles = cls(
            config=config,
            rollout=rollout,
            dispatcher=Dispatcher(rollout),
            probe=probe_tokens(vocabulary_size(config.model), max_positions(config.model)),
            policy=ActorGroup(
                needed["policy"],
                PolicyActor,
                lambda rank: {"rank": rank, "world_size": config.policy.num_actors, **learner},
            ),
            critic=None
            if "critic" not in needed
            else ActorGroup(
                needed["critic"],
                CriticActor,
                lambda rank: {"rank": rank, "world_size": config.critic.num_actors, "config": config},
            ),
            reference=None
            if "reference" not in needed
            else ActorGroup(
                needed["reference"],
                ReferenceActor,
                lambda rank: {
                    "model": str(config.model),
                    "temperature": config.rollout.temperature,
                    "micro_batch_size": config.reference.micro_batch_size,
                },
            ),
            reward=RewardGroups.start(config, prompts),
        )
        roles.setups.update(roles.reward.setup())
        roles.setups["rollout"] = roles.rollout.submit(
            RolloutActor.set_prompts,
            ray.put(prompts.token_ids if config.environment.name is None else prompts.rows),
            num_samples=config.samples_per_prompt,
            temperature=config.rollout.temperature,
            max_new_tokens=config.rollout.max_new_tokens,
        )
        for group, method in ((roles.policy, PolicyActor.setup), (roles.critic, CriticActor.setup)):
            if group is not None:
                roles.setups[group.role.name] = group.submit(method, group.submit(PolicyActor.address, rank=0)[0])
        return roles

    def wait(self) -> dict[str, float]:
        """Until all are ready.

        Returns:
            What the start took: role -> seconds until it was ready, and of these what vLLM and DeepSpeed took.
        """
        seconds = _seconds_until_done(self.setups)
        infos = self.rollout.call(RolloutActor.info)
        self.rollout_nodes.update(info["node"] for info in infos)
        self._join_engines()
        return seconds | {
            "vllm_import": infos[0]["import_seconds"],
            "vllm_engine": infos[0]["init_seconds"],
            "deepspeed": collect(self.setups["policy"], "policy")[0],
        }

    @property
    def logprob_tolerance(self) -> float:
        """Nats a token by which sampler and learner may differ."""
        dtypes = engine_dtype(self.config.rollout), self.config.policy.learner.dtype
        return logprob_tolerance(self.config.max_logprob_mismatch, *dtypes)

    def _join_engines(self) -> None:
        """Where weights do not go through memory: rank 0 and all engines in one group, or each rank with its engine."""
        kind = self.config.rollout.weight_transfer
        if kind == "memory":
            return
        workers = engine_workers(self.config.rollout)
        engines = [[rank] for rank in range(len(self.rollout))] if kind == "ipc" else [list(range(len(self.rollout)))]
        joining: list[Any] = []
        for rank, members in enumerate(engines):
            ((host, port),) = collect(self.policy.submit(PolicyActor.address, rank=rank), "policy")
            seat = Seat(host, port, 0, 1 + len(members) * workers, kind)
            joining += self.policy.submit(PolicyActor.join_engines, seat, rank=rank)
            for place, engine in enumerate(members):
                joining += self.rollout.submit(RolloutActor.join, seat.moved(1 + place * workers), rank=engine)
        collect(joining, "rollout")

    def logprobs(self, shards: list[Any]) -> list[Any]:
        """Of every shard under the policy before this step's updates. None each where one update makes the step: its
        own forward pass gives them."""
        if self.config.algorithm.updates_per_step == 1:
            return [None] * len(shards)
        return self.policy.map_pieces(PolicyActor.logprobs, shards)

    def ref_logprobs(self, shards: list[Any]) -> list[Any]:
        """Of every shard under the reference; None each without one."""
        if self.reference is not None:
            return self.reference.map_pieces(ReferenceActor.logprobs, shards)
        if self.config.algorithm.kl_coef:
            return self.policy.map_pieces(PolicyActor.ref_logprobs, shards)
        return [None] * len(shards)

    def values(self, shards: list[Any]) -> list[Any]:
        """Of every shard by the critic; None each without one."""
        return [None] * len(shards) if self.critic is None else self.critic.map_pieces(CriticActor.values, shards)

    def greedy_scores(self, shards: list[Any], step: int) -> list[Any]:
        """Columns of what each source gives the greedy response to every row's prompt (ReMax); none where nobody asks
        for it."""
        if not self.config.algorithm.estimator.needs_greedy_baseline:
            return []
        return list(zip(*self.reward.score(self.rollout.map(RolloutActor.greedy, shards, step=step)), strict=True))

    def update(self, experience: list[Any], *, step: int, kl_coef: float) -> dict[str, float]:
        """Policy and critic learn side by side; returns their metrics."""
        policy = self.policy.submit(PolicyActor.update, *experience, step=step, kl_coef=kl_coef)
        critic = []
        if self.critic is not None:
            critic = self.critic.submit(CriticActor.update, *experience, step=step)
        metrics: dict[str, float] = collect(policy, "policy")[0]
        return metrics | (collect(critic, "critic")[0] if critic else {})

    def sync_weights(self, *, version: int) -> None:
        """What the policy learned to every rollout actor; where it lies travels, not the weights. Each proves that it
        serves them before it hands out what it samples: a text must be as probable to it as to the policy."""
        dtype = engine_dtype(self.config.rollout)
        weights: Any
        if self.config.rollout.weight_transfer == "memory":
            nodes = sorted(self.rollout_nodes)
            sending = self.policy.submit(PolicyActor.publish_weights, version, dtype=dtype, nodes=nodes)
            weights = sending[0]
        else:
            sending, weights = self.policy.submit(PolicyActor.send_weights, dtype=dtype), Sent(version)
        expected = self.policy.submit(PolicyActor.text_logprobs, self.probe)[0]
        loading = self.rollout.submit(
            RolloutActor.sync,
            weights,
            probe=self.probe,
            expected=[expected],
            tolerance=self.logprob_tolerance,
            keep_cache=self.config.rollout.keep_cache,
        )
        collect(sending, "policy")
        collect(loading, "rollout")

    def move_reference(self, step: int) -> None:
        """Every ``reference.update_every`` steps the reference moves towards the policy."""
        every = self.config.reference.update_every
        if self.reference is not None and every is not None and step % every == 0:
            weights = self.policy.call(PolicyActor.publish_weights, step)[0]
            self.reference.call(ReferenceActor.move, weights, ema=self.config.reference.ema)

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """A checkpoint of everything that changes in a run."""
        saves = self.policy.submit(PolicyActor.save, str(folder / "policy"), state)
        if self.critic is not None:
            saves += self.critic.submit(CriticActor.save, str(folder / "critic"), {})
        if self.reference is not None and self.config.reference.update_every is not None:
            saves += self.reference.submit(ReferenceActor.save, str(folder / "reference"), rank=0)
        collect(saves, "checkpoint")

    def load(self, folder: Path) -> dict[str, Any]:
        """Continue from a checkpoint; returns its state."""
        loads = self.policy.submit(PolicyActor.load, str(folder / "policy"))
        others = [] if self.critic is None else self.critic.submit(CriticActor.load, str(folder / "critic"))
        if self.reference is not None and self.config.reference.update_every is not None:
            others += self.reference.submit(ReferenceActor.load, str(folder / "reference"))
        state: dict[str, Any] = collect(loads, "checkpoint")[0]
        collect(others, "checkpoint")
        return state

    def export(self, job: Run) -> None:
        """Write the model folders, once the last sync is proved."""
        self.rollout.call(RolloutActor.proved)
        self.policy.call(PolicyActor.export, str(job.model_dir.absolute()))
        if self.critic is not None:
            self.critic.call(CriticActor.export, str((job.dir / "critic").absolute()))


def needs_critic(config: PPOConfig) -> bool:
    return config.algorithm.estimator.needs_critic


def needs_reference(config: PPOConfig) -> bool:
    """A model of its own: with LoRA the policy without its adapters is the reference."""
    return config.algorithm.kl_coef > 0 and config.policy.learner.lora.rank is None


def _seconds_until_done(calls: dict[str, list[Any]]) -> dict[str, float]:
    """Name -> seconds from now until its calls were done; a failure raises at once."""
    began = time.perf_counter()
    names = {reference: name for name, references in calls.items() for reference in references}
    seconds = {}
    pending = list(names)
    while pending:
        (reference,), pending = ray.wait(pending)
        collect([reference], names[reference])
        seconds[names[reference]] = time.perf_counter() - began
    return seconds

