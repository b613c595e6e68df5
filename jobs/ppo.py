"""RLHF by policy gradient: PPO, GRPO, RLOO and their kin; `algorithm` and `shaping` of the config say which.

Policy, reference, reward model and critic live apart in Ray actors; vLLM actors generate. The driver holds references
and scalars only: a step's prompts are drawn, and its tokens sampled, scored and trained on, in the actors. Who waits
for whom is told by the references that one call hands to the next: scoring of a shard starts when its responses are
done, the updates when all of their shards are scored. With max_policy_lag above 0 later steps are sampled meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import psutil
import ray
from rich.console import Console

from actors.placement import reserve, where
from actors.policy import PolicyActor
from jobs.judging import check_world_rows
from jobs.ppo_batches import Batches
from jobs.ppo_recovery import Recovery
from jobs.ppo_rewards import ShardScores, check_reader, check_rows, check_sources
from jobs.ppo_roles import Roles
from jobs.ppo_watch import SHOWN, Controls, Watch, teller
from jobs.session import ray_session
from rayllm import faults
from rayllm.config.base import Loaded
from rayllm.config.ppo import PPOConfig
from rayllm.data.files import check_data_file
from rayllm.data.prompts import PromptData, read_prompts
from rayllm.data.sources import check_sources as check_data_sources
from rayllm.data.sources import shown_paths
from rayllm.data.text import tokenize_documents
from rayllm.environments.loading import load_environment, make_prompts
from rayllm.errors import InputError
from rayllm.models.loading import check_model_dir, count_stored_parameters, load_tokenizer, max_positions
from rayllm.models.partial import plan_trained
from rayllm.report.run import Run
from rayllm.report.terminal import Progress, print_done, print_preamble, print_where


def train(roles: Roles, batches: Batches, controls: Controls, config: PPOConfig, watch: Watch) -> None:
    """The algorithm: Ouyang et al. 2022, section 3.5; Schulman et al. 2017, algorithm 1."""
    for step in range(watch.first_step, config.num_steps):
        faults.reach("driver.step")
        with watch.timed("time/step"):
            with watch.timed("time/rollout"):
                shards, scores = batches.take(step)
                shards, scores = resample(roles, batches, config, step, shards, scores)
                greedy = roles.greedy_scores(shards, step)
                ref_logprobs = roles.ref_logprobs(shards)
                values = roles.values(shards)
                logprobs = roles.logprobs(shards)
                wait(shards)
            with watch.timed("time/score"):
                mix = controls.mix(roles, scores)
                given = (logprobs, ref_logprobs, values, *zip(*scores, strict=True), *greedy)
                experience = roles.policy.map(
                    PolicyActor.experience, shards, *given, mix=mix, kl_coef=controls.kl_coef
                )
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
    config = loaded.config
    check_model_dir(config.model, key="model")
    readers = {"reward_model": config.reward_models, "critic.model": (config.critic.model,)}
    for key, folder in [(key, folder) for key, folders in readers.items() for folder in folders if folder is not None]:
        check_reader(config.model, folder, key=key)
    if config.prompts is not None:
        check_data_sources(config.prompts, key="prompts")
    for key, path in (("eval.prompts", config.eval.prompts),
                      ("ptx.documents", config.ptx.documents), ("eval.documents", config.eval.documents)):  # fmt: skip
        if path is not None:
            check_data_file(path, key=key)
    check_sources(config)
    job = Run("ppo", loaded)
    if job.done:
        return job
    with job:
        imported = seconds_since_start()
        with ray_session(job.logs_dir, verbose=verbose, wait=False) as ray_started:
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

                    def learn() -> None:
                        train(roles, batches, controls, config, watch)
                        roles.export(job)

                    with watch.saved_on_stop():
                        recovery.run(learn)
        job.finish(watch.last, model_parameters=count_stored_parameters(job.model_dir))
        print_done(console, job, {name: value for name, value in watch.last.items() if name in SHOWN})
    return job


def trained_parameters(config: PPOConfig) -> dict[str, tuple[int, int] | None]:
    """Learner -> what `plan_trained` says of it."""
    trained = {"policy": plan_trained(config.model, config.policy.learner)}
    if "critic" in config.learner_ranks:
        trained["critic"] = plan_trained(config.critic_start, config.critic.learner, scalar=True)
    return trained


def seconds_since_start() -> float:
    """Since this process was started, imports included."""
    return time.time() - psutil.Process().create_time()


def startup_line(seconds: Mapping[str, float]) -> str:
    """What the start took, for people: roles start side by side."""
    roles = [f"{role} {seconds[role]:.1f} s" for role in ("rollout", "policy", "critic") if role in seconds]
    return (
        f"[dim]ready after {seconds['all']:.1f} s: imports {seconds['imports']:.1f} s, "
        f"Ray and data {seconds['ray']:.1f} s; then side by side {', '.join(roles)} "
        f"(vLLM {seconds['vllm_import']:.1f} s to import and {seconds['vllm_engine']:.1f} s to start, "
        f"DeepSpeed {seconds['deepspeed']:.1f} s)[/dim]"
    )


def read_data(job: Run, config: PPOConfig, tokenizer: Any) -> tuple[PromptData, PromptData | None]:
    """Prompts to train on, and held-out ones if there are any; the text to mix in is left in ``ptx.npy``.

    Raises:
        InputError: too few prompts for one step, rows that the judge cannot read, or an unusable environment.
    """
    if config.ptx.documents is not None:
        stream = tokenize_documents(config.ptx.documents, tokenizer, max_bad_rows=config.max_bad_rows)
        stream.save(job.dir / "ptx.npy")
        counts = {"rows": stream.num_documents, "tokens": len(stream.tokens)}
        job.add_data("ptx.documents", **stream.facts, **counts, dropped={})
    if config.environment.name is not None and config.prompts is None:
        make = load_environment(config.environment.name, **config.environment.options)
        num_rows = config.prompts_per_step * config.num_steps
        prompts = PromptData(make_prompts(make, num_rows, seed=2 * config.seed), [], {})
        rows = make_prompts(make, config.eval.num_prompts, seed=2 * config.seed + 1)
        return prompts, PromptData(rows, [], {})
    room = max_positions(config.model) - config.rollout.max_new_tokens
    assert config.prompts is not None
    prompts = read_prompts(
        config.prompts, tokenizer, max_prompt_tokens=room, long_prompts=config.rollout.long_prompts,
        max_bad_rows=config.max_bad_rows, seed=config.seed,
    )  # fmt: skip
    job.add_data("prompts", **prompts.facts, rows=len(prompts), dropped=prompts.dropped)
    if len(prompts) < config.prompts_per_step:
        raise InputError(
            f"prompts: {shown_paths(config.prompts)} has {len(prompts)} usable prompts, "
            f"prompts_per_step={config.prompts_per_step} needs at least that many"
        )
    check_rows(config.reward, prompts, key="prompts")
    if config.eval.prompts is None:
        return prompts, None
    held_out = read_prompts(
        config.eval.prompts, tokenizer, max_prompt_tokens=room, long_prompts=config.rollout.long_prompts,
        limit=config.eval.num_prompts, max_bad_rows=config.max_bad_rows,
    ).apart_from(prompts)  # fmt: skip
    if not held_out.rows:
        raise InputError(f"eval.prompts: every prompt of {config.eval.prompts} stands in prompts too")
    job.add_data("eval.prompts", **held_out.facts, rows=len(held_out), dropped=held_out.dropped)
    check_rows(config.reward, held_out, key="eval.prompts")
    if config.eval.judge == "gold":
        check_world_rows(held_out.rows, key="eval.prompts")
    return prompts, held_out


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("ppo")
