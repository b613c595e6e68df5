"""Preference optimisation without a reward model: DPO and its kin, straight from rankings (Rafailov et al. 2023)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, cast

from rich.console import Console

from jobs.preference_task import PreferenceTask
from jobs.training import placement, train
from rayllm.algorithms.preference import KINDS
from rayllm.config.base import Loaded
from rayllm.config.preference import PreferenceConfig
from rayllm.data.chat import check_chat_template
from rayllm.data.comparisons import Comparison, compared, judged
from rayllm.data.preferences import Feedback, FeedbackData, Ranking, RankingData, read_feedback, read_rankings
from rayllm.data.sources import check_sources, kept
from rayllm.errors import InputError
from rayllm.models.folders import check_model_dir, load_tokenizer
from rayllm.models.partial import plan_trained
from rayllm.report.run import Run
from rayllm.report.terminal import mark_example, print_preamble

Preferences = list[Ranking] | list[Feedback]
"""Rankings for the losses that compare, judged responses for those that do not."""


def run(loaded: Loaded[PreferenceConfig], console: Console, *, verbose: bool = False) -> Run:
    """The `preference` job."""
    config = loaded.config
    check_model_dir(config.model, key="model")
    check_sources(config.preferences, key="preferences")
    if config.heldout_preferences is not None:
        check_sources(config.heldout_preferences, key="heldout_preferences")
    job = Run("preference", loaded)
    if job.done:
        return job
    with job:
        tokenizer = load_tokenizer(config.model)
        check_chat_template(tokenizer, config.model)
        task = prepare(job, config, tokenizer)
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


def prepare(job: Run, config: PreferenceConfig, tokenizer: Any) -> PreferenceTask:
    """Read and encode the preferences, and choose what is compared."""
    rows, heldout = (choose(items, config) for items in read_data(job, config, tokenizer))
    if len(rows) < config.batch_size or not heldout:
        what = "prompts with a pair" if KINDS[config.kind].paired else "judged responses"
        raise InputError(
            f"preferences: {len(rows)} {what} to train on, {len(heldout)} held out; "
            f"batch_size={config.batch_size} needs at least {config.batch_size} and 1"
        )
    num_steps = max(1, int(len(rows) * config.num_epochs / config.batch_size))
    data_id = digest(job.record["inputs"]["model"], config.learner.dtype, [*rows, *heldout])
    return PreferenceTask(config, rows, heldout, int(tokenizer.pad_token_id), num_steps, data_id)


def read_data(job: Run, config: PreferenceConfig, tokenizer: Any) -> tuple[Preferences, Preferences]:
    """(preferences to train on, held-out ones), no prompt in both."""
    read: Any = read_rankings if KINDS[config.kind].paired else read_feedback
    limits = {"max_length": config.max_length, "max_bad_rows": config.max_bad_rows}
    data = read(config.preferences, tokenizer, **limits)
    items: Any = _items(data)
    if config.heldout_preferences is None:
        rows, heldout_rows = data.origins.split(config.heldout_fraction, seed=config.seed)
        note_data(job, "preferences", data, heldout_rows=len(heldout_rows))
        return kept(items, rows), kept(items, heldout_rows)
    note_data(job, "preferences", data)
    heldout = read(config.heldout_preferences, tokenizer, **limits).apart_from(data)
    note_data(job, "heldout_preferences", heldout)
    rows = data.origins.mix(range(len(items)), seed=config.seed)
    return kept(items, rows), _items(heldout)


def choose(items: Preferences, config: PreferenceConfig) -> list[Comparison]:
    """What the loss learns from."""
    if KINDS[config.kind].paired:
        return [compared(ranking, config.pairs) for ranking in cast(list[Ranking], items)]
    try:
        return judged(cast(list[Feedback], items), max_length=config.max_length)
    except ValueError as error:
        raise InputError(f"kind=kto: {error}") from None


def note_data(job: Run, key: str, data: RankingData | FeedbackData, **more: int) -> None:
    """Into the run record."""
    pairs = {"pairs": data.num_pairs} if isinstance(data, RankingData) else {}
    counts = {"rows": len(_items(data)), **pairs, "tokens": data.num_tokens, **more}
    job.add_data(key, **data.origins.facts, **counts, dropped=data.dropped)


def _items(data: RankingData | FeedbackData) -> Preferences:
    return data.rankings if isinstance(data, RankingData) else data.examples


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
