"""Responses in steps, each labelled right or wrong: what a process reward model learns from, and where its steps end.

A row has `prompt` (text or messages), `completions` (the steps, in order) and `labels` (a bool each): TRL's stepwise
supervision. The steps are joined by a separator and read as one response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from rayllm.data.chat import prompt_token_ids
from rayllm.data.messages import first_user_turn
from rayllm.data.rows import Row, RowDropped
from rayllm.data.sources import Origins, Paths, Reader


@dataclass(frozen=True, slots=True)
class LabelledSteps:
    """One response."""

    token_ids: np.ndarray  # (T,) int64, prompt and response with its end-of-turn token
    ends: list[int]
    """Place of each step's last token, its separator counted in."""

    labels: list[bool]


@dataclass(frozen=True, slots=True)
class StepData:
    rows: list[LabelledSteps]
    dropped: dict[str, int]
    origins: Origins

    @property
    def num_steps(self) -> int:
        return sum(len(row.labels) for row in self.rows)

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)


class StepFinder:
    """Finds where the steps of a response end, the same way in training data and in what a policy sampled."""

    def __init__(self, tokenizer: Any, separator: str) -> None:
        """
        Args:
            tokenizer: of the model.
            separator: text that one token holds, alone or with more: a line end is.
        """
        self.separator = separator
        self._text = lru_cache(maxsize=None)(lambda token_id: tokenizer.decode([token_id], skip_special_tokens=True))

    def ends(self, token_ids: Sequence[int]) -> list[int]:
        """Places of the last token of each step: the separator after some text, or the end of the response."""
        found, has_text = [], False
        for place, token_id in enumerate(token_ids):
            before, *after = self._text(token_id).split(self.separator)
            has_text = has_text or bool(before.strip())
            if after:
                if has_text:
                    found.append(place)
                has_text = bool(after[-1].strip())
        return [*found, len(token_ids) - 1] if has_text else found


def read_steps(paths: Paths, tokenizer: Any, *, separator: str, max_length: int, max_bad_rows: int = 0) -> StepData:
    """Read and encode labelled steps; rows over ``max_length`` tokens, and rows whose steps hold the separator and can
    not be told apart, are dropped and counted.

    Raises:
        InputError: more malformed rows than ``max_bad_rows``, by file, line, field and reason.
    """
    reader = Reader(paths, "steps", max_bad_rows=max_bad_rows)
    finder = StepFinder(tokenizer, separator)

    def encode(row: Row) -> tuple[LabelledSteps, str]:
        prompt = prompt_token_ids(tokenizer, row["prompt"])
        text = separator.join(step.strip() for step in row["steps"])
        response = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        ends = [len(prompt) + end for end in finder.ends(response)]
        if len(prompt) + len(response) > max_length:
            raise RowDropped(f"longer than {max_length} tokens")
        if len(ends) != len(row["labels"]):
            raise RowDropped("a step is empty or holds the separator")
        tokens = np.asarray([*prompt, *response], dtype=np.int64)
        return LabelledSteps(tokens, ends, row["labels"]), first_user_turn(row["prompt"])

    rows, origins = reader.collect(encode)
    return StepData(rows, dict(reader.dropped), origins)
