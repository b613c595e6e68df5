"""From one score a response to one reward a token: KL penalty everywhere, score at the end.

Shapes: B rows, T tokens; per-token tensors are (B, T) aligned to the sequences.
"""

from __future__ import annotations

import torch

from rayllm.algorithms.checks import masked, require_same_shape
from rayllm.algorithms.kl import kl_estimate


def per_token_rewards(
    rewards: torch.Tensor,
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    action_mask: torch.Tensor,
    *,
    kl_coef: float,
    estimator: str = "k1",
    clip: float | None = None,
) -> torch.Tensor:
    """``-kl_coef * kl`` on every action token, plus the score on the last action token of each row.

    Args:
        rewards: (B,) score of each response.
        logprobs: (B, T) nats under the policy that is being updated.
        ref_logprobs: (B, T) nats under the reference.
        action_mask: (B, T) bool.
        kl_coef: weight of the KL penalty, reward per nat.
        estimator: see ``kl_estimate``.
        clip: bound on the absolute score, > 0; the KL term is not clipped. None leaves the score alone.

    Returns:
        (B, T) float32, 0 outside ``action_mask``; a row without an action token is all 0, its score unused.

    Raises:
        ValueError: on shapes that do not fit, an unknown estimator or a clip that is not positive.

    Source: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 2 (per token, as in Ziegler et al. 2019,
    https://arxiv.org/abs/1909.08593, eq. 2).
    """
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, action_mask=action_mask)
    if rewards.shape != logprobs.shape[:1]:
        raise ValueError(f"shapes differ: rewards {tuple(rewards.shape)}, logprobs {tuple(logprobs.shape)}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be > 0, got {clip}")
    mask = action_mask.bool()
    score = masked(rewards, mask.any(1))
    if clip is not None:
        score = score.clamp(-clip, clip)
    penalty = -kl_coef * kl_estimate(logprobs, ref_logprobs, estimator=estimator, mask=mask)
    actions_after = mask.flip(1).cumsum(1).flip(1)  # this one included
    is_last = mask & (actions_after == 1)
    return torch.where(mask, penalty + torch.where(is_last, score[:, None], 0.0), 0.0)
