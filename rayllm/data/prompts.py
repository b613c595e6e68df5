"""Prompts to sample answers for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayllm.data.chat import Message, prompt_messages, prompt_problem, prompt_token_ids
from rayllm.data.files import Row, read_rows
from rayllm.errors import InputError


@dataclass(frozen=True, slots=True)
class PromptData:
    """Rows of a prompt file; ``prompt_id`` everywhere is the index into these lists."""

    rows: list[Row]
    token_ids: list[list[int]]
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.rows)

    def messages(self, prompt_id: int) -> list[Message]:
        """Of a prompt that is text or messages."""
        return prompt_messages(self.rows[prompt_id]["prompt"])

    def text(self, prompt_id: int) -> str:
        """The last user turn, for people to read."""
        return self.messages(prompt_id)[-1]["content"]


def read_prompts(path: Path, tokenizer: Any, *, max_prompt_tokens: int, limit: int | None = None) -> PromptData:
    """Read the `prompt` column: text or messages, encoded with the chat template, or token ids, taken as they are.

    Other columns are kept: reward functions and judges may need them. Prompts over ``max_prompt_tokens`` are
    dropped and counted.

    Raises:
        InputError: a malformed row, an unknown token id, or no prompt left.
    """
    vocab_size = len(tokenizer)
    rows: list[Row] = []
    token_ids: list[list[int]] = []
    dropped = 0
    for row in read_rows(path, ["prompt"], check=lambda row: prompt_problem(row["prompt"], vocab_size=vocab_size)):
        prompt = row["prompt"]
        given = not isinstance(prompt, str) and isinstance(prompt[0], int)
        ids = list(prompt) if given else prompt_token_ids(tokenizer, prompt_messages(prompt))
        if len(ids) > max_prompt_tokens:
            dropped += 1
            continue
        rows.append(row)
        token_ids.append(ids)
        if limit is not None and len(rows) == limit:
            break
    if not rows:
        raise InputError(f"{path}: no prompt of at most {max_prompt_tokens} tokens")
    return PromptData(rows, token_ids, {f"longer than {max_prompt_tokens} tokens": dropped} if dropped else {})


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """Prompts that follow each other in an epoch's order: which they are is known to whoever knows the order."""

    epoch: int
    start: int
    count: int

    def split(self, parts: int) -> list[PromptSpan]:
        """Equal parts. Raises ValueError when it does not divide."""
        size, rest = divmod(self.count, parts)
        if rest:
            raise ValueError(f"{self.count} prompts do not divide into {parts} parts")
        return [PromptSpan(self.epoch, self.start + part * size, size) for part in range(parts)]


class PromptStream:
    """The prompts in the order in which they are used: every epoch is a new seeded permutation.

    ``take`` never spans two epochs, so that no prompt comes twice in one batch; what is left of an epoch is then
    left out. ``position`` is all that a resumed run needs.
    """

    def __init__(self, num_prompts: int, *, seed: int, position: tuple[int, int] = (0, 0)) -> None:
        self.num_prompts, self.seed = num_prompts, seed
        self.position = position
        """(epoch, prompts of it that were taken)."""
        self._order: tuple[int, np.ndarray] | None = None

    def take(self, count: int) -> PromptSpan:
        """The next ``count`` prompts."""
        if count > self.num_prompts:
            raise ValueError(f"{count} prompts wanted at once, there are {self.num_prompts}")
        epoch, start = self.position
        if start + count > self.num_prompts:
            epoch, start = epoch + 1, 0
        self.position = (epoch, start + count)
        return PromptSpan(epoch, start, count)

    def ids(self, span: PromptSpan) -> list[int]:
        """Prompt ids of a span."""
        if self._order is None or self._order[0] != span.epoch:
            self._order = span.epoch, np.random.default_rng((self.seed, span.epoch)).permutation(self.num_prompts)
        return self._order[1][span.start : span.start + span.count].tolist()
