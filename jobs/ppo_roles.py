"""The actor groups of an RL run: which of them a config needs, how they start, and what they do as one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from actors.critic import CriticActor
from actors.fleet import (
    RolloutFleet,
    engine_dtype,
    engine_workers,
    logprob_tolerance,
    probe_tokens,
    start_rollout_fleet,
)
from actors.group import ActorGroup, Role, Seats, collect
from actors.learner import LearnerActor
from actors.member import Call
from actors.placement import LEARNERS, Placed, Placement
from actors.policy import PolicyActor
from actors.proof import Proof
from actors.publishing import Seat, Sent
from actors.reference import ReferenceActor
from actors.reward_source import SourceActor
from actors.rollout import RolloutActor
from actors.watchman import WatchedGroup, start_watchman
from jobs.ppo_rewards import RewardGroups
from rayllm.checkpoints import Files
from rayllm.config.ppo import PPOConfig
from rayllm.data.prompts import PromptData
from rayllm.data.scores import Mix
from rayllm.models.folders import max_positions, vocabulary_size
from rayllm.models.partial import plan_trained
from rayllm.report.run import Run


@dataclass(frozen=True)
class Roles:
    """``critic`` and ``reference`` are None in a run that has no use for them."""

    config: PPOConfig
    policy: WatchedGroup[PolicyActor]
    critic: WatchedGroup[CriticActor] | None
    reference: WatchedGroup[ReferenceActor] | None
    reward: RewardGroups
    rollout: RolloutFleet
    probe: list[int]
    setups: dict[str, list[Any]] = field(default_factory=dict)
    """Role -> the calls that make it ready."""

    @staticmethod
    def needs(config: PPOConfig) -> list[Role]:
        """Resources of every role of the run."""
        return [Role(name, s.num_actors, s.cpus_per_actor, s.gpus_per_actor) for name, s in config.roles.items()]

    @classmethod
    def start(cls, config: PPOConfig, prompts: PromptData, placement: Placement, *, ptx_tokens: Path) -> Roles:
        """Start all roles side by side in what ``placement`` holds for them; `wait` until they are ready.

        Engines that share their GPUs start alone: vLLM measures what is free. Then they sleep while the others start.
        """
        needed = {role.name: role for role in cls.needs(config)}
        learner = {"config": config, "ptx_tokens": ptx_tokens.absolute() if config.ptx.documents else None}
        rollout = _start_engines(config, prompts, placement.seats(needed["rollout"]))
        if config.placement.mode == "colocated":
            rollout.call(RolloutActor.sleep, keep_weights=True)
        watching = start_watchman(config.recovery.stall_s)

        def ranks(name: str, actor: type, arguments: Callable[[int], dict[str, Any]]) -> Any:
            """None in a run without the role."""
            role = needed.get(name)
            return role and WatchedGroup(role, actor, arguments, placement.seats(role), watching=watching)

        scoring = {
            "model": str(config.model),
            "temperature": config.rollout.temperature,
            "micro_batch_size": config.reference.micro_batch_size,
        }
        roles = cls(
            config=config,
            rollout=rollout,
            probe=probe_tokens(vocabulary_size(config.model), max_positions(config.model)),
            policy=ranks(
                "policy", PolicyActor, lambda rank: {"rank": rank, "world_size": config.policy.num_actors, **learner}
            ),
            critic=ranks(
                "critic",
                CriticActor,
                lambda rank: {"rank": rank, "world_size": config.critic.num_actors, "config": config},
            ),
            reference=ranks("reference", ReferenceActor, lambda rank: scoring),
            reward=RewardGroups.start(config, prompts, placement, watching),
        )
        roles.setups["rollout"] = [roles.rollout.started()]
        roles.setups.update({name: setup(group) for name, group in roles.models.items()})
        return roles

    def wait(self) -> dict[str, float]:
        """Until all are ready.

        Returns:
            What the start took: role -> seconds until it was ready, and of these what vLLM and DeepSpeed took.
        """
        seconds = _seconds_until_done(self.setups)
        if self.takes_turns:
            self.rollout.call(RolloutActor.wake)
        infos = self.rollout.call(RolloutActor.info)
        self._join_engines()
        self.rollout.grow()  # not before: what others need to start is not for more engines
        return seconds | {
            "vllm_import": infos[0]["import_seconds"],
            "vllm_engine": infos[0]["init_seconds"],
            "deepspeed": collect(self.setups["policy"], "policy")[0],
        }

    @property
    def groups(self) -> list[Placed]:
        """All of them."""
        return [*self.models.values(), self.rollout]

    @property
    def models(self) -> dict[str, WatchedGroup[Any]]:
        """Role -> group, of all but the engines."""
        groups = [self.policy, self.critic, self.reference, *self.reward.groups.values()]
        return {group.role.name: group for group in groups if group is not None}

    @property
    def takes_turns(self) -> bool:
        """Whether engines and learners have the same GPUs, one after the other."""
        return self.config.placement.mode == "colocated"

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
        count = self.config.rollout.num_actors
        engines = [[rank] for rank in range(count)] if kind == "ipc" else [list(range(count))]
        joining: list[Any] = []
        seats: list[tuple[Seat]] = []
        for rank, members in enumerate(engines):
            ((host, port),) = collect(self.policy.submit(PolicyActor.address, rank=rank), "policy")
            seat = Seat(host, port, 0, 1 + len(members) * workers, kind)
            joining += self.policy.submit(PolicyActor.join_engines, seat, rank=rank)
            seats += [(seat.moved(1 + place * workers),) for place in range(len(members))]
        self.rollout.call(RolloutActor.join, seats)
        collect(joining, "policy")

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

    def experience(self, shards: list[Any], *given: Any, mix: Mix, kl_coef: float) -> list[Any]:
        """Of every shard with what was found of it: `PolicyActor.experience`."""
        return self.policy.map(PolicyActor.experience, shards, *given, mix=mix, kl_coef=kl_coef)

    def greedy(self, shards: list[Any], step: int) -> list[Any]:
        """Columns of the greedy response to every row's prompt and of what each source gives it (ReMax); none where
        nobody asks for them."""
        if not self.config.algorithm.advantage_kind.needs_greedy_baseline:
            return []
        rows = self.config.prompts_per_step // len(shards) * self.config.samples_per_prompt
        tokens = [rows * self.config.rollout.max_new_tokens] * len(shards)
        greedy = self.rollout.submit(RolloutActor.greedy, shards, tokens=tokens, step=step)
        return [greedy, *zip(*self.reward.score(greedy), strict=True)]

    def sleep_engines(self) -> None:
        """Colocated: the engines leave their GPUs to the learners, until new weights wake them (`sync_weights`)."""
        if self.takes_turns:
            self.rollout.call(RolloutActor.sleep)

    def update(self, experience: list[Any], *, step: int, kl_coef: float) -> dict[str, float]:
        """Policy and critic learn side by side, colocated one after the other; returns their metrics."""
        policy = self.policy.submit(PolicyActor.update, *experience, step=step, kl_coef=kl_coef)
        if self.takes_turns:
            collect(policy, "policy")
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
            readers = self.rollout.readers()
            sending = self.policy.submit(PolicyActor.publish_weights, version, dtype=dtype, nodes=readers)
            weights = sending[0]
        else:
            sending, weights = self.policy.submit(PolicyActor.send_weights, dtype=dtype), Sent(version)
        # Not beside the loading, which uses two cores; while they prove it they sample already.
        expected = self.policy.submit(PolicyActor.text_logprobs, self.probe, self.rollout.synced())[0]
        loading = self.rollout.begin_sync(
            RolloutActor.sync,
            weights,
            probe=self.probe,
            keep_cache=self.config.rollout.keep_cache,
            proof=Proof(version, [expected], self.logprob_tolerance),
        )
        collect(sending, "policy")
        self.rollout.end_sync(loading)

    def move_reference(self, step: int) -> None:
        """Every ``reference.update_every`` steps the reference moves towards the policy. What the engines may read is
        written over: they want the next `sync_weights`."""
        every = self.config.reference.update_every
        if self.reference is not None and every is not None and step % every == 0:
            collect([self.rollout.readers()], "rollout")
            weights = self.policy.call(PolicyActor.publish_weights, step)[0]
            self.reference.call(ReferenceActor.move, weights, ema=self.config.reference.ema)

    def checkpoint_bytes(self) -> int:
        """Of a checkpoint, about."""
        sizes = self.policy.submit(LearnerActor.checkpoint_bytes, rank=0)
        if self.critic is not None:
            sizes += self.critic.submit(LearnerActor.checkpoint_bytes, rank=0)
        return sum(collect(sizes, "checkpoint"))

    def save(self, folder: Path) -> Files:
        """A checkpoint of everything that changes in a run; returns what was written, as far as its writers told.

        Raises:
            OSError: a rank could not write its part.
        """
        saves = self.policy.submit(PolicyActor.save, str(folder / "policy"))
        if self.critic is not None:
            saves += self.critic.submit(CriticActor.save, str(folder / "critic"))
        if self.reference is not None and self.config.reference.update_every is not None:
            saves += self.reference.submit(ReferenceActor.save, str(folder / "reference"), rank=0)
        ray.wait(saves, num_returns=len(saves))  # none still writes when one has failed
        files: Files = {}
        try:
            for written in collect(saves, "checkpoint"):
                files.update(written or {})
        except RuntimeError as error:
            cause = getattr(error.__cause__, "cause", None)
            if isinstance(cause, OSError):
                raise cause from error
            raise
        return files

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint, also with learners that have learned since. The engines then want its weights
        (`sync_weights`)."""
        self.sleep_engines()
        loads = self.policy.submit(PolicyActor.load, str(folder / "policy"))
        if self.critic is not None:
            loads += self.critic.submit(CriticActor.load, str(folder / "critic"))
        if self.reference is not None and self.config.reference.update_every is not None:
            loads += self.reference.submit(ReferenceActor.load, str(folder / "reference"))
        collect(loads, "checkpoint")

    def export(self, job: Run) -> None:
        """Write the model folders, once the last sync is proved."""
        self.rollout.prove()
        self.policy.call(PolicyActor.export, str(job.model_dir.absolute()))
        if self.critic is not None:
            self.critic.call(CriticActor.export, str((job.dir / "critic").absolute()))


def trained_parameters(config: PPOConfig) -> dict[str, tuple[int, int] | None]:
    """Learner -> what `plan_trained` says of it."""
    trained = {"policy": plan_trained(config.model, config.policy.learner)}
    if "critic" in config.learner_ranks:
        trained["critic"] = plan_trained(config.critic_start, config.critic.learner, scalar=True)
    return trained


def setup(group: ActorGroup[Any]) -> list[Any]:
    """Make the actors of a group ready; returns references that are done by then. A reference is, as it starts."""
    if group.role.name in LEARNERS:
        return group.submit(PolicyActor.setup, group.submit(PolicyActor.address, rank=0)[0])
    return [] if group.role.name == "reference" else group.submit(SourceActor.setup)


def _start_engines(config: PPOConfig, prompts: PromptData, seats: Seats) -> RolloutFleet:
    """Each with the prompts, so that a step is asked for by numbers only."""
    kept = ray.put(prompts.token_ids if config.environment.name is None else prompts.rows)
    sampling = {
        "num_samples": config.samples_per_prompt,
        "temperature": config.rollout.temperature,
        "max_new_tokens": config.rollout.max_new_tokens,
    }
    return start_rollout_fleet(
        config.rollout.model_copy(update={"engine": config.engine}),
        config.model,
        seed=config.seed,
        environment=config.environment,
        fleet=config.rollout,
        fixed=config.rollout.weight_transfer != "memory" or config.placement.mode == "colocated",
        wait_s=config.placement.wait_s,
        setup=[Call(RolloutActor.set_prompts.__name__, (kept,), sampling)],
        seats=seats,
    )


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

