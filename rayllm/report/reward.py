"""How far a reward model can be trusted: what its scores of ranked responses say, as plain data.

Shapes: N responses, flat over rankings; H heads; P pairs with a better response, from their labels.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from rayllm.data.preferences import Ranking

REPORT = "reward_report.json"
"""File of the report in a run folder."""

BINS = 10
"""Of the reliability plot, over confidences from 50 % to 100 %."""

SAME_LENGTH = 0.1
"""Responses whose lengths differ by at most this share of the longer one are taken to be of one length."""

NUM_SHOWN = 8
"""Disagreements that are kept as text."""


@dataclass(frozen=True)
class Scored:
    """Rankings and what the model gave each response, as it came from the head."""

    rankings: Sequence[Ranking]
    scores: np.ndarray  # (N, H)

    @cached_property
    def mean(self) -> np.ndarray:
        """(H,)"""
        return self.scores.mean(0)

    @cached_property
    def std(self) -> np.ndarray:
        """(H,)"""
        return self.scores.std(0).clip(min=1e-6)

    @cached_property
    def standard(self) -> np.ndarray:
        """(N, H) in deviations of each head from its mean."""
        return (self.scores - self.mean) / self.std

    @cached_property
    def rewards(self) -> np.ndarray:
        """(N,) mean over heads, in deviations."""
        return self.standard.mean(1)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of each response."""
        return np.array([len(s) - r.num_prompt_tokens for r in self.rankings for s in r.sequences])

    @cached_property
    def owner(self) -> np.ndarray:
        """(N,) number of the ranking that a response is of."""
        return np.repeat(np.arange(len(self.rankings)), [len(r.ranks) for r in self.rankings])

    @cached_property
    def pairs(self) -> np.ndarray:
        """(P, 2) better and worse response of every pair that the labels order."""
        firsts = np.cumsum([0, *(len(r.ranks) for r in self.rankings)])
        found = [(first + i, first + j) for first, r in zip(firsts, self.rankings, strict=False) for i, j in r.pairs]
        return np.array(found, dtype=np.int64).reshape(-1, 2)

    @cached_property
    def gaps(self) -> np.ndarray:
        """(P,) reward of the better response less that of the worse, in deviations."""
        return self.rewards[self.pairs[:, 0]] - self.rewards[self.pairs[:, 1]]

    @cached_property
    def right(self) -> np.ndarray:
        """(P,) 1 where the model agrees with the label, 0 where not, one half where it gives both the same."""
        return (np.sign(self.gaps) + 1) / 2

    @cached_property
    def chances(self) -> np.ndarray:
        """(P,) the model's own chance that the label's better response is better: Bradley-Terry, mean over heads."""
        differences = self.scores[self.pairs[:, 0]] - self.scores[self.pairs[:, 1]]
        return (1 / (1 + np.exp(-differences.clip(-60, 60)))).mean(1)

    @cached_property
    def prompts(self) -> np.ndarray:
        """(P,) number of the prompt of each pair; rankings of one prompt by several people share it."""
        numbers: dict[Hashable, int] = {}
        texts = [r.sequences[0][: r.num_prompt_tokens].tobytes() for r in self.rankings]
        of_ranking = np.array([numbers.setdefault(text, len(numbers)) for text in texts])
        return of_ranking[self.owner[self.pairs[:, 0]]]


def pair_accuracy(scored: Scored) -> tuple[float, float]:
    """Share of pairs in the right order, and the mean difference of the scores as they came from the heads."""
    differences = scored.scores[scored.pairs[:, 0]] - scored.scores[scored.pairs[:, 1]]
    return float(scored.right.mean()), float(differences.mean())


def reward_report(scored: Scored, tokenizer: Any) -> dict[str, Any]:
    """Everything that the report of a reward model tells."""
    accuracy = rate(scored.right, scored.prompts)
    return {
        "format": 1,
        "num_prompts": len(set(scored.prompts.tolist())),
        "num_pairs": len(scored.pairs),
        "num_responses": len(scored.scores),
        "num_heads": scored.scores.shape[1],
        "accuracy": accuracy,
        "verdict": verdict(accuracy),
        "by_margin": by_margin(scored),
        "by_category": by_ranking(scored, [r.category for r in scored.rankings]),
        "by_labeler": by_ranking(scored, [r.labeler for r in scored.rankings]),
        "by_agreement": by_agreement(scored),
        "calibration": calibration(scored),
        "length": length(scored),
        "scores": distribution(scored),
        "ensemble": ensemble(scored),
        "disagreements": disagreements(scored, tokenizer),
    }


def rate(right: np.ndarray, prompts: np.ndarray) -> dict[str, float]:
    """A share of pairs with its 95 % interval. Pairs of one prompt stand and fall together.

    The interval is Wilson's for as many independent pairs as have the variance that the prompts show (Kish's effective
    sample size); where all or none are right it is for the number of prompts.
    """
    share = float(right.mean())
    number = np.unique(prompts, return_inverse=True)[1]
    residuals = np.bincount(number, weights=right - share)
    count = len(residuals)
    variance = float((residuals**2).sum()) / len(right) ** 2 * (count / max(count - 1, 1))
    effective = float(count)
    if 0 < share < 1 and variance > 0:
        effective = min(max(share * (1 - share) / variance, 1.0), len(right))
    z2 = 1.96**2
    middle = (share + z2 / (2 * effective)) / (1 + z2 / effective)
    reach = 1.96 / (1 + z2 / effective) * math.sqrt(share * (1 - share) / effective + z2 / (4 * effective**2))
    return {"accuracy": share, "low": max(middle - reach, 0.0), "high": min(middle + reach, 1.0), "pairs": len(right)}


def verdict(accuracy: dict[str, float]) -> dict[str, str]:
    """One honest sentence, and its tone as in the report."""
    interval = f"{100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f} %"
    text = f"{100 * accuracy['accuracy']:.1f} % of {accuracy['pairs']} held-out pairs in the right order ({interval})"
    if accuracy["high"] < 0.5:
        return {"tone": "bad", "text": f"Worse than chance: {text}. Look for ranks that are the wrong way round."}
    if accuracy["low"] <= 0.5:
        return {"tone": "bad", "text": f"Near chance: {text}. It tells good from bad no better than a coin would."}
    if accuracy["low"] < 0.6:
        return {"tone": "mixed", "text": f"Better than chance, but it may be little better than a coin: {text}."}
    return {"tone": "good", "text": f"Better than chance: {text}."}


def grouped(scored: Scored, labels: Iterable[Hashable]) -> list[dict[str, Any]]:
    """`rate` of the pairs with each label, in the order of the labels; pairs labelled None are left out."""
    rows: dict[Hashable, list[int]] = {}
    for index, label in enumerate(labels):
        if label is not None:
            rows.setdefault(label, []).append(index)
    return [{"group": str(label), **rate(scored.right[at], scored.prompts[at])} for label, at in sorted(rows.items())]


def by_ranking(scored: Scored, labels: Sequence[str | None]) -> list[dict[str, Any]]:
    """By something that each ranking has; nothing where no ranking does."""
    return grouped(scored, [labels[number] for number in scored.owner[scored.pairs[:, 0]]])


def by_margin(scored: Scored) -> list[dict[str, Any]]:
    """By how far apart the labels put a pair: quarters of the difference of their scores, else places between them."""
    flat = [s for r in scored.rankings for s in r.scores or [math.nan] * len(r.ranks)]
    ranks = np.array([rank for r in scored.rankings for rank in r.ranks])
    better, worse = scored.pairs.T
    apart = np.array(flat)[better] - np.array(flat)[worse]
    if not np.isfinite(apart).all():
        places = ranks[worse] - ranks[better]
        rows = grouped(scored, places.tolist())
        return [{**row, "group": f"{row['group']} place{'s' if row['group'] != '1' else ''} apart"} for row in rows]
    edges = np.unique(np.quantile(apart, [0, 0.25, 0.5, 0.75, 1]))
    place = np.searchsorted(edges[1:-1], apart, side="right")
    names = [f"{low:.3g} to {high:.3g} apart" for low, high in zip(edges[:-1], edges[1:], strict=True)] or ["all"]
    return [{**row, "group": names[int(row["group"])]} for row in grouped(scored, place.tolist())]


def by_agreement(scored: Scored) -> list[dict[str, Any]]:
    """By how many labels order the pair alike, of pairs that several labelers ordered; where it is a draw it is left
    out. What counts as right is the majority's order."""
    flat = [s.tobytes() for r in scored.rankings for s in r.sequences]
    labelers = [scored.rankings[number].labeler for number in scored.owner[scored.pairs[:, 0]]]
    votes: dict[tuple[bytes, bytes], list[int]] = {}
    for index, (better, worse) in enumerate(scored.pairs):
        first, second = sorted((flat[better], flat[worse]))
        votes.setdefault((first, second), []).append(index if flat[better] == first else -index - 1)
    labels: list[str | None] = [None] * len(scored.pairs)
    for indices in votes.values():
        ahead = [i for i in indices if i >= 0]
        behind = [-i - 1 for i in indices if i < 0]
        most, least = (ahead, behind) if len(ahead) > len(behind) else (behind, ahead)
        if len({labelers[i] for i in ahead + behind}) > 1 and len(most) > len(least):
            labels[most[0]] = "all agree" if not least else "a majority agrees"
    return grouped(scored, labels)


def calibration(scored: Scored) -> dict[str, Any]:
    """Whether the model is as often right as it is sure: expected calibration error over BINS of its confidence.

    Source: Guo et al. 2017, https://arxiv.org/abs/1706.04599, eq. 3.
    """
    confidence = np.maximum(scored.chances, 1 - scored.chances)
    right = (np.sign(scored.chances - 0.5) + 1) / 2
    place = ((confidence - 0.5) * 2 * BINS).astype(int).clip(0, BINS - 1)
    bins = [
        {"confidence": float(confidence[at].mean()), "accuracy": float(right[at].mean()), "pairs": int(at.sum())}
        for at in (place == number for number in range(BINS))
        if at.any()
    ]
    error = sum(entry["pairs"] * abs(entry["accuracy"] - entry["confidence"]) for entry in bins) / len(right)
    nats = float(-np.log(scored.chances.clip(min=1e-12)).mean())
    return {"error": float(error), "confidence": float(confidence.mean()), "loss": nats, "bins": bins}


def length(scored: Scored) -> dict[str, Any]:
    """What the model makes of length, and what the labels do: a model may be liked for its long answers only."""
    better, worse = scored.pairs.T
    longer = np.sign(scored.lengths[better] - scored.lengths[worse])
    unequal = longer != 0
    apart = np.abs(scored.lengths[better] - scored.lengths[worse])
    alike = apart <= SAME_LENGTH * np.maximum(scored.lengths[better], scored.lengths[worse])
    picked = np.where(scored.gaps >= 0, longer, -longer)
    groups = {
        "same length": alike,
        "the better is longer": (longer > 0) & ~alike,
        "the better is shorter": (longer < 0) & ~alike,
    }
    return {
        "correlation": _correlation(scored.rewards, scored.lengths),
        "correlation_within_prompts": _correlation(_centred(scored, scored.rewards), _centred(scored, scored.lengths)),
        "labels_prefer_longer": float((longer[unequal] > 0).mean()) if unequal.any() else None,
        "model_prefers_longer": float((picked[unequal] > 0).mean()) if unequal.any() else None,
        "accuracy": [
            {"group": name, **rate(scored.right[at], scored.prompts[at])} for name, at in groups.items() if at.any()
        ],
    }


def distribution(scored: Scored) -> dict[str, Any]:
    """Moments of each head, and a histogram of the rewards: of the best response of each prompt, and of the others."""
    best = np.array([rank == min(r.ranks) for r in scored.rankings for rank in r.ranks])
    edges = np.linspace(scored.rewards.min() - 1e-9, scored.rewards.max() + 1e-9, 25)
    return {
        "mean": scored.mean.tolist(),
        "std": scored.std.tolist(),
        "edges": edges.tolist(),
        "best": np.histogram(scored.rewards[best], edges)[0].tolist(),
        "others": np.histogram(scored.rewards[~best], edges)[0].tolist(),
    }


def ensemble(scored: Scored) -> dict[str, Any] | None:
    """Each head by itself, and accuracy where the heads are of one mind and where they are not; None for one head."""
    if scored.scores.shape[1] == 1:
        return None
    differences = scored.standard[scored.pairs[:, 0]] - scored.standard[scored.pairs[:, 1]]
    spread = differences.std(1)
    third = np.searchsorted(np.quantile(spread, [1 / 3, 2 / 3]), spread)
    names = ("heads of one mind", "in between", "heads far apart")
    return {
        "heads": [float(((np.sign(d) + 1) / 2).mean()) for d in differences.T],
        "spread": float(scored.standard.std(1).mean()),
        "by_spread": [{**row, "group": names[int(row["group"])]} for row in grouped(scored, third.tolist())],
    }


def disagreements(scored: Scored, tokenizer: Any) -> list[dict[str, Any]]:
    """The pairs that the model is most sure to order against their label, one a prompt."""
    found: list[dict[str, Any]] = []
    seen: set[int] = set()
    sequences = [s for r in scored.rankings for s in r.sequences]
    for index in np.argsort(scored.gaps):
        if scored.gaps[index] >= 0 or len(found) == NUM_SHOWN:
            break
        if int(scored.prompts[index]) in seen:
            continue
        seen.add(int(scored.prompts[index]))
        better, worse = scored.pairs[index]
        ranking = scored.rankings[scored.owner[better]]
        end = ranking.num_prompt_tokens
        cuts = {"prompt": sequences[better][:end], "better": sequences[better][end:], "worse": sequences[worse][end:]}
        found.append(
            {name: tokenizer.decode(cut, skip_special_tokens=True).strip() for name, cut in cuts.items()}
            | {
                "category": ranking.category,
                "labeler": ranking.labeler,
                "rewards": [float(scored.rewards[better]), float(scored.rewards[worse])],
                "chance": float(scored.chances[index]),
            }
        )
    return found


def _centred(scored: Scored, values: np.ndarray) -> np.ndarray:
    """Values less their mean over the ranking."""
    means = np.bincount(scored.owner, weights=values) / np.bincount(scored.owner)
    return values - means[scored.owner]


def _correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Pearson's, None where one of them does not vary."""
    if one.std() < 1e-9 or other.std() < 1e-9:
        return None
    return float(np.corrcoef(one, other)[0, 1])
