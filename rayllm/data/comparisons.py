"""What the preference job learns from: responses to one prompt, and which is better or which are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rayllm.data.preferences import Feedback, Ranking

PairChoice = Literal["all", "best_worst"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Responses to one prompt; `pairs` for losses that compare, `desirable` for those that do not."""

    sequences: list[np.ndarray]  # prompt and response, (T_i,) int64 each
    num_prompt_tokens: int
    pairs: list[tuple[int, int]]
    """(better, worse), places in ``sequences``; empty where responses are not compared."""

    desirable: list[bool]
    """Of each of ``sequences``; empty where responses are compared."""

    mismatched: list[np.ndarray]
    """This prompt with responses to another one, as many as ``sequences``; empty where responses are compared."""

    @property
    def longest(self) -> int:
        return max(len(sequence) for sequence in self.sequences)


def compared(ranking: Ranking, choice: PairChoice) -> Comparison:
    """The pairs of a ranking with a better and a worse response.

    Args:
        choice: "all" of them, or the first of the best with the first of the worst; the others are left out then.
    """
    best, worst = ranking.ranks.index(min(ranking.ranks)), ranking.ranks.index(max(ranking.ranks))
    if choice == "best_worst":
        return Comparison(
            [ranking.sequences[best], ranking.sequences[worst]], ranking.num_prompt_tokens, [(0, 1)], [], []
        )
    places = range(len(ranking.ranks))
    pairs = [(i, j) for i in places for j in places if ranking.ranks[i] < ranking.ranks[j]]
    return Comparison(ranking.sequences, ranking.num_prompt_tokens, pairs, [], [])


def judged(feedback: Sequence[Feedback], *, max_length: int) -> list[Comparison]:
    """Every judged response by itself, and its prompt with the next response that is to another prompt.

    Args:
        max_length: mismatched sequences are cut to it.

    Raises:
        ValueError: all responses are to the same prompt.
    """
    found = []
    for index, example in enumerate(feedback):
        mismatched = np.concatenate([example.prompt, _other_response(feedback, index)])[:max_length]
        found.append(Comparison([example.sequence], example.num_prompt_tokens, [], [example.desirable], [mismatched]))
    return found


def _other_response(feedback: Sequence[Feedback], index: int) -> np.ndarray:
    for step in range(1, len(feedback)):
        other = feedback[(index + step) % len(feedback)]
        if not np.array_equal(other.prompt, feedback[index].prompt):
            return other.sequence[other.num_prompt_tokens :]
    raise ValueError("all responses are to the same prompt: there is no response to another one to compare with")
