"""What the preference job learns from: responses to one prompt, and which is better or which are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rayllm.data.preferences import Ranking

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


def judged(rankings: Sequence[Ranking], choice: PairChoice, *, max_length: int) -> list[Comparison]:
    """Every ranking's responses as wanted or unwanted, with mismatched ones of the next ranking that has another
    prompt.

    Args:
        choice: "all": wanted are those that beat more responses than they lose to, unwanted the opposite, and those in
            between are left out; "best_worst": the best are wanted, the worst unwanted.
        max_length: mismatched sequences are cut to it.

    Raises:
        ValueError: all rankings have the same prompt.
    """
    found = []
    for index, ranking in enumerate(rankings):
        signs = [_sign(rank, ranking.ranks, choice) for rank in ranking.ranks]
        sequences = [sequence for sequence, sign in zip(ranking.sequences, signs, strict=True) if sign]
        prompt = ranking.sequences[0][: ranking.num_prompt_tokens]
        others = _other_responses(rankings, index)
        mismatched = [np.concatenate([prompt, others[i % len(others)]])[:max_length] for i in range(len(sequences))]
        desirable = [sign > 0 for sign in signs if sign]
        found.append(Comparison(sequences, ranking.num_prompt_tokens, [], desirable, mismatched))
    return found


def _sign(rank: int, ranks: Sequence[int], choice: PairChoice) -> int:
    """1 wanted, -1 unwanted, 0 neither."""
    if choice == "best_worst":
        return int(rank == min(ranks)) - int(rank == max(ranks))
    balance = sum(other > rank for other in ranks) - sum(other < rank for other in ranks)
    return (balance > 0) - (balance < 0)


def _other_responses(rankings: Sequence[Ranking], index: int) -> list[np.ndarray]:
    mine = rankings[index]
    prompt = mine.sequences[0][: mine.num_prompt_tokens]
    for step in range(1, len(rankings)):
        other = rankings[(index + step) % len(rankings)]
        if not np.array_equal(other.sequences[0][: other.num_prompt_tokens], prompt):
            return [sequence[other.num_prompt_tokens :] for sequence in other.sequences]
    raise ValueError("all responses are to the same prompt: there is no response to another one to compare with")
