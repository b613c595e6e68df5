"""Losses that fit a reward model to human rankings: one score a response, no tokens.

Shapes: N responses, flat over prompts; responses to one prompt share a prompt id and may stand in any order.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from rayllm.algorithms.checks import require_dim, require_known, require_same_shape

KWISE_KINDS = ("all_pairs", "plackett_luce")


def pairwise_loss(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    *,
    margin: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Mean of ``-log sigmoid(chosen - rejected - margin)``, the Bradley-Terry negative log-likelihood.

    Args:
        chosen_rewards: (N,) score of the preferred response of each pair.
        rejected_rewards: (N,) score of the other one.
        margin: (N,) or one number, in units of reward; how much better the chosen one should be.

    Returns:
        float32 scalar, 0 without pairs.

    Raises:
        ValueError: on shapes that differ.

    Source: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 1; margin: Touvron et al. 2023,
    https://arxiv.org/abs/2307.09288, eq. 2.
    """
    require_same_shape(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    difference = chosen_rewards.float() - rejected_rewards.float()
    if isinstance(margin, torch.Tensor) and margin.dim() > 0:
        require_same_shape(chosen_rewards=chosen_rewards, margin=margin)
    if margin is not None:
        difference = difference - margin
    return -logsigmoid(difference).sum() / max(difference.numel(), 1)


def kwise_loss(
    rewards: torch.Tensor, ranks: torch.Tensor, prompt_ids: torch.Tensor, *, kind: str = "all_pairs"
) -> torch.Tensor:
    """Negative log-likelihood of rankings of K responses; K may differ from prompt to prompt.

    all_pairs: Bradley-Terry over all pairs with one strictly better response, mean over the pairs of a
    prompt, then over the prompts that have such a pair. Ties make no pair.

    plackett_luce: every response i contributes ``logsumexp_j(r_j) - r_i`` with j over the responses to its
    prompt that are not better (rank_j >= rank_i, i included); sum over responses, mean over all prompts.
    Without ties it is the exact likelihood of the order. Tied responses each meet the same denominator
    (Breslow's approximation for ties), which also draws their scores together.

    Args:
        rewards: (N,) scores.
        ranks: (N,) 0 is best; ties share a rank, gaps are allowed.
        prompt_ids: (N,) int, equal for responses to one prompt.
        kind: "all_pairs" or "plackett_luce".

    Returns:
        float32 scalar; 0 with zero gradient if there is nothing to compare.

    Raises:
        ValueError: on an unknown kind or shapes that do not fit.

    Source: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 1; Plackett 1975; Xia et al. 2008
    (ListMLE).
    """
    require_known("kind", kind, KWISE_KINDS)
    require_dim(1, rewards=rewards)
    require_same_shape(rewards=rewards, ranks=ranks, prompt_ids=prompt_ids)
    rewards = rewards.float()
    same = prompt_ids[:, None] == prompt_ids[None, :]
    if kind == "plackett_luce":
        not_better = same & (ranks[None, :] >= ranks[:, None])
        others = torch.where(not_better, rewards[None, :], float("-inf"))
        return (others.logsumexp(1) - rewards).sum() / max(len(prompt_ids.unique()), 1)
    better, worse = (same & (ranks[:, None] < ranks[None, :])).nonzero(as_tuple=True)
    losses = -logsigmoid(rewards[better] - rewards[worse])
    prompts, prompt, num_pairs = prompt_ids[better].unique(return_inverse=True, return_counts=True)
    return (losses / num_pairs[prompt]).sum() / max(len(prompts), 1)
