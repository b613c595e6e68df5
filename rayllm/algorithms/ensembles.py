"""One reward out of the scores of several reward models, or of several heads: B responses, H scores each."""

from __future__ import annotations

import torch

from rayllm.algorithms.checks import require_dim, require_known

ENSEMBLE_KINDS = ("none", "mean_std", "worst")


def combine_ensemble(
    rewards: torch.Tensor, *, kind: str = "none", coef: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reward on which an ensemble agrees, and how far it disagrees.

    none: the mean over the ensemble. mean_std: the mean minus ``coef`` times the deviation. worst: the least of them.

    Args:
        rewards: (B, H), on one scale: each member standardised by its own held-out mean and deviation.
        kind: what is taken off where the members disagree.
        coef: weight of the deviation, 0 or more; mean_std only.

    Returns:
        (B,) float32 rewards and (B,) float32 deviations over the ensemble (divided by H), 0 for H = 1.

    Raises:
        ValueError: on an unknown kind, a negative ``coef``, or rewards that are not (B, H).

    Source: Coste et al. 2023, https://arxiv.org/abs/2310.02743 (with the deviation for the variance, so
    that both terms are in units of reward); Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244.
    """
    require_known("kind", kind, ENSEMBLE_KINDS)
    require_dim(2, rewards=rewards)
    if not coef >= 0:
        raise ValueError(f"coef must be >= 0, got {coef}")
    rewards = rewards.float()
    mean, spread = rewards.mean(1), rewards.std(1, correction=0)
    if kind == "worst":
        return rewards.amin(1), spread
    return (mean - coef * spread if kind == "mean_std" else mean), spread
