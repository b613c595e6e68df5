"""What people prefer, encoded: rankings (one prompt, several responses, who is better) and single judgements.

Where a row brings `response_ids` (the tokens as sampled, end-of-turn token included where the model produced it) they
are taken as they are; else the text is encoded with the chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rayllm.data.chat import encode_conversation, prompt_token_ids
from rayllm.data.messages import Message, first_user_turn
from rayllm.data.rows import Row, RowDropped, RowError
from rayllm.data.sources import Origins, Paths, Reader, kept


@dataclass(frozen=True, slots=True)
class Ranking:
    """Encoded responses of one prompt and their ranks."""

    sequences: list[np.ndarray]  # prompt and response, (T_i,) int64 each
    ranks: list[int]
    """Aligned to ``sequences``; 0 is best, ties share a rank."""

    num_prompt_tokens: int
    """Every sequence begins with the prompt; what follows is the response."""

    labeler: str | None = None
    """Who ranked."""

    scores: list[float] | None = None
    """Aligned to ``sequences``, higher is better; of a pair with a margin, the margin and 0."""

    category: str | None = None
    """What kind of prompt it is."""

    criteria: str | None = None
    """By what was ranked."""

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) responses of every pair that has a better one."""
        numbered = list(enumerate(self.ranks))
        return [(i, j) for i, a in numbered for j, b in numbered if a < b]

    @property
    def num_pairs(self) -> int:
        """Pairs with a better and a worse response."""
        return len(self.pairs)

    def select(self, rows: Sequence[int]) -> Ranking:
        """The ranking of these responses alone."""
        scores = None if self.scores is None else [self.scores[row] for row in rows]
        sequences, ranks = [self.sequences[row] for row in rows], [self.ranks[row] for row in rows]
        return replace(self, sequences=sequences, ranks=ranks, scores=scores)


@dataclass(frozen=True, slots=True)
class RankingData:
    rankings: list[Ranking]
    dropped: dict[str, int]
    origins: Origins = field(default_factory=Origins)

    def apart_from(self, train: RankingData) -> RankingData:
        """Without the rankings of prompts that stand in ``train``; they are counted as dropped."""
        rows, dropped = self.origins.apart_from(train.origins, self.dropped)
        return RankingData(kept(self.rankings, rows), dropped, self.origins.of(rows))

    @property
    def num_pairs(self) -> int:
        return sum(r.num_pairs for r in self.rankings)

    @property
    def num_tokens(self) -> int:
        return sum(len(s) for r in self.rankings for s in r.sequences)


@dataclass(frozen=True, slots=True)
class Feedback:
    """One judged response."""

    sequence: np.ndarray  # prompt and response, (T,) int64
    num_prompt_tokens: int
    desirable: bool

    @property
    def prompt(self) -> np.ndarray:
        return self.sequence[: self.num_prompt_tokens]


@dataclass(frozen=True, slots=True)
class FeedbackData:
    examples: list[Feedback]
    dropped: dict[str, int]
    origins: Origins = field(default_factory=Origins)

    def apart_from(self, train: FeedbackData) -> FeedbackData:
        """Without the responses to prompts that stand in ``train``; they are counted as dropped."""
        rows, dropped = self.origins.apart_from(train.origins, self.dropped)
        return FeedbackData(kept(self.examples, rows), dropped, self.origins.of(rows))

    @property
    def num_tokens(self) -> int:
        return sum(len(e.sequence) for e in self.examples)


def read_rankings(paths: Paths, tokenizer: Any, *, max_length: int, max_bad_rows: int = 0) -> RankingData:
    """Read and encode rankings; responses over ``max_length`` tokens and prompts left without a pair are dropped.

    Raises:
        InputError: more malformed rows than ``max_bad_rows``, by file, line, field and reason.
    """
    reader = Reader(paths, "ranking", max_bad_rows=max_bad_rows)

    def encode(row: Row) -> tuple[Ranking, str]:
        num_prompt_tokens, sequences = _encode(row, tokenizer)
        short = [index for index, sequence in enumerate(sequences) if len(sequence) <= max_length]
        if len(short) < len(sequences):
            reader.dropped["response longer than max_length"] += len(sequences) - len(short)
        ranking = Ranking(
            sequences,
            row["ranks"],
            num_prompt_tokens,
            labeler=row["labeler"],
            scores=row["scores"],
            category=row["category"],
            criteria=row["criteria"],
        ).select(short)
        if not ranking.num_pairs:
            raise RowDropped("no pair with a better response")
        return ranking, first_user_turn(row["prompt"])

    rankings, origins = reader.collect(encode)
    return RankingData(rankings, dict(reader.dropped), origins)


def read_feedback(paths: Paths, tokenizer: Any, *, max_length: int, max_bad_rows: int = 0) -> FeedbackData:
    """Read and encode single judgements; of a ranking the best are desirable, the worst are not, and the rest is left
    out. Responses over ``max_length`` tokens are dropped.

    Raises:
        InputError: more malformed rows than ``max_bad_rows``, by file, line, field and reason.
    """
    reader = Reader(paths, "feedback", max_bad_rows=max_bad_rows)

    def encode(row: Row) -> tuple[list[Feedback], str]:
        num_prompt_tokens, sequences = _encode(row, tokenizer)
        examples = [
            Feedback(sequence, num_prompt_tokens, desirable)
            for sequence, desirable in zip(sequences, row["desirable"], strict=True)
            if len(sequence) <= max_length
        ]
        if len(examples) < len(sequences):
            reader.dropped["response longer than max_length"] += len(sequences) - len(examples)
        return examples, first_user_turn(row["prompt"])

    groups, origins = reader.collect(encode)
    return FeedbackData(
        [example for group in groups for example in group], dict(reader.dropped), origins.spread(groups)
    )


def _encode(row: Row, tokenizer: Any) -> tuple[int, list[np.ndarray]]:
    """(tokens of the prompt, prompt and response of each response)."""
    prompt = prompt_token_ids(tokenizer, row["prompt"])
    if row["response_ids"] is not None:
        for index, ids in enumerate(row["response_ids"]):
            if max(ids) >= len(tokenizer):
                raise RowError(
                    f"response_ids[{index}]",
                    f"has token {max(ids)}, outside the tokenizer's vocabulary of {len(tokenizer)}",
                )
        return len(prompt), [np.asarray([*prompt, *ids], dtype=np.int64) for ids in row["response_ids"]]
    turns = [[*row["prompt"], _answer(text)] for text in row["responses"]]
    sequences = [encode_conversation(tokenizer, turn).token_ids for turn in turns]
    if any(sequence[: len(prompt)].tolist() != prompt for sequence in sequences):
        raise RowError("prompt", "the chat template renders it otherwise once the answer follows")
    return len(prompt), sequences


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}
