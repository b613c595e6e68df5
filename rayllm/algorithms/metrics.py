"""Diagnostics of an update, each a float32 scalar over a mask; an empty mask gives 0."""

from __future__ import annotations

import torch

from rayllm.algorithms.checks import masked, require_same_shape
from rayllm.algorithms.kl import kl_estimate


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of ``values`` inside ``mask``. Raises ValueError on shapes that differ."""
    require_same_shape(values=values, mask=mask)
    return masked(values, mask).sum() / mask.bool().sum().clamp(min=1)


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``1 - Var(returns - values) / Var(returns)``: 1 is a perfect critic, 0 as good as a constant.

    Without spread in ``returns`` there is nothing to explain and the result is 0.

    Raises:
        ValueError: on shapes that differ.
    """
    require_same_shape(values=values, returns=returns, mask=mask)
    values, returns = masked(values, mask), masked(returns, mask)
    total = _variance(returns, mask)
    unexplained = _variance(returns - values, mask)
    return torch.where(total > 0, 1 - unexplained / torch.where(total > 0, total, 1.0), 0.0).float()


def _variance(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Population variance in float64, in which the mean of equal float32 values is exact."""
    values, mask = values.double(), mask.bool()
    count = mask.sum().clamp(min=1)
    deviation = torch.where(mask, values - values.sum() / count, 0.0)
    return deviation.square().sum() / count


def clip_fraction(
    new_logprobs: torch.Tensor,
    logprobs: torch.Tensor,
    mask: torch.Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
) -> torch.Tensor:
    """Share of tokens whose ratio new / old lies outside [1 - clip_range, 1 + clip_range_high].

    Counts both sides whatever the sign of the advantage. ``clip_range_high`` defaults to ``clip_range``.

    Raises:
        ValueError: on shapes that differ.
    """
    require_same_shape(new_logprobs=new_logprobs, logprobs=logprobs, mask=mask)
    high = clip_range if clip_range_high is None else clip_range_high
    ratio = (masked(new_logprobs, mask) - masked(logprobs, mask)).exp()
    return masked_mean(((ratio < 1 - clip_range) | (ratio > 1 + high)).float(), mask)


def approx_kl(new_logprobs: torch.Tensor, logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean k3 estimate of KL(old policy || new policy) on tokens drawn from the old one, in nats, >= 0.

    Raises:
        ValueError: on shapes that differ.

    Source: Schulman 2020, http://joschu.net/blog/kl-approx.html.
    """
    require_same_shape(new_logprobs=new_logprobs, logprobs=logprobs, mask=mask)
    return masked_mean(kl_estimate(logprobs, new_logprobs, estimator="k3", mask=mask), mask)
