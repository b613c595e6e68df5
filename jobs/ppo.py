"""RLHF with PPO. Policy, reference, reward model and critic live apart in Ray actors; vLLM actors generate.

The driver holds references and scalars only: a step's prompts are drawn, and its tokens sampled, scored and trained
on, in the actors. Who waits for whom is told by the references that one call hands to the next: scoring of a shard
starts when its responses are done, the updates when all of their shards are scored.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from rich.console import Console

from actors.critic import CriticActor
from actors.fleet import generate, rollout_role, start_rollout_actors
from actors.group import ActorGroup, Role, collect
from actors.placement import check_capacity, describe
from actors.policy import PolicyActor
from actors.reference import ReferenceActor
from actors.reward import RewardActor
from actors.rollout import RolloutActor
from jobs.judging import check_world_rows, judge_rollouts
from jobs.session import ray_session
from rayllm.config.base import Loaded
from rayllm.config.ppo import PPOConfig
from rayllm.data.batching import BatchOrder
from rayllm.data.files import check_data_file
from rayllm.data.prompts import PromptData, read_prompts
from rayllm.data.rollout import collate
from rayllm.errors import InputError
from rayllm.models.checkpoint import Checkpoints
from rayllm.models.loading import check_model_dir, count_stored_parameters, load_tokenizer, max_positions
from rayllm.models.partial import plan_trained
from rayllm.report.run import Run
from rayllm.report.terminal import Progress, print_done, print_preamble
from rayllm.world.summary import summarize


def train(roles: Roles, prompts: PromptShards, config: PPOConfig, watch: Watch, first_step: int) -> None:
    """The algorithm: Ouyang et al. 2022, section 3.5; Schulman et al. 2017, algorithm 1."""
    for step in range(first_step, config.num_steps):
        with watch.timed("time/step"):
            with watch.timed("time/rollout"):
                shards = roles.rollout.map(RolloutActor.experience, prompts.of(step), step=step)
                ref_logprobs = roles.reference.map(ReferenceActor.logprobs, shards)
                rewards = roles.reward.map(RewardActor.rewards, shards)
                values = roles.critic.map(CriticActor.values, shards)
                logprobs = roles.policy.map(PolicyActor.logprobs, shards)
                experience = roles.policy.map(
                    PolicyActor.experience, shards, rewards, logprobs, ref_logprobs, values
                )
                wait(shards)
            with watch.timed("time/score"):
                wait(experience)
            with watch.timed("time/update"):
                policy_update = roles.policy.submit(PolicyActor.update, *experience, step=step)
                critic_update = roles.critic.submit(CriticActor.update, *experience, step=step)
                metrics = collect(policy_update, "policy")[0] | collect(critic_update, "critic")[0]
            check_mismatch(metrics, config)
            with watch.timed("time/sync"):
                sync_weights(roles, version=step + 1)
        watch.after(step + 1, metrics)


def sync_weights(roles: Roles, *, version: int) -> None:
    """The policy's weights to every rollout actor; their reference travels, not the weights."""
    weights = roles.policy.call(PolicyActor.publish_weights, version)[0]
    served = roles.rollout.call(RolloutActor.update_weights, weights)
    if any(found != version for found in served):
        raise RuntimeError(f"rollout actors serve policy versions {served} after the sync of version {version}")


def check_mismatch(metrics: Mapping[str, float], config: PPOConfig) -> None:
    """Sampler and learner must agree on the tokens' probabilities, or the policy gradient is of another policy."""
    mismatch = metrics["rollout/logprob_mismatch"]
    if mismatch > config.max_logprob_mismatch:
        raise RuntimeError(
            f"sampler and learner disagree by {mismatch:.3g} nats a token (max_logprob_mismatch="
            f"{config.max_logprob_mismatch:g}): the rollout actors' weights are not the policy's"
        )


def wait(references: list[Any]) -> None:
    """Until all are done; nothing is fetched. A failure shows in what is made of them."""
    ray.wait(references, num_returns=len(references), fetch_local=False)


@dataclass(frozen=True)
class Roles:
    """The actor groups of a run."""

    policy: ActorGroup[PolicyActor]
    critic: ActorGroup[CriticActor]
    reference: ActorGroup[ReferenceActor]
    reward: ActorGroup[RewardActor]
    rollout: ActorGroup[RolloutActor]

    @staticmethod
    def needs(config: PPOConfig) -> list[Role]:
        """Resources of every role."""
        named = {name: getattr(config, name) for name in ("policy", "critic", "reference", "reward")}
        roles = [Role(name, r.num_actors, r.cpus_per_actor, r.gpus_per_actor) for name, r in named.items()]
        return [*roles, rollout_role(config.rollout)]

    @classmethod
    def start(cls, config: PPOConfig, prompts: PromptData) -> Roles:
        """Start all roles side by side; returns when all are ready."""
        policy_role, critic_role, reference_role, reward_role, _ = cls.needs(config)
        rollout = start_rollout_actors(config.rollout, config.model, seed=config.seed)
        learner = {"config": config}
        roles = cls(
            policy=ActorGroup(
                policy_role, PolicyActor, lambda rank: {"rank": rank, "world_size": policy_role.num_actors, **learner}
            ),
            critic=ActorGroup(
                critic_role, CriticActor, lambda rank: {"rank": rank, "world_size": critic_role.num_actors, **learner}
            ),
            reference=ActorGroup(
                reference_role,
                ReferenceActor,
                lambda rank: {
                    "model": str(config.model),
                    "temperature": config.rollout.temperature,
                    "micro_batch_size": config.reference.micro_batch_size,
                },
            ),
            reward=ActorGroup(
                reward_role,
                RewardActor,
                lambda rank: {
                    "model": str(config.reward_model), "micro_batch_size": config.reward.micro_batch_size
                },
            ),
            rollout=rollout,
        )
        setups = rollout.submit(
            RolloutActor.set_prompts,
            ray.put(prompts.token_ids),
            num_samples=config.samples_per_prompt,
            temperature=config.rollout.temperature,
            max_new_tokens=config.rollout.max_new_tokens,
        )
        for group, method in ((roles.policy, PolicyActor.setup), (roles.critic, CriticActor.setup)):
            address = group.submit(PolicyActor.address, rank=0)[0]
            setups += group.submit(method, address)
        collect(setups, "start")
        return roles


class PromptShards:
    """Which prompts a step trains on, cut into shards of whole prompts."""

    def __init__(self, num_prompts: int, config: PPOConfig) -> None:
        self._order = BatchOrder(num_prompts, config.prompts_per_step, seed=config.seed)
        self._num_shards = config.num_shards

    def of(self, step: int) -> list[list[int]]:
        """Prompt ids of each shard of the step."""
        return self._order.rows(step).reshape(self._num_shards, -1).tolist()


class Watch:
    """What happens around a step: timing, log, evaluation, checkpoint."""

    def __init__(
        self, job: Run, config: PPOConfig, roles: Roles, progress: Progress, held_out: PromptData | None, tokenizer: Any
    ) -> None:
        self.job, self.config, self.roles, self.progress = job, config, roles, progress
        self.held_out, self.tokenizer = held_out, tokenizer
        self.checkpoints = Checkpoints(job.checkpoints_dir.absolute(), keep=config.checkpoint.keep)
        self.last: dict[str, float] = {}
        self._times: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._times[name] = time.perf_counter() - began

    def after(self, step: int, metrics: dict[str, float]) -> None:
        """``step`` steps are done."""
        metrics = {**metrics, **self._times}
        if step % self.config.eval.every_steps == 0 or step == self.config.num_steps:
            metrics |= self.evaluate()
        self.last.update(metrics)
        self.job.log(step, metrics)
        self.progress.update(step, {name: value for name, value in metrics.items() if name in SHOWN})
        if step % self.config.checkpoint.every_steps == 0 or step == self.config.num_steps:
            self.save(step)

    def evaluate(self) -> dict[str, float]:
        """Held-out prompts, sampled as in training, by the reward model and, if asked for, the gold judge."""
        if self.held_out is None:
            return {}
        rollouts = generate(
            self.roles.rollout,
            list(enumerate(self.held_out.token_ids)),
            num_samples=1,
            temperature=self.config.rollout.temperature,
            max_new_tokens=self.config.rollout.max_new_tokens,
            step=-1,
        )
        batch = collate(rollouts, pad_token_id=self.tokenizer.pad_token_id)
        (rewards,) = collect(self.roles.reward.map(RewardActor.rewards, [batch]), "reward")
        figures = {"rewards": float(rewards.mean())}
        if self.config.eval.judge == "gold":
            figures |= summarize(judge_rollouts(self.held_out.rows, rollouts, self.tokenizer))
        return {f"eval/{name}": value for name, value in figures.items()}

    def save(self, step: int) -> None:
        with self.checkpoints.writing(step) as folder:
            state = {"step": step}
            saves = self.roles.policy.submit(PolicyActor.save, str(folder / "policy"), state)
            saves += self.roles.critic.submit(CriticActor.save, str(folder / "critic"), state)
            collect(saves, "checkpoint")

    def resume(self) -> int:
        """Load the newest checkpoint, if there is one; returns the number of steps done."""
        found = self.checkpoints.latest()
        if found is None:
            self.job.rewind(-1)
            return 0
        step, folder = found
        loads = self.roles.policy.submit(PolicyActor.load, str(folder / "policy"))
        loads += self.roles.critic.submit(CriticActor.load, str(folder / "critic"))
        collect(loads, "checkpoint")
        self.job.rewind(step)
        sync_weights(self.roles, version=step)
        return step


SHOWN = (
    "objective/rewards", "objective/kl", "response/length_mean", "response/stop_rate", "policy/clipfrac",
    "value/explained_variance", "rollout/logprob_mismatch", "eval/rewards", "eval/gold", "time/step",
)  # fmt: skip
"""Metrics on the screen; events.jsonl has all."""


def run(loaded: Loaded[PPOConfig], console: Console, *, verbose: bool = False) -> Run:
    """The `ppo` job."""
    config = loaded.config
    check_model_dir(config.model, key="model")
    check_model_dir(config.reward_model, key="reward_model")
    check_data_file(config.prompts, key="prompts")
    job = Run("ppo", loaded)
    if job.done:
        return job
    with job:
        tokenizer = load_tokenizer(config.model)
        prompts, held_out = read_data(job, config, tokenizer)
        trained = {
            "policy": plan_trained(config.model, config.policy.learner),
            "critic": plan_trained(config.reward_model, config.critic.learner, scalar=True),
        }
        with ray_session(job.logs_dir, verbose=verbose):
            needs = Roles.needs(config)
            check_capacity(needs)
            print_preamble(console, job, placement=describe(needs), trained=trained)
            with Progress(console, "ppo", config.num_steps) as progress:
                progress.status("starting policy, critic, reference, reward and vLLM actors")
                roles = Roles.start(config, prompts)
                watch = Watch(job, config, roles, progress, held_out, tokenizer)
                first_step = watch.resume()
                if first_step == 0:
                    job.log(0, watch.evaluate())
                train(roles, PromptShards(len(prompts), config), config, watch, first_step)
            roles.policy.call(PolicyActor.export, str(job.model_dir.absolute()))
        job.finish(watch.last, model_parameters=count_stored_parameters(job.model_dir))
        print_done(console, job, {name: value for name, value in watch.last.items() if name in SHOWN})
    return job


def read_data(job: Run, config: PPOConfig, tokenizer: Any) -> tuple[PromptData, PromptData | None]:
    """Prompts to train on, and held-out ones if the config names them.

    Raises:
        InputError: too few prompts for one step, or rows that the judge cannot read.
    """
    room = max_positions(config.model) - config.rollout.max_new_tokens
    prompts = read_prompts(config.prompts, tokenizer, max_prompt_tokens=room)
    job.add_data("prompts", rows=len(prompts), dropped=prompts.dropped)
    if len(prompts) < config.prompts_per_step:
        raise InputError(
            f"prompts: {config.prompts} has {len(prompts)} usable prompts, "
            f"prompts_per_step={config.prompts_per_step} needs at least that many"
        )
    if config.eval.prompts is None:
        return prompts, None
    check_data_file(config.eval.prompts, key="eval.prompts")
    held_out = read_prompts(
        config.eval.prompts, tokenizer, max_prompt_tokens=room, limit=config.eval.num_prompts
    )
    job.add_data("eval.prompts", rows=len(held_out), dropped=held_out.dropped)
    if config.eval.judge == "gold":
        check_world_rows(held_out.rows, key="eval.prompts")
    return prompts, held_out


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("ppo")
