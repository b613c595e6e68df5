"""Sample k answers per prompt with vLLM actors and rank them best to worst, written as rankings."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from actors.fleet import generate, rollout_role, start_rollout_actors
from actors.group import ActorGroup
from actors.placement import check_capacity, describe
from actors.rollout import RolloutActor
from jobs.judging import check_world_rows, judge_rollouts, response_text
from jobs.session import ray_session
from rayllm.config.base import Loaded
from rayllm.config.label import LabelConfig
from rayllm.data.chat import prompt_messages
from rayllm.data.files import Row, check_data_file, write_parquet
from rayllm.data.prompts import PromptData, read_prompts
from rayllm.data.rollout import Rollout
from rayllm.models.loading import check_model_dir, load_tokenizer, max_positions
from rayllm.report.run import Run
from rayllm.report.terminal import Progress, print_done, print_preamble
from rayllm.world.labelers import rank_responses


def run(loaded: Loaded[LabelConfig], console: Console, *, verbose: bool = False) -> Run:
    """The `label` job: rankings.parquet with noisy labels, heldout_rankings.parquet with exact ones."""
    config = loaded.config
    check_model_dir(config.model, key="model")
    check_data_file(config.prompts, key="prompts")
    check_data_file(config.heldout_prompts, key="heldout_prompts")
    job = Run("label", loaded)
    if job.done:
        return job
    with job:
        tokenizer = load_tokenizer(config.model)
        room = max_positions(config.model) - config.rollout.max_new_tokens
        wanted = {"prompts": config.num_prompts, "heldout_prompts": config.num_heldout_prompts}
        data: dict[str, PromptData] = {}
        for key, limit in wanted.items():
            data[key] = read_prompts(
                getattr(config, key), tokenizer, max_prompt_tokens=room, limit=limit, max_bad_rows=config.max_bad_rows
            )
            check_world_rows(data[key].rows, key=key)
            job.add_data(key, **data[key].facts, rows=len(data[key]), dropped=data[key].dropped)
        metrics: dict[str, float] = {}
        with ray_session(job.logs_dir, verbose=verbose):
            role = rollout_role(config.rollout)
            check_capacity([role])
            print_preamble(console, job, placement=describe([role]))
            actors = start_rollout_actors(config.rollout, config.model, seed=config.seed)
            total = sum(len(prompts) for prompts in data.values())
            with Progress(console, "label", total) as progress:
                progress.status("starting vLLM")
                done = 0
                for key, noise, name in (
                    ("prompts", config.noise, "rankings"),
                    ("heldout_prompts", 0.0, "heldout_rankings"),
                ):
                    rollouts = sample(actors, data[key], config, progress, done)
                    done += len(data[key])
                    rows, figures = rank(data[key], rollouts, config, noise, tokenizer)
                    write_parquet(rows, config.run_dir / f"{name}.parquet")
                    metrics.update({f"{name}/{figure}": value for figure, value in figures.items()})
            actors.stop()
        job.log(total, metrics)
        job.finish(metrics)
        print_done(console, job, metrics)
    return job


def sample(
    actors: ActorGroup[RolloutActor], prompts: PromptData, config: LabelConfig, progress: Progress, before: int
) -> list[Rollout]:
    """k rollouts of every prompt."""
    return generate(
        actors,
        list(enumerate(prompts.token_ids)),
        num_samples=config.num_responses,
        temperature=config.rollout.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
        step=before,
        on_done=lambda done: progress.update(before + done, {}),
    )


def rank(
    prompts: PromptData, rollouts: Sequence[Rollout], config: LabelConfig, noise: float, tokenizer: Any
) -> tuple[list[Row], dict[str, float]]:
    """Rows of a rankings file. Equal answers are merged; prompts left with one answer are dropped and counted."""
    rng = random.Random(f"labels-{config.seed}")
    rows: list[Row] = []
    judged = judge_rollouts(prompts.rows, rollouts, tokenizer)
    k = config.num_responses
    for prompt_id in range(len(prompts)):
        distinct: dict[str, int] = {}
        for index in range(prompt_id * k, prompt_id * k + k):
            distinct.setdefault(response_text(tokenizer, rollouts[index]), index)
        if len(distinct) < 2:
            continue
        chosen = list(distinct.values())
        rows.append(
            {
                "prompt": prompt_messages(prompts.rows[prompt_id]["prompt"]),
                "responses": list(distinct),
                "response_ids": [list(rollouts[index].token_ids) for index in chosen],
                "ranks": rank_responses([judged[index].gold for index in chosen], noise=noise, rng=rng),
                "labeler": f"{config.labeler}, noise {noise:g}",
            }
        )
    golds = [verdict.gold for verdict in judged]
    figures = {
        "prompts": len(rows),
        "responses": sum(len(row["responses"]) for row in rows),
        "all_answers_equal": len(prompts) - len(rows),
        "gold_mean": sum(golds) / len(golds),
    }
    return rows, figures


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("label")
