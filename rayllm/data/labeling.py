"""What a reward model's scores make of sampled answers: rankings, best answers, pairs, and what people should see.

One rule says how sure an order is: the chance of Bradley and Terry that the better answer is the better one,
sigmoid(logit - other logit), averaged over the reward model's heads. A small gap brings it to a half, and so do heads
that disagree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from rayllm.data.chat import Message
from rayllm.data.files import Row

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

ANSWERS = [
    ("prompt", MESSAGES),
    ("responses", pa.list_(pa.string())),
    ("response_ids", pa.list_(pa.list_(pa.int64()))),
]

SCHEMAS = {
    "rankings": pa.schema(
        [*ANSWERS, ("ranks", pa.list_(pa.int64())), ("labeler", pa.string()), ("scores", pa.list_(pa.float64()))]
    ),
    "for_people": pa.schema(
        [*ANSWERS, ("labeler", pa.string()), ("scores", pa.list_(pa.float64())), ("probability", pa.float64())]
    ),
    "best": pa.schema([("messages", MESSAGES), ("reward", pa.float64()), ("labeler", pa.string())]),
    "pairs": pa.schema(
        [("prompt", MESSAGES), ("chosen", MESSAGES), ("rejected", MESSAGES)]
        + [(name, pa.float64()) for name in ("chosen_reward", "rejected_reward", "probability")]
        + [("labeler", pa.string())]
    ),
}
"""Columns of what the reward model's labels are written as."""

BUFFER = 4096
"""Rows kept before they are written."""


@dataclass(frozen=True, slots=True)
class ScoredAnswers:
    """The different answers to one prompt, in the order in which they were first sampled."""

    prompt: list[Message]
    responses: list[str]
    response_ids: list[list[int]]
    stopped: list[bool]
    """The model ended its turn by itself."""

    scores: list[float]
    """In standard deviations of the reward model's rewards on held-out data."""

    logits: list[list[float]]
    """For each answer what each head of the reward model says, in the units of its training."""

    @property
    def order(self) -> list[int]:
        """Indices of the answers, best first; of equal ones the first sampled is first."""
        return sorted(range(len(self.scores)), key=lambda index: -self.scores[index])

    @property
    def best(self) -> int | None:
        """Index of the best answer that is finished: a cut one would teach to stop in the middle."""
        return next((index for index in self.order if self.stopped[index]), None)

    def probability(self, better: int, worse: int) -> float:
        """That the first of two answers is the better one."""
        return order_probability(self.logits[better], self.logits[worse])


def order_probability(better: Sequence[float], worse: Sequence[float]) -> float:
    """Mean over heads of sigmoid(better - worse).

    Source: Bradley and Terry 1952; the mean over an ensemble: Lakshminarayanan et al. 2017.
    """
    gaps = [a - b for a, b in zip(better, worse, strict=True)]
    return sum(0.5 * (1 + math.tanh(gap / 2)) for gap in gaps) / len(gaps)


def ranking_rows(answers: ScoredAnswers, *, labeler: str, set_aside_below: float) -> tuple[str, Row] | None:
    """A row of "rankings", or of "for_people" where the order of the best two is too unsure; None for one answer."""
    if len(answers.responses) < 2:
        return None
    first, second = answers.order[:2]
    probability = answers.probability(first, second)
    row: Row = {
        "prompt": answers.prompt, "responses": answers.responses, "response_ids": answers.response_ids,
        "labeler": labeler, "scores": answers.scores,
    }  # fmt: skip
    if probability < set_aside_below:
        return "for_people", {**row, "probability": probability}
    rank_of = {score: rank for rank, score in enumerate(sorted(set(answers.scores), reverse=True))}
    return "rankings", {**row, "ranks": [rank_of[score] for score in answers.scores]}


def best_row(answers: ScoredAnswers, *, labeler: str) -> Row | None:
    """The best answer as a demonstration, or None where none is finished."""
    best = answers.best
    if best is None:
        return None
    messages = [*answers.prompt, _said(answers.responses[best])]
    return {"messages": messages, "reward": answers.scores[best], "labeler": labeler}


def pair_row(answers: ScoredAnswers, *, labeler: str, set_aside_below: float) -> Row | None:
    """The best finished answer against the worst one, or None where their order is too unsure."""
    best, worst = answers.best, answers.order[-1]
    if best is None or best == worst or answers.probability(best, worst) < set_aside_below:
        return None
    return {
        "prompt": answers.prompt,
        "chosen": [_said(answers.responses[best])],
        "rejected": [_said(answers.responses[worst])],
        "chosen_reward": answers.scores[best],
        "rejected_reward": answers.scores[worst],
        "probability": answers.probability(best, worst),
        "labeler": labeler,
    }


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text}


class RowWriter:
    """Writes rows of one kind as they come, aside; the file has its name when all are there."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._path = folder / f"{kind}.parquet"
        self._aside = self._path.with_name(self._path.name + ".partial")
        self._schema = SCHEMAS[kind]
        self._writer = pq.ParquetWriter(self._aside, self._schema)
        self._rows: list[Row] = []
        self.count = 0
        """Rows so far."""

    def __enter__(self) -> Self:
        return self

    def add(self, row: Row) -> None:
        self._rows.append(row)
        self.count += 1
        if len(self._rows) == BUFFER:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self._writer.close()
        if kind is None:
            self._aside.replace(self._path)
