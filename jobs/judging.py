"""Rollouts as text, before the toy world's judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rayllm.data.files import Row
from rayllm.errors import InputError
from rayllm.world.judge import Judgement, judge
from rayllm.world.prompts import Prompt

if TYPE_CHECKING:  # torch
    from rayllm.data.rollout import Rollout


def response_text(tokenizer: Any, rollout: Rollout) -> str:
    """What a person reads: special tokens left out."""
    return str(tokenizer.decode(list(rollout.token_ids), skip_special_tokens=True)).strip()


def judge_rollouts(rows: Sequence[Row], rollouts: Sequence[Rollout], tokenizer: Any) -> list[Judgement]:
    """The gold judge on every rollout, by its prompt's row."""
    return [
        judge(Prompt.from_row(rows[r.prompt_id]), response_text(tokenizer, r), stopped=r.stopped) for r in rollouts
    ]


def check_world_rows(rows: Sequence[Mapping[str, Any]], *, key: str) -> None:
    """Raise InputError unless the gold judge can read these prompts."""
    for index, row in enumerate(rows):
        try:
            Prompt.from_row(row)
        except ValueError as error:
            raise InputError(f"{key}: row {index}: the gold judge needs the toy world's columns: {error}") from None
