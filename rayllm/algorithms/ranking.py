"""Losses that fit a reward model to human rankings: one score a response, no tokens.

Shapes: N responses, flat over prompts; responses to one prompt share a prompt id and may stand in any order.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import logsigmoid

from rayllm.algorithms.checks import require_dim, require_known, require_same_shape

KWISE_KINDS = ("all_pairs", "plackett_luce")

MAX_EXACT_TIE = 6
"""Largest tie whose orders are summed over; their number grows as m!, the work as 2^m."""


def pairwise_loss(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    *,
    margin: torch.Tensor | float | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Mean of ``-log sigmoid(chosen - rejected - margin)``, the Bradley-Terry negative log-likelihood.

    Args:
        chosen_rewards: (N,) score of the preferred response of each pair.
        rejected_rewards: (N,) score of the other one.
        margin: (N,) or one number, in units of reward; how much better the chosen one should be.
        label_smoothing: chance, in [0, 0.5), that a label is the wrong way round; that share of the loss is of the
            pair turned round, with the same margin.

    Returns:
        float32 scalar, 0 without pairs.

    Raises:
        ValueError: on shapes that differ, or a label_smoothing out of range.

    Source: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 1; margin: Touvron et al. 2023,
    https://arxiv.org/abs/2307.09288, eq. 2; label smoothing: Wang et al. 2024, https://arxiv.org/abs/2401.06080.
    """
    require_same_shape(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    if isinstance(margin, torch.Tensor) and margin.dim() > 0:
        require_same_shape(chosen_rewards=chosen_rewards, margin=margin)
    difference = chosen_rewards.float() - rejected_rewards.float()
    return _pair_losses(difference, margin, label_smoothing).sum() / max(difference.numel(), 1)


def kwise_loss(
    rewards: torch.Tensor,
    ranks: torch.Tensor,
    prompt_ids: torch.Tensor,
    *,
    kind: str = "all_pairs",
    label_smoothing: float = 0.0,
    scores: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Negative log-likelihood of rankings of K responses; K may differ from prompt to prompt.

    all_pairs: Bradley-Terry over all pairs with one strictly better response, mean over the pairs of a
    prompt, then over the prompts that have such a pair. Ties make no pair.

    plackett_luce: the best response is drawn with chances proportional to exp(reward), then the best of the rest, and
    so on; sum over the draws, mean over all prompts. A tie says nothing about the order inside it: its likelihood is
    the sum over all of them, so that a tie for the last place has likelihood 1. The sum is exact for up to
    MAX_EXACT_TIE tied responses; larger ties take Efron's approximation, which is exact where their rewards are equal.

    Args:
        rewards: (N,) scores.
        ranks: (N,) 0 is best; ties share a rank, gaps are allowed.
        prompt_ids: (N,) int, equal for responses to one prompt.
        kind: "all_pairs" or "plackett_luce".
        label_smoothing: as in `pairwise_loss`; all_pairs only.
        scores: (N,) how good the labeler found each response, in units of reward: the difference, where it is
            positive, is the margin of the pair; all_pairs only.
        weights: (N,) factor on the loss of the response's prompt, equal for responses to one prompt, mean about 1: the
            loss is still divided by the number of prompts.

    Returns:
        float32 scalar; 0 with zero gradient if there is nothing to compare.

    Raises:
        ValueError: on an unknown kind, shapes that do not fit, or a setting that the kind does not have.

    Source: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 1; Plackett 1975; Xia et al. 2008 (ListMLE);
    ties: Allison & Christakis 1994, "Logit models for sets of ranked items"; Efron 1977.
    """
    require_known("kind", kind, KWISE_KINDS)
    require_dim(1, rewards=rewards)
    require_same_shape(rewards=rewards, ranks=ranks, prompt_ids=prompt_ids)
    for name, tensor in (("scores", scores), ("weights", weights)):
        if tensor is not None:
            require_same_shape(**{"rewards": rewards, name: tensor})
    if kind == "plackett_luce" and (label_smoothing or scores is not None):
        raise ValueError("label_smoothing and scores are about pairs: kind='plackett_luce' has neither")
    rewards = rewards.float()
    weights = torch.ones_like(rewards) if weights is None else weights.float()
    same = prompt_ids[:, None] == prompt_ids[None, :]
    if kind == "plackett_luce":
        return (weights * _plackett_luce(rewards, ranks, same)).sum() / max(len(prompt_ids.unique()), 1)
    better, worse = (same & (ranks[:, None] < ranks[None, :])).nonzero(as_tuple=True)
    margin = None if scores is None else (scores[better] - scores[worse]).clamp(min=0)
    losses = weights[better] * _pair_losses(rewards[better] - rewards[worse], margin, label_smoothing)
    prompts, prompt, num_pairs = prompt_ids[better].unique(return_inverse=True, return_counts=True)
    return (losses / num_pairs[prompt]).sum() / max(len(prompts), 1)


def _pair_losses(
    difference: torch.Tensor, margin: torch.Tensor | float | None, label_smoothing: float
) -> torch.Tensor:
    """(N,) of each pair."""
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    margin = 0.0 if margin is None else margin
    losses = -logsigmoid(difference - margin)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * logsigmoid(-difference - margin)
    return losses


def _plackett_luce(rewards: torch.Tensor, ranks: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """(N,) terms whose sum over a prompt is the negative log-likelihood of its order; a tie's stands at its first."""
    not_better = same & (ranks[None, :] >= ranks[:, None])
    tied = same & (ranks[None, :] == ranks[:, None])
    alone = tied.sum(1) == 1
    remaining = torch.where(not_better, rewards[None, :], float("-inf")).logsumexp(1)
    terms = torch.where(alone, remaining - rewards, 0.0)
    first = tied.int().argmax(1) == torch.arange(len(ranks), device=ranks.device)
    found = (first & ~alone & (not_better & ~tied).any(1)).nonzero().squeeze(1)
    if len(found):
        ties = [_tie_loss(rewards[tied[i]], rewards[not_better[i] & ~tied[i]]) for i in found.tolist()]
        terms = terms.index_add(0, found, torch.stack(ties))
    return terms


def _tie_loss(tied: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Negative log of the chance that the (M,) ``tied`` responses come before the ``rest``, in whatever order."""
    count, below = len(tied), rest.logsumexp(0)
    if count > MAX_EXACT_TIE:  # Efron: every draw meets the mean of the tied responses that are left
        share = 1 - torch.arange(count, device=tied.device) / count
        met = torch.logaddexp(below, tied.logsumexp(0) + share.log())
        return (met - tied).sum() - math.lgamma(count + 1)
    chances = [tied.new_zeros(())]  # of each subset, as bits: log chance that these come before the rest
    for subset in range(1, 1 << count):
        members = [i for i in range(count) if subset >> i & 1]
        ways = torch.stack([tied[i] + chances[subset ^ (1 << i)] for i in members]).logsumexp(0)
        chances.append(ways - torch.logaddexp(below, tied[members].logsumexp(0)))
    return -chances[-1]
