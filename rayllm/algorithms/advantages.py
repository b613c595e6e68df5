"""Advantage estimators: pure functions on tensors, no Ray, no model, no config object.

Shapes: B rows, T tokens; per-token tensors are (B, T) aligned to the sequences, per-response tensors (B,).
Outside a mask every output is 0 and the inputs have no effect.
"""

from __future__ import annotations

import torch

from rayllm.algorithms.checks import masked, require_dim, require_known, require_same_shape

GROUP_KINDS = ("grpo", "dr_grpo", "rloo", "reinforce_baseline")


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    action_mask: torch.Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimation over the action tokens of each row.

    Tokens outside ``action_mask`` (prompt, tool output, padding) take no part: the recursion
    carries the next action's value and running advantage across them.

    Args:
        rewards: (B, T) per-token rewards.
        values: (B, T) critic estimates before each token.
        action_mask: (B, T) bool.
        gamma: discount per action token, in [0, 1].
        gae_lambda: bias/variance trade-off, in [0, 1].

    Returns:
        ``(advantages, returns)``, both (B, T) float32 and zero outside ``action_mask``;
        ``returns = advantages + values``.

    Raises:
        ValueError: if the tensors do not share one (B, T) shape, or a factor is outside [0, 1].

    Source: Schulman et al. 2015, https://arxiv.org/abs/1506.02438, eq. 16.
    """
    require_dim(2, rewards=rewards)
    require_same_shape(rewards=rewards, values=values, action_mask=action_mask)
    if not (0 <= gamma <= 1 and 0 <= gae_lambda <= 1):
        raise ValueError(f"gamma and gae_lambda must be in [0, 1], got {gamma=} {gae_lambda=}")
    mask = action_mask.bool()
    rewards, values = masked(rewards, mask), masked(values, mask)
    next_value = running = rewards.new_zeros(rewards.shape[0])
    columns = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(mask[:, t], delta + gamma * gae_lambda * running, running)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        columns.append(running)
    advantages = masked(torch.stack(columns[::-1], dim=1), mask) if columns else torch.zeros_like(rewards)
    return advantages, advantages + values


def group_advantages(rewards: torch.Tensor, prompt_ids: torch.Tensor, *, kind: str = "grpo") -> torch.Tensor:
    """Advantage of each response against the other responses to its prompt.

    With mean and std (n - 1 in the denominator) over the n responses that share a prompt id:

        grpo                          (r - mean) / (std + 1e-6)
        dr_grpo, reinforce_baseline   r - mean
        rloo                          r - mean of the other n - 1

    Groups may have any sizes and stand in any order. A group whose rewards are all equal gives exactly 0, and
    so does a group of one under every kind, rloo included: without a second response there is no baseline.

    Args:
        rewards: (B,) score of each response.
        prompt_ids: (B,) int, equal for responses to one prompt.
        kind: one of ``GROUP_KINDS``.

    Returns:
        (B,) float32.

    Raises:
        ValueError: on an unknown kind or shapes that do not fit.

    Source: GRPO https://arxiv.org/abs/2402.03300; Dr. GRPO https://arxiv.org/abs/2503.20783;
    RLOO https://arxiv.org/abs/2402.14740; REINFORCE++-baseline https://arxiv.org/abs/2501.03262 (its
    whitening over the batch is ``whiten``).
    """
    require_known("kind", kind, GROUP_KINDS)
    require_dim(1, rewards=rewards)
    require_same_shape(rewards=rewards, prompt_ids=prompt_ids)
    ids, group = prompt_ids.unique(return_inverse=True)
    # float64 sums of equal float32 rewards are exact: without spread every deviation is exactly 0.
    rewards = rewards.float().double()
    zeros = rewards.new_zeros(len(ids))
    count = zeros.index_add(0, group, torch.ones_like(rewards))
    deviation = rewards - (zeros.index_add(0, group, rewards) / count)[group]
    others = (count - 1).clamp(min=1)
    if kind == "rloo":
        deviation = deviation * (count / others)[group]  # r - mean_others = (r - mean) n / (n - 1)
    elif kind == "grpo":
        std = (zeros.index_add(0, group, deviation.square()) / others).sqrt()
        deviation = deviation / (std[group] + 1e-6)
    return deviation.float()


def masked_moments(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(3,) float64: count, sum and sum of squares of ``values`` inside ``mask``.

    Add the results of all ranks (one all-reduce of three numbers) and hand the total to ``whiten``.

    Raises:
        ValueError: on shapes that differ.
    """
    require_same_shape(values=values, mask=mask)
    kept = masked(values, mask).double()
    return torch.stack([mask.bool().sum().double(), kept.sum(), kept.square().sum()])


def whiten(
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    shift_mean: bool = True,
    moments: torch.Tensor | None = None,
) -> torch.Tensor:
    """``(values - mean) / sqrt(var + 1e-8)`` inside ``mask``, 0 outside.

    The variance is that of the population (divided by the count, not by the count less one), so that the
    result does not depend on how the batch is split; TRL divides by the count less one, OpenRLHF as here.

    Args:
        values: float tensor of any shape.
        mask: bool, same shape.
        shift_mean: False adds the mean back, so that only the scale changes.
        moments: (3,) count, sum and sum of squares to whiten with, as ``masked_moments`` gives them, for
            example summed over ranks; default: those of ``values``.

    Returns:
        float32, same shape. An empty mask gives zeros.

    Raises:
        ValueError: on shapes that do not fit.
    """
    require_same_shape(values=values, mask=mask)
    if moments is None:
        moments = masked_moments(values, mask)
    if moments.shape != (3,):
        raise ValueError(f"moments has shape {tuple(moments.shape)}, expected (3,): count, sum, squares")
    count, total, squares = moments.double().unbind()
    count = count.clamp(min=1)
    mean = total / count
    var = (squares / count - mean.square()).clamp(min=0)
    whitened = (masked(values, mask).double() - mean) * (var + 1e-8).rsqrt()
    if not shift_mean:
        whitened = whitened + mean
    return masked(whitened, mask)
