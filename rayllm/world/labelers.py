"""Simulated people who rank responses.

Noise 0.2 is a careful annotator, 0.4 to 0.8 are about as consistent as real ones, 1.5 is hasty.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Sequence


def rank_responses(scores: Sequence[float], *, noise: float, rng: random.Random) -> list[int]:
    """The ranks a Plackett-Luce annotator gives: sorted by score + noise * Gumbel(0, 1).

    Args:
        scores: true quality of each response, finite, higher is better.
        noise: scale of the annotator's errors in score units, 0 or more. The chance to put i before j is
            sigmoid((scores[i] - scores[j]) / noise).

    Returns:
        One rank a response, 0 is best. With noise 0 equal scores share a rank and no rank is skipped;
        with more there are no ties.

    Raises:
        ValueError: negative or non-finite noise, or a score that is not finite.

    Source: Plackett 1975, "The analysis of permutations"; the Gumbel form is due to Yellott 1977.
    """
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise must be 0 or more, got {noise}")
    if not all(math.isfinite(score) for score in scores):
        raise ValueError(f"scores must be finite, got {list(scores)}")
    if noise == 0:
        rank_of_score = {score: rank for rank, score in enumerate(sorted(set(scores), reverse=True))}
        return [rank_of_score[score] for score in scores]
    impressions = [score + noise * _gumbel(rng) for score in scores]
    ranks = [0] * len(scores)
    for rank, index in enumerate(sorted(range(len(scores)), key=lambda i: -impressions[i])):
        ranks[index] = rank
    return ranks


def _gumbel(rng: random.Random) -> float:
    return -math.log(max(rng.expovariate(1.0), sys.float_info.min))
