"""Prompts to sample answers for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from rayllm.data.chat import prompt_messages, prompt_token_ids
from rayllm.data.messages import Message, first_user_turn
from rayllm.data.rows import Row, RowDropped, RowError
from rayllm.data.sources import PROMPT_TRAINED, Origins, Paths, Reader, kept, shown_paths
from rayllm.errors import InputError

LongPrompts = Literal["drop", "cut", "stop"]


@dataclass(frozen=True, slots=True)
class PromptData:
    """Rows of a prompt file; ``prompt_id`` everywhere is the index into these lists."""

    rows: list[Row]
    token_ids: list[list[int]]
    dropped: dict[str, int]
    facts: dict[str, Any] = field(default_factory=dict)
    """What was read as what, for the run record."""

    def __len__(self) -> int:
        return len(self.rows)

    def apart_from(self, train: PromptData) -> PromptData:
        """Without the prompts that stand in ``train``; they are counted as dropped."""
        known = {_identity(row) for row in train.rows}
        rows = [index for index, row in enumerate(self.rows) if _identity(row) not in known]
        dropped = dict(self.dropped)
        if len(rows) < len(self.rows):
            dropped[PROMPT_TRAINED] = len(self.rows) - len(rows)
        return PromptData(kept(self.rows, rows), kept(self.token_ids, rows), dropped, self.facts)

    def messages(self, prompt_id: int) -> list[Message]:
        """Of a prompt that is text or messages."""
        return prompt_messages(self.rows[prompt_id]["prompt"])

    def text(self, prompt_id: int) -> str:
        """The last user turn, for people to read."""
        return self.messages(prompt_id)[-1]["content"]


def _identity(row: Row) -> str:
    """What tells prompts apart: the first user turn, or the token ids."""
    prompt = row["prompt"]
    if isinstance(prompt, list) and isinstance(prompt[0], int):
        return str(prompt)
    return first_user_turn(prompt_messages(prompt))


def read_prompts(
    paths: Paths,
    tokenizer: Any,
    *,
    max_prompt_tokens: int,
    long_prompts: LongPrompts = "drop",
    limit: int | None = None,
    max_bad_rows: int = 0,
    seed: int = 0,
) -> PromptData:
    """Read prompts: text or messages, encoded with the chat template, or token ids, taken as they are.

    Other columns are kept: reward functions and judges may need them. Prompts over ``max_prompt_tokens`` are
    counted. A prompt that stands there several times is counted too, and stays that often: each has its
    own id, and what belongs together is told by ids.

    Args:
        paths: one source, or several with weights.
        tokenizer: with a chat template.
        max_prompt_tokens: longest prompt.
        long_prompts: whether longer ones are left out, lose their beginning or are bad rows.
        limit: stop after so many prompts.
        max_bad_rows: bad rows that are passed over.
        seed: of which rows of a source with a fractional weight are used.

    Raises:
        InputError: more malformed rows than ``max_bad_rows``, an unknown token id among them, or no prompt left.
    """
    if max_prompt_tokens < 1:
        raise InputError("rollout.max_new_tokens: leaves no room for a prompt; set it below what the model takes")
    vocab_size, num_cut = len(tokenizer), 0

    def encode(row: Row) -> tuple[Row, list[int]]:
        nonlocal num_cut
        prompt = row["prompt"]
        given = not isinstance(prompt, str) and isinstance(prompt[0], int)
        ids = list(prompt) if given else prompt_token_ids(tokenizer, prompt_messages(prompt))
        if max(ids, default=0) >= vocab_size:
            raise RowError("prompt", f"has token {max(ids)}, outside the tokenizer's vocabulary of {vocab_size}")
        if len(ids) > max_prompt_tokens:
            if long_prompts == "stop":
                raise RowError("prompt", f"has {len(ids)} tokens, {max_prompt_tokens} fit; see rollout.long_prompts")
            if long_prompts == "drop":
                raise RowDropped(f"longer than {max_prompt_tokens} tokens")
            num_cut += 1
        return row, ids[-max_prompt_tokens:]

    reader = Reader(paths, "prompt", max_bad_rows=max_bad_rows)
    origins = Origins(tuple(source.weight for source in reader.sources))
    found: list[tuple[Row, list[int]]] = []
    for source, item in reader.rows(encode):
        found.append(item)
        origins.sources.append(source)
        if len(found) == limit:
            break
    if not found:
        raise InputError(f"{shown_paths(paths)}: no prompt of at most {max_prompt_tokens} tokens")
    found = kept(found, origins.mix(range(len(found)), seed=seed))
    rows, token_ids = [row for row, _ in found], [ids for _, ids in found]
    again = len(token_ids) - len({tuple(ids) for ids in token_ids})
    facts = reader.facts() | {name: n for name, n in (("duplicates", again), ("cut", num_cut)) if n}
    return PromptData(rows, token_ids, dict(reader.dropped), facts)


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """Prompts that follow each other in an epoch's order: which they are is known to whoever knows the order."""

    epoch: int
    start: int
    count: int

    def split(self, parts: int) -> list[PromptSpan]:
        """Parts of sizes that differ by one at most, in order; fewer where there are not as many prompts."""
        ends = [self.count * part // parts for part in range(parts + 1)]
        sizes = [(start, end - start) for start, end in zip(ends[:-1], ends[1:], strict=True)]
        return [PromptSpan(self.epoch, self.start + start, size) for start, size in sizes if size]


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
