"""All models side by side: the same held-out prompts, the same sampling, one table and one JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from actors.fleet import RolloutFleet, generate, rollout_role, start_rollout_fleet
from actors.group import ActorGroup, Role, collect
from actors.placement import Placement, reserve
from actors.reference import ReferenceActor
from actors.reward import RewardActor
from actors.rollout import RolloutActor
from actors.weights import safetensors_shapes
from jobs.judging import check_world_rows, judge_rollouts, response_text
from jobs.session import ray_session
from rayllm.config.base import Loaded
from rayllm.config.evaluate import EvaluateConfig
from rayllm.data.files import check_data_file
from rayllm.data.prompts import PromptData, read_prompts
from rayllm.data.rollout import Rollout, collate
from rayllm.data.text import held_out_text
from rayllm.data.tokenizer import end_of_text_id
from rayllm.errors import InputError
from rayllm.lineage import content_id, read_manifest, write_json
from rayllm.models.folders import check_model_dir, load_tokenizer, max_positions
from rayllm.report.run import Run
from rayllm.report.terminal import Progress, print_done, print_preamble
from rayllm.world.judge import Judgement
from rayllm.world.summary import summarize

SPLITS = {
    "new": "questions in phrasings never seen in training",
    "held": "questions about entities that no chat data mentions",
}


@dataclass(frozen=True)
class Answers:
    """What one model said on one split."""

    rollouts: list[Rollout]
    judgements: list[Judgement]
    rewards: list[float]
    figures: dict[str, float]


@dataclass(frozen=True)
class Actors:
    rollout: RolloutFleet
    reward: ActorGroup[RewardActor]
    reference: ActorGroup[ReferenceActor]
    text: ActorGroup[ReferenceActor]


def run(loaded: Loaded[EvaluateConfig], console: Console, *, verbose: bool = False) -> Run:
    """The `evaluate` job: evaluation.json in run_dir and a table on the screen."""
    config = loaded.config
    for name, path in config.models.items():
        check_model_dir(path, key=f"models.{name}")
    check_model_dir(config.reward_model, key="reward_model")
    for name, path in config.prompts.items():
        check_data_file(path, key=f"prompts.{name}")
    check_same_shape(config)
    job = Run("evaluate", loaded)
    if job.done:
        return job
    with job:
        tokenizer = load_tokenizer(config.models[config.reference])
        prompts = read_splits(job, config, tokenizer)
        with ray_session(job.logs_dir, verbose=verbose):
            roles = roles_of(config)
            with reserve(roles, config.placement, console.print) as placement:
                print_preamble(console, job, placement=placement.describe())
                with Progress(console, "evaluate", len(config.models)) as progress:
                    progress.status("starting actors")
                    actors = start(config, roles, placement)
                    answers, bits = {}, {}
                    for done, (name, path) in enumerate(config.models.items(), start=1):
                        progress.status(f"{name} answers")
                        rows = held_out_text(config.heldout_documents, tokenizer, max_bad_rows=config.max_bad_rows)
                        bits[name] = actors.text.submit(ReferenceActor.bits_per_byte, str(path), rows)
                        answers[name] = ask(actors, config, path, prompts, tokenizer)
                        new = answers[name].get("new")
                        progress.update(done, {f"{name}/gold": new.figures["gold"]} if new else {})
                    text = {name: collect(reference, "text")[0] for name, reference in bits.items()}
        evaluation = assemble(config, prompts, answers, text, tokenizer)
        write_json(config.run_dir / "evaluation.json", evaluation)
        last = list(config.models)[-1]
        metrics = {f"{last}/{key}": value for key, value in evaluation["metrics"][last]["new"].items()}
        job.finish({name: value for name, value in metrics.items() if value is not None})
        print_table(console, evaluation)
        print_done(console, job, {})
    return job


def check_same_shape(config: EvaluateConfig) -> None:
    """One engine answers for all models in turn, so their weights must have the same names and shapes."""
    shapes = {name: safetensors_shapes(path) for name, path in config.models.items()}
    first = next(iter(shapes))
    for name, found in shapes.items():
        if found != shapes[first]:
            raise InputError(f"models.{name}: other weight shapes than models.{first}; evaluate them in separate runs")


def read_splits(job: Run, config: EvaluateConfig, tokenizer: Any) -> dict[str, PromptData]:
    """The first num_prompts prompts of every split."""
    room = max_positions(next(iter(config.models.values()))) - config.rollout.max_new_tokens
    splits = {}
    for name, path in config.prompts.items():
        splits[name] = read_prompts(
            path, tokenizer, max_prompt_tokens=room, long_prompts=config.rollout.long_prompts,
            limit=config.num_prompts, max_bad_rows=config.max_bad_rows,
        )  # fmt: skip
        check_world_rows(splits[name].rows, key=f"prompts.{name}")
        facts = splits[name].facts
        job.add_data(f"prompts.{name}", **facts, rows=len(splits[name]), dropped=splits[name].dropped)
    return splits


def roles_of(config: EvaluateConfig) -> list[Role]:
    """The engines, and three small scorers that share what an engine has."""
    share = config.rollout.cpus_per_actor / 2
    return [rollout_role(config.rollout), *(Role(name, 1, share, 0) for name in ("reward", "reference", "text"))]


def start(config: EvaluateConfig, roles: Sequence[Role], placement: Placement) -> Actors:
    """Engines on the first model, scorers on theirs."""
    rollout, reward, reference, text = roles
    first = next(iter(config.models.values()))
    lm = {"temperature": config.rollout.temperature, "micro_batch_size": 64}
    return Actors(
        rollout=start_rollout_fleet(config.rollout, first, seed=config.seed, seats=placement.seats(rollout)),
        reward=ActorGroup(
            reward,
            RewardActor,
            lambda rank: {"model": str(config.reward_model), "micro_batch_size": 64},
            placement.seats(reward),
        ),
        reference=ActorGroup(
            reference,
            ReferenceActor,
            lambda rank: {"model": str(config.models[config.reference]), **lm},
            placement.seats(reference),
        ),
        text=ActorGroup(text, ReferenceActor, lambda rank: {"model": str(first), **lm}, placement.seats(text)),
    )


def ask(
    actors: Actors, config: EvaluateConfig, model: Path, prompts: dict[str, PromptData], tokenizer: Any
) -> dict[str, Answers]:
    """Every split, sampled as in training and greedily, judged and scored."""
    actors.rollout.sync(RolloutActor.load, str(model.absolute()))
    answers = {}
    for split, data in prompts.items():
        asked = list(enumerate(prompt_ids(model, data, tokenizer)))
        settings: dict[str, Any] = {"num_samples": 1, "max_new_tokens": config.rollout.max_new_tokens}
        greedy = generate(actors.rollout, asked, temperature=0.0, **settings)
        sampled = generate(actors.rollout, asked, temperature=config.rollout.temperature, **settings)
        judgements = judge_rollouts(data.rows, sampled, tokenizer)
        # The reward model and the reference read every answer as an answer to the chat prompt.
        as_chat = [as_answer_to(rollout, data.token_ids[rollout.prompt_id]) for rollout in sampled]
        batch = collate(as_chat, pad_token_id=tokenizer.pad_token_id)
        rewards = actors.reward.map(RewardActor.rewards, [batch])
        reference = actors.reference.map(ReferenceActor.logprobs, [batch])
        reward_values = collect(rewards, "reward")[0]
        drift = (batch.rollout_logprobs - collect(reference, "reference")[0]) * batch.action_mask
        figures = summarize(judgements)
        figures["correct_greedy"] = summarize(judge_rollouts(data.rows, greedy, tokenizer))["correct"]
        figures["reward"] = float(reward_values.mean())
        figures["length"] = float(batch.action_mask.sum(1).float().mean())
        if prompt_format(model) == "chat":
            figures["kl"] = float(drift.sum(1).mean())
        answers[split] = Answers(sampled, judgements, reward_values.tolist(), figures)
    return answers


def prompt_format(model: Path) -> str:
    """A pretrained model continues documents; every later one is asked through the chat template."""
    manifest = read_manifest(model)
    return "document" if manifest is not None and manifest["stage"] == "pretrain" else "chat"


def prompt_ids(model: Path, data: PromptData, tokenizer: Any) -> list[list[int]]:
    """The prompts as this model expects them."""
    if prompt_format(model) == "chat":
        return data.token_ids
    begin = end_of_text_id(tokenizer)
    return [[begin, *tokenizer.encode(data.text(i), add_special_tokens=False)] for i in range(len(data))]


def as_answer_to(rollout: Rollout, prompt: Sequence[int]) -> Rollout:
    """The same response behind the chat prompt."""
    return Rollout(
        prompt_id=rollout.prompt_id,
        prompt_token_ids=tuple(prompt),
        token_ids=rollout.token_ids,
        logprobs=rollout.logprobs,
        finish_reason=rollout.finish_reason,
        policy_versions=rollout.policy_versions,
    )


def assemble(
    config: EvaluateConfig,
    prompts: dict[str, PromptData],
    answers: dict[str, dict[str, Answers]],
    bits: dict[str, float],
    tokenizer: Any,
) -> dict[str, Any]:
    """The content of evaluation.json."""
    parents = parents_of(config.models)
    models: list[dict[str, Any]] = []
    metrics: dict[str, dict[str, Any]] = {}
    for name, path in config.models.items():
        manifest = read_manifest(path) or {}
        parent = parents[name]
        models.append(
            {
                "name": name, "id": content_id(path), "path": str(path), "stage": manifest.get("stage"),
                "parent": parent, "prompt_format": prompt_format(path),
            }
        )  # fmt: skip
        metrics[name] = {"bits_per_byte": bits[name]}
        for split, given in answers[name].items():
            against = answers[parent][split].judgements if parent else None
            metrics[name][split] = given.figures | (compare(given.judgements, against) if against else {})
    return {
        "models": models,
        "reference": config.reference,
        "splits": {split: SPLITS.get(split, split) for split in prompts},
        "sampling": {
            "temperature": config.rollout.temperature, "max_new_tokens": config.rollout.max_new_tokens,
            "seed": config.seed,
        },
        "num_prompts": {split: len(data) for split, data in prompts.items()},
        "metrics": metrics,
        "samples": samples(config, prompts, answers, tokenizer),
    }  # fmt: skip


def parents_of(models: dict[str, Path]) -> dict[str, str | None]:
    """Name of the model that each was trained from, if it is among them; else of the one before it."""
    names = list(models)
    by_id = {content_id(path): name for name, path in models.items()}
    found: dict[str, str | None] = {}
    for index, name in enumerate(names):
        manifest = read_manifest(models[name]) or {"parents": []}
        origins = [by_id.get(parent["id"]) for parent in manifest["parents"] if parent["role"] == "model"]
        known = [origin for origin in origins if origin is not None]
        found[name] = known[0] if known else names[index - 1] if index else None
    return found


def compare(mine: Sequence[Judgement], others: Sequence[Judgement]) -> dict[str, float]:
    """Share of prompts on which the gold judge prefers this answer, the other, or neither; ties count half."""
    win = sum(a.gold > b.gold for a, b in zip(mine, others, strict=True)) / len(mine)
    lose = sum(a.gold < b.gold for a, b in zip(mine, others, strict=True)) / len(mine)
    tie = 1.0 - win - lose
    return {"win": win, "tie": tie, "lose": lose, "win_rate": win + tie / 2}


def samples(
    config: EvaluateConfig, prompts: dict[str, PromptData], answers: dict[str, dict[str, Answers]], tokenizer: Any
) -> list[dict[str, Any]]:
    """A few prompts of every kind in turn with each model's answer: the first ones, not the best."""
    found: list[dict[str, Any]] = []
    for split, data in prompts.items():
        by_kind: dict[str, list[int]] = {}
        for index, row in enumerate(data.rows):
            by_kind.setdefault(row["kind"], []).append(index)
        firsts = (indices[: config.num_shown] for indices in by_kind.values())
        turns = [index for group in zip(*firsts, strict=False) for index in group]
        for index in turns[: config.num_shown]:
            responses = {}
            for name, given in answers.items():
                rollout = given[split].rollouts[index]
                responses[name] = {
                    "text": response_text(tokenizer, rollout), "stopped": rollout.stopped,
                    "gold": given[split].judgements[index].gold, "reward": given[split].rewards[index],
                }  # fmt: skip
            row = data.rows[index]
            found.append({"split": split, "kind": row["kind"], "prompt": data.text(index), "responses": responses})
    return found


PERCENT = {
    "stop_rate": "stops by itself", "correct": "correct", "correct_greedy": "correct, greedy",
    "honest": "honest about the unknowable", "harmless": "harmless on unsafe requests", "polite": "polite",
    "rude": "rude", "over_refusal": "refuses a good question", "win_rate": "preferred to the one before (ties half)",
}  # fmt: skip
NUMBERS = {
    "gold": "gold score", "reward": "reward-model score", "kl": "drift from SFT, nats an answer", "length": "tokens",
}  # fmt: skip


def print_table(console: Console, evaluation: dict[str, Any]) -> None:
    """Models as columns, one block a split."""
    names = [model["name"] for model in evaluation["models"]]
    table = Table(title="Held-out evaluation", title_justify="left", header_style="bold", pad_edge=False)
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    table.add_row("bits per byte of text", *(f"{evaluation['metrics'][n]['bits_per_byte']:.3f}" for n in names))
    for split, about in evaluation["splits"].items():
        table.add_section()
        table.add_row(f"[dim]{about}[/dim]")
        for key, label in {**NUMBERS, **PERCENT}.items():
            values = [evaluation["metrics"][name][split].get(key) for name in names]
            if any(value is not None for value in values):
                table.add_row(f"  {label}", *(_cell(key, value) for value in values))
    console.print(table)


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if key in PERCENT else f"{value:.2f}"


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("evaluate")
