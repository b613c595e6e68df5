"""Preference optimisation without a reward model: DPO and its kin, straight from rankings (Rafailov et al. 2023)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from rich.console import Console

from jobs.preference_task import PreferenceTask
from jobs.training import placement, train
from rayllm.algorithms.preference import KINDS
from rayllm.config.base import Loaded
from rayllm.config.preference import PreferenceConfig
from rayllm.data.chat import check_chat_template
from rayllm.data.comparisons import Comparison, compared, judged
from rayllm.data.files import check_data_file
from rayllm.data.preferences import RankingData, read_rankings
from rayllm.errors import InputError
from rayllm.models.loading import check_model_dir, load_tokenizer
from rayllm.models.partial import plan_trained
from rayllm.report.run import Run
from rayllm.report.terminal import mark_example, print_preamble


def run(loaded: Loaded[PreferenceConfig], console: Console, *, verbose: bool = False) -> Run:
    """The `preference` job."""
    config = loaded.config
    check_model_dir(config.model, key="model")
    check_data_file(config.preferences, key="preferences")
    check_data_file(config.heldout_preferences, key="heldout_preferences")
    job = Run("preference", loaded)
    if job.done:
        return job
    with job:
        tokenizer = load_tokenizer(config.model)
        check_chat_template(tokenizer, config.model)
        task = prepare(job, config)
        first = task.train[0]
        shown = first.sequences[first.pairs[0][0] if first.pairs else 0]
        print_preamble(
            console,
            job,
            example=mark_example(tokenizer, shown, [i >= first.num_prompt_tokens for i in range(len(shown))]),
            placement=placement(config),
            trained={"model": plan_trained(config.model, config.learner)},
        )
        train(job, task, console, verbose=verbose)
    return job


def prepare(job: Run, config: PreferenceConfig) -> PreferenceTask:
    """Read and encode the rankings, and choose what is compared."""
    tokenizer = load_tokenizer(config.model)
    data: dict[str, list[Comparison]] = {}
    for key in ("preferences", "heldout_preferences"):
        found = read_rankings(getattr(config, key), tokenizer, max_length=config.max_length)
        data[key] = choose(found, config)
        job.add_data(
            key,
            rows=len(found.rankings),
            pairs=sum(len(comparison.pairs) for comparison in data[key]) or found.num_pairs,
            tokens=found.num_tokens,
            dropped=found.dropped,
        )
    rows, heldout = data["preferences"], data["heldout_preferences"]
    if len(rows) < config.batch_size or not heldout:
        raise InputError(
            f"preferences: {len(rows)} prompts with a pair, heldout_preferences: {len(heldout)}; "
            f"batch_size={config.batch_size} needs at least {config.batch_size} and 1"
        )
    num_steps = max(1, int(len(rows) * config.num_epochs / config.batch_size))
    data_id = digest(job.record["inputs"]["model"], config.learner.dtype, [*rows, *heldout])
    return PreferenceTask(config, rows, heldout, int(tokenizer.pad_token_id), num_steps, data_id)


def choose(data: RankingData, config: PreferenceConfig) -> list[Comparison]:
    """What the loss learns from."""
    if KINDS[config.kind].paired:
        return [compared(ranking, config.pairs) for ranking in data.rankings]
    try:
        return judged(data.rankings, config.pairs, max_length=config.max_length)
    except ValueError as error:
        raise InputError(f"kind=kto: {error}") from None


def digest(model_id: str, dtype: str, comparisons: Sequence[Comparison]) -> str:
    """Of all that decides the reference's log-probabilities."""
    found = hashlib.sha256(f"{model_id} {dtype}".encode())
    for comparison in comparisons:
        for sequence in (*comparison.sequences, *comparison.mismatched):
            found.update(f" {comparison.num_prompt_tokens} {len(sequence)} ".encode() + sequence.tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("preference")
