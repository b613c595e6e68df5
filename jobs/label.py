"""Sample k answers per prompt with vLLM and rank them best to worst: by the gold judge, or by a reward model.

One Ray Data job samples (and scores) in chunks. Finished chunks are parts in the run folder, from which the same
command goes on after a kill. What the labeler makes of the parts is written at the end.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from rich.console import Console

from actors.fleet import rollout_arguments, rollout_role
from actors.group import Role
from actors.labeling import AHEAD, Chunk, Sampler, Scorer, Stage, chunks_of, clear_parts, missing, read_part, run_stages
from actors.placement import reserve
from jobs.judging import check_world_rows
from jobs.label_model import given_answers, print_agreement, write_labels
from jobs.session import ray_session
from rayllm.config.base import Loaded
from rayllm.config.label import LabelConfig
from rayllm.data.chat import prompt_messages
from rayllm.data.files import Row, check_data_file, write_parquet
from rayllm.data.preferences import Ranking, read_rankings
from rayllm.data.prompts import PromptData, read_prompts
from rayllm.errors import InputError
from rayllm.models.folders import check_model_dir, check_same_tokens, load_tokenizer, max_positions
from rayllm.report.run import Run
from rayllm.report.terminal import Progress, print_done, print_preamble
from rayllm.world.judge import judge
from rayllm.world.labelers import rank_responses
from rayllm.world.prompts import Prompt

NUM_LABELERS = 2
"""Simulated people who rank the same held-out answers, so that their agreement is known."""


@dataclass(frozen=True)
class Data:
    """What the job reads, and the chunks into which it is cut, by config key."""

    prompts: dict[str, PromptData]
    """To be answered."""

    rankings: list[Ranking]
    """Of people, for the reward model to be compared with; their answers are given."""

    chunks: dict[str, list[Chunk]]


def run(loaded: Loaded[LabelConfig], console: Console, *, verbose: bool = False) -> Run:
    """The `label` job. Gold: rankings.parquet with noisy labels, heldout_rankings.parquet with exact ones,
    heldout_labelers.parquet by two noisy labelers. Reward model: see `jobs.label_model`."""
    config = loaded.config
    check_inputs(config)
    job = Run("label", loaded)
    if job.done:
        return job
    with job:
        data = read(job, config)
        parts = job.dir / "parts"
        clear_parts(parts, unfinished_only=True)
        stages = stages_of(config, data, parts)
        roles = [stage.role for stage in stages]
        with ray_session(job.logs_dir, verbose=verbose):
            with reserve(roles, config.placement, console.print) as held:
                print_preamble(console, job, placement=held.describe())
                stages = [replace(stage, selector=held.seats(stage.role).selector) for stage in stages]
            make_parts(config, data, parts, stages, console)  # Ray Data starts actors where it finds room
        if config.labeler == "gold":
            metrics = write_gold_labels(config, data, parts)
        else:
            metrics = write_labels(config, data.prompts["prompts"], data.rankings, data.chunks, parts)
        job.log(sum(len(prompts) for prompts in data.prompts.values()), metrics)
        job.finish(metrics)
        clear_parts(parts, unfinished_only=False)
        print_done(console, job, metrics)
        if "agreement/reward_model" in metrics:
            print_agreement(console, metrics)
    return job


def check_inputs(config: LabelConfig) -> None:
    """Raise InputError for a model or file that cannot be used."""
    check_model_dir(config.model, key="model")
    for key in ("prompts", "heldout_prompts", "heldout_rankings"):
        if (path := getattr(config, key)) is not None:
            check_data_file(path, key=key)
    if config.reward_model is not None:
        check_model_dir(config.reward_model, key="reward_model")
        check_same_tokens(config.model, config.reward_model, key="reward_model")


def read(job: Run, config: LabelConfig) -> Data:
    """Prompts, and people's rankings where there are some."""
    tokenizer = load_tokenizer(config.model)
    longest = min(max_positions(path) for path in (config.model, config.reward_model) if path is not None)
    room = longest - config.rollout.max_new_tokens
    prompts: dict[str, PromptData] = {}
    for key, limit in (("prompts", config.num_prompts), ("heldout_prompts", config.num_heldout_prompts)):
        if (path := getattr(config, key)) is None:
            continue
        prompts[key] = read_prompts(
            path, tokenizer, max_prompt_tokens=room, long_prompts=config.rollout.long_prompts, limit=limit,
            max_bad_rows=config.max_bad_rows,
        )  # fmt: skip
        if config.labeler == "gold":
            check_world_rows(prompts[key].rows, key=key)
        check_readable(prompts[key], key=key)
        job.add_data(key, **prompts[key].facts, rows=len(prompts[key]), dropped=prompts[key].dropped)
    chunks = {
        key: chunks_of(key, [{"prompt_id": i, "token_ids": ids} for i, ids in enumerate(found.token_ids)])
        for key, found in prompts.items()
    }
    rankings: list[Ranking] = []
    if config.heldout_rankings is not None:
        ranked = read_rankings(
            config.heldout_rankings, tokenizer, max_length=longest, max_bad_rows=config.max_bad_rows
        )
        rankings = ranked.rankings
        figures = {"rows": len(rankings), "pairs": ranked.num_pairs, "dropped": ranked.dropped}
        job.add_data("heldout_rankings", **ranked.origins.facts, **figures)
        chunks["heldout_rankings"] = chunks_of("heldout_rankings", given_answers(rankings))
    return Data(prompts, rankings, chunks)


def check_readable(prompts: PromptData, *, key: str) -> None:
    """Raise InputError for a prompt of token ids: who ranks must read it, and so must who learns from the labels."""
    for index, row in enumerate(prompts.rows):
        if not isinstance(row["prompt"], str) and isinstance(row["prompt"][0], int):
            raise InputError(f"{key}: row {index}: a prompt to label must be text or messages, got token ids")


def stages_of(config: LabelConfig, data: Data, parts: Path) -> list[Stage]:
    """The engines, and the reward model's actors where there is one."""
    rollout, scores = config.rollout, config.labeler == "reward-model"
    starts = accumulate((len(prompts) for prompts in data.prompts.values()), initial=0)
    sampler = Stage(
        Sampler,
        rollout_role(rollout),
        config.max_actors or rollout.num_actors,
        at_once=AHEAD,
        arguments={
            **rollout_arguments(rollout, config.model, seed=config.seed),
            "sampling": {
                "num_samples": config.num_responses,
                "temperature": rollout.temperature,
                "max_new_tokens": rollout.max_new_tokens,
            },
            "steps": dict(zip(data.prompts, starts, strict=False)),
            "folder": None if scores else parts,
        },
    )
    if not scores:
        return [sampler]
    reward = config.reward
    role = Role("reward", reward.num_actors, reward.cpus_per_actor, reward.gpus_per_actor)
    arguments = {"model": str(config.reward_model), "micro_batch_size": reward.micro_batch_size, "folder": parts}
    return [sampler, Stage(Scorer, role, reward.num_actors, at_once=1, arguments=arguments)]


def make_parts(config: LabelConfig, data: Data, parts: Path, stages: list[Stage], console: Console) -> None:
    """Sample, and score, what has no part yet."""
    to_do = {key: missing(chunks, parts) for key, chunks in data.chunks.items()}
    total = sum(len(chunk.rows) for chunks in data.chunks.values() for chunk in chunks)
    done = total - sum(len(chunk.rows) for chunks in to_do.values() for chunk in chunks)
    with Progress(console, "label", total) as progress:
        progress.status("starting vLLM" + (f", {done} of {total} rows are done" if done else ""))

        def on_done(rows: int) -> None:
            nonlocal done
            done += rows
            progress.update(done, {})

        run_stages(
            stages[0],
            stages[1] if len(stages) > 1 else None,
            to_sample=[chunk for key in data.prompts for chunk in to_do[key]],
            given=to_do.get("heldout_rankings", []),
            on_done=on_done,
        )


def write_gold_labels(config: LabelConfig, data: Data, parts: Path) -> dict[str, float]:
    """Rankings by simulated people and, of the held-out prompts, by the exact judge; returns figures."""
    metrics: dict[str, float] = {}
    answers = {key: [row for chunk in data.chunks[key] for row in read_part(chunk, parts)] for key in data.prompts}
    judged = {key: judge_answers(data.prompts[key], rows) for key, rows in answers.items()}
    for key, noise, name in (("prompts", config.noise, "rankings"), ("heldout_prompts", 0.0, "heldout_rankings")):
        rng = random.Random(f"labels-{config.seed}")
        rows = rank(data.prompts[key], answers[key], judged[key], noise, rng, labeler="gold")
        write_parquet(rows, config.run_dir / f"{name}.parquet")
        weighted = [
            (gold, count)
            for row, golds in zip(answers[key], judged[key], strict=True)
            for gold, count in zip(golds, row["counts"], strict=True)
        ]
        figures = {
            "prompts": len(rows),
            "responses": sum(len(row["responses"]) for row in rows),
            "all_answers_equal": len(answers[key]) - len(rows),
            "gold_mean": sum(gold * count for gold, count in weighted) / sum(count for _, count in weighted),
        }
        metrics.update({f"{name}/{figure}": value for figure, value in figures.items()})
    write_parquet(
        [
            row
            for number in range(1, NUM_LABELERS + 1)
            for row in rank(
                data.prompts["heldout_prompts"],
                answers["heldout_prompts"],
                judged["heldout_prompts"],
                config.noise,
                random.Random(f"labels-{config.seed}-{number}"),
                labeler=f"gold {number}",
            )
        ],
        config.run_dir / "heldout_labelers.parquet",
    )
    return metrics


def judge_answers(prompts: PromptData, answers: list[Row]) -> list[list[float]]:
    """The gold judge's score of every answer."""
    return [
        [
            judge(Prompt.from_row(prompts.rows[row["prompt_id"]]), text, stopped=stopped).gold
            for text, stopped in zip(row["responses"], row["stopped"], strict=True)
        ]
        for row in answers
    ]


def rank(
    prompts: PromptData,
    answers: list[Row],
    judged: list[list[float]],
    noise: float,
    rng: random.Random,
    *,
    labeler: str,
) -> list[Row]:
    """Rows of a rankings file; prompts with a single answer are left out."""
    rows = []
    for row, golds in zip(answers, judged, strict=True):
        prompt = prompts.rows[row["prompt_id"]]
        if len(golds) > 1:
            rows.append(
                {
                    "prompt": prompt_messages(prompt["prompt"]),
                    "responses": row["responses"],
                    "response_ids": row["response_ids"],
                    "ranks": rank_responses(golds, noise=noise, rng=rng),
                    "labeler": f"{labeler}, noise {noise:g}",
                    "category": prompt["kind"],
                }
            )
    return rows


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("label")
