"""Estimators of KL(policy || reference) from the log-probabilities of sampled tokens.

With r = p_ref / p_policy at a token drawn from the policy:

    k1 = -log r             unbiased, high variance, may be negative
    k2 = (log r)^2 / 2      biased, low variance, >= 0
    k3 = (r - 1) - log r    unbiased, low variance, >= 0

As a term of the reward all three are only values. As a term of the loss their gradients differ: that of k1
has expectation 0, that of k2 is the gradient of the KL, that of k3 the gradient of KL(reference || policy).

Source: Schulman 2020, http://joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

import math

import torch

from rayllm.algorithms.checks import masked, require_known, require_same_shape

ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    *,
    estimator: str = "k1",
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference).

    Args:
        logprobs: nats under the policy, any shape.
        ref_logprobs: nats under the reference, same shape.
        estimator: "k1", "k2" or "k3".
        mask: bool of the same shape; outside it the result is 0 and the inputs have no effect. Needed when
            the estimate is differentiated and padding may hold anything.

    Returns:
        float32 nats, same shape as ``logprobs``.

    Raises:
        ValueError: on an unknown estimator or shapes that differ.
    """
    require_known("estimator", estimator, ESTIMATORS)
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    if mask is not None:
        require_same_shape(logprobs=logprobs, mask=mask)
        logprobs, ref_logprobs = masked(logprobs, mask), masked(ref_logprobs, mask)
    log_ratio = ref_logprobs.float() - logprobs.float()
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    return log_ratio.expm1() - log_ratio


def next_kl_coef(coef: float, kl: float, *, target: float, num_samples: int, horizon: float) -> float:
    """The KL coefficient after a step: ``coef * (1 + clip(kl / target - 1, -0.2, 0.2) * num_samples / horizon)``.

    The coefficient is the controller's only state.

    Args:
        coef: coefficient of the step that is done, > 0.
        kl: KL(policy || reference) measured in it, nats a response: summed over tokens, mean over responses. A k1
            estimate may be negative.
        target: KL to hold, same unit, > 0.
        num_samples: responses of the step.
        horizon: responses, the more the slower: at an error of 20 % or more a factor of e takes 5 horizons. More than
            0.2 * ``num_samples``, or one step could take the coefficient to 0.

    Raises:
        ValueError: on a KL that is not finite or a number out of range.

    Source: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2; with a horizon as in its code,
    https://github.com/openai/lm-human-preferences.
    """
    if not (coef > 0 and target > 0 and horizon > 0.2 * num_samples):
        raise ValueError(
            f"need coef > 0, target > 0, horizon > 0.2 * num_samples: {coef=} {target=} {num_samples=} {horizon=}"
        )
    if not math.isfinite(kl):
        raise ValueError(f"kl must be finite, got {kl}")
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * num_samples / horizon)
