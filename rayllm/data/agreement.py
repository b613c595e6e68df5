"""How often two who ranked the same answers put the same one of a pair first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from rayllm.data.preferences import Ranking

NUM_RESAMPLES = 1000
COVERAGE = 0.95

_Ranked = tuple[Ranking, list[bytes], Sequence[float]]
"""A ranking, the names of its answers, and their scores."""

Tally = tuple[int, int]
"""Pairs of one prompt that both put in the same order, and pairs that both put in an order."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """A share of pairs with its interval."""

    rate: float
    low: float
    high: float
    num_pairs: int


def tally(ranks: Sequence[float], others: Sequence[float]) -> Tally:
    """Count over all pairs of one prompt's answers. A pair that one of the two ties does not count.

    Args:
        ranks: of the answers, lower is better.
        others: of the same answers in the same order.
    """
    same = pairs = 0
    for i, j in combinations(range(len(ranks)), 2):
        product = (ranks[i] - ranks[j]) * (others[i] - others[j])
        same, pairs = same + (product > 0), pairs + (product != 0)
    return same, pairs


def agreement(tallies: Iterable[Tally]) -> Agreement | None:
    """Share of all pairs, with a bootstrap interval over prompts; None without a pair.

    Prompts are drawn and not pairs: the pairs of one prompt share their answers.

    Source: Efron 1979, percentile interval.
    """
    counts = np.array([tally for tally in tallies if tally[1]], dtype=np.float64).reshape(-1, 2)
    if not len(counts):
        return None
    rng = np.random.default_rng(0)
    drawn = counts[rng.integers(len(counts), size=(NUM_RESAMPLES, len(counts)))].sum(1)
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [tail, 1 - tail])
    same, pairs = counts.sum(0)
    return Agreement(float(same / pairs), float(low), float(high), int(pairs))


def compare_labelers(
    rankings: Sequence[Ranking], scores: Sequence[Sequence[float]]
) -> tuple[Agreement | None, Agreement | None]:
    """How often scores agree with the labelers of rankings, and these with each other on the same answers.

    Args:
        rankings: of one or several labelers; those with the same prompt and answers are compared with each other.
        scores: of each ranking's answers, higher is better.

    Returns:
        Scores with labelers, labelers with each other (None where nothing was ranked twice). Where several labelers
        ranked, the first is over the same answers as the second.
    """
    groups: dict[frozenset[bytes], dict[str | None, _Ranked]] = {}
    for ranking, given in zip(rankings, scores, strict=True):
        answers = [sequence.tobytes() for sequence in ranking.sequences]
        groups.setdefault(frozenset(answers), {}).setdefault(ranking.labeler, (ranking, answers, given))
    several = [group for group in groups.values() if len(group) > 1]
    with_scores, with_each_other = [], []
    for group in several or groups.values():
        by_labeler = list(group.values())
        with_scores.append(_sum(tally(ranking.ranks, [-score for score in given]) for ranking, _, given in by_labeler))
        with_each_other.append(
            _sum(
                tally(one.ranks, _as_in(answers, other, others))
                for (one, answers, _), (other, others, _) in combinations(by_labeler, 2)
            )
        )
    return agreement(with_scores), agreement(with_each_other)


def _as_in(names: Sequence[bytes], ranking: Ranking, others: Sequence[bytes]) -> list[int]:
    """The ranks in the order of ``names``."""
    rank_of = dict(zip(others, ranking.ranks, strict=True))
    return [rank_of[name] for name in names]


def _sum(tallies: Iterable[Tally]) -> Tally:
    listed = list(tallies)
    return sum(same for same, _ in listed), sum(pairs for _, pairs in listed)
