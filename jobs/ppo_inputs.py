"""What a run of RL reads: looked at before anything starts, read while Ray comes up. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actors.reward_child import load_reward_function
from actors.reward_verifiers import check_verifier
from jobs.judging import check_world_rows
from rayllm.config.ppo import PPOConfig
from rayllm.config.reward import FunctionSource, RewardConfig, VerifierSource
from rayllm.data.files import check_data_file
from rayllm.data.prompts import PromptData, read_prompts
from rayllm.data.sources import check_sources, shown_paths
from rayllm.environments.loading import load_environment, make_prompts
from rayllm.errors import InputError
from rayllm.models.folders import check_model_dir, check_same_tokens, max_positions
from rayllm.report.run import Run


def check_inputs(config: PPOConfig) -> None:
    """Raise InputError unless all models, files, functions and packages that the config names are there."""
    check_model_dir(config.model, key="model")
    readers = {"reward_model": config.reward_models, "critic.model": (config.critic.model,)}
    for key, folder in [(key, folder) for key, folders in readers.items() for folder in folders if folder is not None]:
        check_reader(config.model, folder, key=key)
    if config.prompts is not None:
        check_sources(config.prompts, key="prompts")
    for key, path in (("eval.prompts", config.eval.prompts),
                      ("ptx.documents", config.ptx.documents), ("eval.documents", config.eval.documents)):  # fmt: skip
        if path is not None:
            check_data_file(path, key=key)
    check_reward_sources(config)


def check_reward_sources(config: PPOConfig) -> None:
    """Raise InputError unless every source's model, function, package or sandbox is there."""
    for name, source in config.reward.by_name.items():
        if isinstance(source, FunctionSource):
            load_reward_function(source.function)
        elif isinstance(source, VerifierSource):
            check_verifier(source)
        elif source.kind == "model":
            for folder in source.folders:
                check_reader(config.model, folder, key=f"reward.sources.{name}.model")
        elif source.kind == "process":
            check_reader(config.model, source.model, key=f"reward.sources.{name}.model")


def check_reader(model: Path, folder: Path, *, key: str) -> None:
    """Raise InputError unless a folder is a model that reads the policy's tokens."""
    check_model_dir(folder, key=key)
    check_same_tokens(model, folder, key=key)


def read_data(job: Run, config: PPOConfig, tokenizer: Any) -> tuple[PromptData, PromptData | None]:
    """Prompts to train on, and held-out ones if there are any; the text to mix in is left in ``ptx.npy``.

    Raises:
        InputError: too few prompts for one step, rows that the judge cannot read, or an unusable environment.
    """
    if config.ptx.documents is not None:
        from rayllm.data.text import tokenize_documents

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


def check_rows(config: RewardConfig, prompts: PromptData, *, key: str) -> None:
    """Raise InputError unless every prompt has what the sources read of it."""
    for name, source in config.by_name.items():
        if source.kind == "gold":
            check_world_rows(prompts.rows, key=key)
        if not isinstance(source, VerifierSource) or not source.needs_column:
            continue
        for index, row in enumerate(prompts.rows):
            if row.get(source.column) is None:
                raise InputError(
                    f"{key}: row {index}: no {source.column!r}, which reward.sources.{name}.column names; the row has: "
                    f"{', '.join(row)}"
                )
