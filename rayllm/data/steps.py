"""Responses in steps, each labelled right or wrong: what a process reward model learns from, and where its steps end.

A row has `prompt` (text or messages), `completions` (the steps, in order) and `labels` (a bool each): TRL's stepwise
supervision. The steps are joined by a separator and read as one response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from rayllm.data.chat import messages_problem, prompt_messages, prompt_token_ids
from rayllm.data.files import Row, read_rows


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


def read_steps(path: Path, tokenizer: Any, *, separator: str, max_length: int) -> StepData:
    """Read and encode labelled steps; rows over ``max_length`` tokens, and rows whose steps hold the separator and can
    not be told apart, are dropped and counted.

    Raises:
        InputError: a malformed row, by its number.
    """
    finder = StepFinder(tokenizer, separator)
    rows = []
    dropped = {f"longer than {max_length} tokens": 0, "a step is empty or holds the separator": 0}
    for row in read_rows(path, ["prompt", "completions", "labels"], check=_problem):
        prompt = prompt_token_ids(tokenizer, prompt_messages(row["prompt"]))
        text = separator.join(step.strip() for step in row["completions"])
        response = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        ends = [len(prompt) + end for end in finder.ends(response)]
        if len(prompt) + len(response) > max_length:
            dropped[f"longer than {max_length} tokens"] += 1
        elif len(ends) != len(row["labels"]):
            dropped["a step is empty or holds the separator"] += 1
        else:
            labels = [bool(label) for label in row["labels"]]
            rows.append(LabelledSteps(np.asarray([*prompt, *response], dtype=np.int64), ends, labels))
    return StepData(rows, {reason: count for reason, count in dropped.items() if count})


def _problem(row: Row) -> str | None:
    steps, labels = row["completions"], row["labels"]
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) for step in steps):
        return "'completions' must be a list of steps, each a text"
    if not isinstance(labels, list) or len(labels) != len(steps):
        return f"'labels' must be a list of {len(steps)} bools, one a step, got {labels!r:.60}"
    if not all(isinstance(label, bool | int) and label in (0, 1) for label in labels):
        return f"'labels' must be bools, got {labels!r:.60}"
    return messages_problem(row["prompt"])
