"""The actor groups of an RL run: which of them a config needs, how they start, and what they do as one."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.critic import CriticActor
from actors.fleet import Dispatcher, engine_dtype, probe_tokens, probe_tolerance, rollout_role, start_rollout_actors
from actors.group import ActorGroup, Role, collect
from actors.policy import PolicyActor
from actors.reference import ReferenceActor
from actors.rollout import RolloutActor
from jobs.ppo_rewards import RewardGroups, ShardScores
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
    seconds: dict[str, float] = field(default_factory=dict)
    """What the start took: role -> seconds until it was ready, and of the rollout's the parts that are vLLM's."""

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
        """Start all roles side by side; returns when all are ready."""
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
        setups = roles.reward.setup()
        setups["rollout"] = roles.rollout.submit(
            RolloutActor.set_prompts,
            ray.put(prompts.token_ids if config.environment.name is None else prompts.rows),
            num_samples=config.samples_per_prompt,
            temperature=config.rollout.temperature,
            max_new_tokens=config.rollout.max_new_tokens,
        )
        for group, method in ((roles.policy, PolicyActor.setup), (roles.critic, CriticActor.setup)):
            if group is not None:
                setups[group.role.name] = group.submit(method, group.submit(PolicyActor.address, rank=0)[0])
        roles.seconds.update(_seconds_until_done(setups))
        (info,) = collect(roles.rollout.submit(RolloutActor.info, rank=0), "rollout")
        roles.seconds.update(vllm_import=info["import_seconds"], vllm_engine=info["init_seconds"])
        return roles

    def logprobs(self, shards: list[Any]) -> list[Any]:
        """Of every shard under the policy before this step's updates. None each where one update makes the step: its
        own forward pass gives them."""
        if self.config.algorithm.updates_per_step == 1:
            return [None] * len(shards)
        return self.policy.map(PolicyActor.logprobs, shards)

    def ref_logprobs(self, shards: list[Any]) -> list[Any]:
        """Of every shard under the reference; None each without one."""
        if self.reference is not None:
            return self.reference.map(ReferenceActor.logprobs, shards)
        if self.config.algorithm.kl_coef:
            return self.policy.map(PolicyActor.ref_logprobs, shards)
        return [None] * len(shards)

    def values(self, shards: list[Any]) -> list[Any]:
        """Of every shard by the critic; None each without one."""
        return [None] * len(shards) if self.critic is None else self.critic.map(CriticActor.values, shards)

    def greedy(self, shards: list[Any], step: int) -> tuple[list[Any], list[ShardScores]] | None:
        """The greedy response to every row's prompt and its scores (ReMax); None where nobody asks for it."""
        if not self.config.algorithm.estimator.needs_greedy_baseline:
            return None
        greedy = self.rollout.map(RolloutActor.greedy, shards, step=step)
        return greedy, self.reward.score(greedy)

    def update(self, experience: list[Any], *, step: int, kl_coef: float) -> dict[str, float]:
        """Policy and critic learn side by side; returns their metrics."""
        policy = self.policy.submit(PolicyActor.update, *experience, step=step, kl_coef=kl_coef)
        critic = []
        if self.critic is not None:
            critic = self.critic.submit(CriticActor.update, *experience, step=step)
        metrics: dict[str, float] = collect(policy, "policy")[0]
        return metrics | (collect(critic, "critic")[0] if critic else {})

    def sync_weights(self, *, version: int) -> None:
        """The policy's weights to every rollout actor; their reference travels, not the weights. Each proves that they
        serve: a text must be as probable to it as to the policy."""
        dtype = engine_dtype(self.config.rollout)
        tolerance = probe_tolerance(dtype, self.config.policy.learner.dtype)
        published = self.policy.submit(PolicyActor.publish_weights, version, dtype=dtype)
        probed = self.policy.submit(PolicyActor.text_logprobs, self.probe)
        served = self.rollout.call(
            RolloutActor.sync,
            collect(published, "policy")[0],
            probe=self.probe,
            keep_cache=self.config.rollout.keep_cache,
        )
        expected = np.array(collect(probed, "policy")[0])
        for rank, (found, logprobs) in enumerate(served):
            apart = float(np.abs(expected - logprobs).mean())
            if found != version or not apart <= tolerance:
                raise RuntimeError(
                    f"rollout actor {rank} does not serve the policy's weights after the sync of version {version}: it "
                    f"serves version {found}, and its log-probabilities of the same text differ by {apart:.3g} nats a "
                    f"token, {tolerance:g} is possible; policy "
                    f"{np.round(expected[:4], 3).tolist()} ..., rollout actor {np.round(logprobs[:4], 3).tolist()} ..."
                )

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
        """Write the model folders."""
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

