"""Correction for samples that another policy drew: older weights, or the same weights in another engine.

Shapes: B rows, T tokens; per-token tensors are (B, T) aligned to the sequences. With the ratio
r = exp(logprobs - rollout_logprobs) of the learner's policy before the update to the sampler's, at each action
token, the weight of its loss is

none            1
token           min(r, high)                             truncated importance sampling
                Source: Yao et al. 2025, https://fengyao.notion.site/off-policy-rl.
sequence        min(product of r over the row, high)     the same, one weight a row: unbiased but for the bound
                Source: verl, https://verl.readthedocs.io/en/latest/algo/rollout_corr.html.
mask            r inside [low, high], else 0             IcePop
                Source: https://arxiv.org/abs/2510.18855; the authors use [0.5, 5].
sequence_mask   1 for a row whose geometric mean of r is inside [low, high], else 0
                Source: verl, as above (geometric rejection).

The ratio of new to old logprobs in the policy loss stays what it is: these weights multiply the loss.
"""

from __future__ import annotations

import math

import torch

from rayllm.algorithms.checks import masked, require_dim, require_known, require_same_shape
from rayllm.algorithms.kl import kl_estimate

WEIGHT_KINDS = ("none", "token", "sequence", "mask", "sequence_mask")


def importance_weights(
    logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    action_mask: torch.Tensor,
    *,
    kind: str,
    low: float,
    high: float,
) -> torch.Tensor:
    """Weight of each token's policy loss; formulas and sources in the module docstring.

    Args:
        logprobs: (B, T) nats under the learner's policy before this update.
        rollout_logprobs: (B, T) nats as the sampler reported them.
        action_mask: (B, T) bool.
        kind: one of ``WEIGHT_KINDS``.
        low: lower bound of the mask kinds, in [0, 1].
        high: upper bound, finite and >= 1.

    Returns:
        (B, T) float32 >= 0, detached, 0 outside ``action_mask``. Equal logprobs give exactly 1 under every kind.

    Raises:
        ValueError: on an unknown kind, shapes that differ or a bound out of range.
    """
    require_known("kind", kind, WEIGHT_KINDS)
    require_dim(2, logprobs=logprobs)
    require_same_shape(logprobs=logprobs, rollout_logprobs=rollout_logprobs, action_mask=action_mask)
    if not 0 <= low <= 1 <= high < math.inf:
        raise ValueError(f"need 0 <= low <= 1 <= high < inf: {low=} {high=}")
    log_ratio = masked(logprobs.detach(), action_mask) - masked(rollout_logprobs.detach(), action_mask)
    if kind == "none":
        weights = torch.ones_like(log_ratio)
    elif kind == "token":
        weights = log_ratio.exp().clamp(max=high)
    elif kind == "sequence":
        weights = log_ratio.sum(1, keepdim=True).exp().clamp(max=high)
    elif kind == "mask":
        ratio = log_ratio.exp()
        weights = torch.where(_inside(ratio, low, high), ratio, 0.0)
    else:
        lengths = action_mask.bool().sum(1, keepdim=True).clamp(min=1)
        weights = _inside((log_ratio.sum(1, keepdim=True) / lengths).exp(), low, high)
    return masked(weights, action_mask)


def _inside(ratio: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return (ratio >= low) & (ratio <= high)


def mismatch(
    logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, action_mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """How far the learner's policy is from the sampler's, in parts that shards and ranks can join.

    Add ``num_tokens``, ``difference_sum`` and ``kl_sum`` and take the largest ``difference_max``; the means are the
    sums by ``num_tokens``.

    Args:
        logprobs, rollout_logprobs, action_mask: as for ``importance_weights``.

    Returns:
        float64 scalars, detached, 0 for an empty mask: ``num_tokens``; ``difference_sum`` and ``difference_max``
        of the absolute difference in nats; ``kl_sum`` of the k3 estimate of KL(sampler || learner) in nats.

    Raises:
        ValueError: on shapes that differ.
    """
    require_same_shape(logprobs=logprobs, rollout_logprobs=rollout_logprobs, action_mask=action_mask)
    learner, sampler = masked(logprobs.detach(), action_mask), masked(rollout_logprobs.detach(), action_mask)
    difference = (learner - sampler).abs().double()
    return {
        "num_tokens": action_mask.bool().sum().double(),
        "difference_sum": difference.sum(),
        "difference_max": difference.max(),
        "kl_sum": kl_estimate(sampler, learner, estimator="k3").double().sum(),
    }
