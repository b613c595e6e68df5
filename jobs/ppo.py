"""RLHF by policy gradient: PPO, GRPO, RLOO and their kin; `algorithm` and `shaping` of the config say which.

Policy, reference, reward model and critic live apart in Ray actors; vLLM actors generate. The driver holds references
and scalars only: a step's prompts are drawn, and its tokens sampled, scored and trained on, in the actors. Who waits
for whom is told by the references that one call hands to the next: scoring of a shard starts when its responses are
done, the updates when all of their shards are scored. With max_policy_lag above 0 later steps are sampled meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import psutil
import ray
from rich.console import Console

from jobs.ppo_inputs import check_inputs, read_data
from jobs.session import ray_session
from rayllm import faults
from rayllm.config.base import Loaded
from rayllm.config.ppo import PPOConfig
from rayllm.models.folders import count_stored_parameters, load_tokenizer
from rayllm.report.run import Run
from rayllm.report.terminal import Progress, print_done, print_preamble, print_where
from rayllm.startup import without_garbage_collection

if TYPE_CHECKING:  # torch: imported while Ray comes up
    from jobs.ppo_batches import Batches
    from jobs.ppo_rewards import ShardScores
    from jobs.ppo_roles import Roles
    from jobs.ppo_watch import Controls, Watch


def train(roles: Roles, batches: Batches, controls: Controls, config: PPOConfig, watch: Watch) -> None:
    """The algorithm: Ouyang et al. 2022, section 3.5; Schulman et al. 2017, algorithm 1."""
    for step in range(watch.first_step, config.num_steps):
        faults.reach("driver.step")
        with watch.timed("time/step"):
            with watch.timed("time/rollout"):
                shards, scores = batches.take(step)
                shards, scores = resample(roles, batches, config, step, shards, scores)
                greedy = roles.greedy(shards, step)
                ref_logprobs = roles.ref_logprobs(shards)
                values = roles.values(shards)
                logprobs = roles.logprobs(shards)
                wait(shards)
            with watch.timed("time/score"):
                mix = controls.mix(roles, scores)
                given = (logprobs, ref_logprobs, values, *zip(*scores, strict=True), *greedy)
                experience = roles.experience(shards, *given, mix=mix, kl_coef=controls.kl_coef)
                wait(experience)
            watch.learning()
            with watch.timed("time/update"):
                roles.sleep_engines()
                metrics = roles.update(experience, step=step, kl_coef=controls.kl_coef)
            check_mismatch(metrics, roles.logprob_tolerance)
            with watch.timed("time/sync"):
                roles.move_reference(step + 1)
                roles.sync_weights(version=step + 1)
        metrics |= controls.after(metrics)
        watch.after(step + 1, metrics)


def resample(
    roles: Roles, batches: Batches, config: PPOConfig, step: int, shards: list[Any], scores: list[ShardScores]
) -> tuple[list[Any], list[ShardScores]]:
    """Dynamic sampling (DAPO, https://arxiv.org/abs/2503.14476, section 3.2): replace the prompts whose responses all
    got the same scores, so that every prompt of the step teaches something. What is still without signal after the
    last round stays: it has no gradient, and the batch keeps its size."""
    for _ in range(config.shaping.resample_rounds):
        counts = roles.reward.count_without_signal(shards, scores)
        wanting = [index for index, count in enumerate(counts) if count]
        if not wanting:
            break
        spare = batches.more([counts[index] for index in wanting], step)
        before = [shards[index] for index in wanting], spare, [scores[index] for index in wanting]
        filled = roles.reward.replace_without_signal(*before, roles.reward.score(spare))
        for index, shard, score in zip(wanting, *filled, strict=True):
            shards[index], scores[index] = shard, score
    return shards, scores


def check_mismatch(metrics: Mapping[str, float], tolerance: float) -> None:
    """Sampler and learner must agree on the tokens' probabilities, or the policy gradient is of another policy."""
    mismatch = metrics.get("rollout/logprob_mismatch", 0.0)  # none where every token is of older weights
    if not mismatch <= tolerance:
        raise RuntimeError(
            f"sampler and learner disagree by {mismatch:.3g} nats a token, more than max_logprob_mismatch="
            f"{tolerance:g}: the rollout actors' weights are not the policy's"
        )


def wait(references: list[Any]) -> None:
    """Until all are done; nothing is fetched. A failure shows in what is made of them."""
    ray.wait(references, num_returns=len(references), fetch_local=False)


def run(loaded: Loaded[PPOConfig], console: Console, *, verbose: bool = False) -> Run:
    """The `ppo` job."""
    check_inputs(loaded.config)
    job = Run("ppo", loaded)
    if job.done:
        return job
    with job:
        with ray_session(job.logs_dir, verbose=verbose, wait=False) as ray_started:
            watch = learn(job, loaded.config, console, ray_started)
        job.finish(watch.last, model_parameters=count_stored_parameters(job.model_dir))
        print_done(console, job, watch.shown)
    return job


def learn(job: Run, config: PPOConfig, console: Console, ray_started: Callable[[], None]) -> Watch:
    """From the start of the roles to the model that they made."""
    with without_garbage_collection():  # torch and what needs it
        from actors.placement import reserve, where
        from jobs.ppo_batches import Batches
        from jobs.ppo_recovery import Recovery
        from jobs.ppo_roles import Roles, trained_parameters
        from jobs.ppo_watch import Controls, Watch, teller
    imported = seconds_since_start()
    tokenizer = load_tokenizer(config.model)
    prompts, held_out = read_data(job, config, tokenizer)
    trained, needs = trained_parameters(config), Roles.needs(config)
    ray_started()
    ray_up = seconds_since_start()
    with reserve(needs, config.placement, console.print) as placement:
        print_preamble(console, job, placement=placement.describe(), trained=trained)
        roles = Roles.start(config, prompts, placement, ptx_tokens=job.dir / "ptx.npy")
        with Progress(console, "ppo", config.num_steps) as progress, roles.rollout.told(teller(job, console)):
            progress.status(f"starting {', '.join(role.name for role in needs)}")
            ready = roles.wait()
            print_where(console, job, where(roles.groups))
            started = {"imports": imported, "ray": ray_up - imported, **ready, "all": seconds_since_start()}
            console.print(startup_line(started), highlight=False)
            batches, controls = Batches(roles, prompts, config), Controls(config)
            watch = Watch(job, config, roles, batches, controls, progress, held_out, tokenizer)
            recovery = Recovery(watch, {f"startup/{name}": value for name, value in started.items()})

            def train_and_export() -> None:
                train(roles, batches, controls, config, watch)
                roles.export(job)

            with watch.saved_on_stop():
                recovery.run(train_and_export)
    return watch


def seconds_since_start() -> float:
    """Since this process was started, imports included."""
    return time.time() - psutil.Process().create_time()


def startup_line(seconds: Mapping[str, float]) -> str:
    """What the start took, for people: roles start side by side."""
    roles = [f"{role} {seconds[role]:.1f} s" for role in ("rollout", "policy", "critic") if role in seconds]
    return (
        f"[dim]ready after {seconds['all']:.1f} s: imports {seconds['imports']:.1f} s, "
        f"Ray and data {seconds['ray']:.1f} s after them; then side by side {', '.join(roles)} "
        f"(vLLM {seconds['vllm_import']:.1f} s to import and {seconds['vllm_engine']:.1f} s to start, "
        f"DeepSpeed {seconds['deepspeed']:.1f} s)[/dim]"
    )


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("ppo")
