"""Advantage estimators: pure functions on tensors, no Ray, no model, no config object.

Shapes: B rows, T tokens; per-token tensors are (B, T) aligned to the sequences, per-response tensors (B,).
Outside a mask every output is 0 and the inputs have no effect.

``ADVANTAGES`` at the end of the file holds every estimator under one contract, that of ``estimate``. A new one is a
function, a line there and one in ``kinds.py``, which says what it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from rayllm.algorithms.checks import masked, require_dim, require_known, require_same_shape
from rayllm.algorithms.kinds import ADVANTAGE_KINDS

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


def has_signal(rewards: torch.Tensor, prompt_ids: torch.Tensor) -> torch.Tensor:
    """(B,) bool: False for every response of a group whose rewards are all equal; a group of one is such a group.

    Every group kind gives those responses advantage 0. Dynamic sampling drops them and samples other prompts.

    Args:
        rewards: (B,) score of each response, compared exactly: meant for rewards with few levels.
        prompt_ids: (B,) int, equal for responses to one prompt.

    Raises:
        ValueError: on shapes that do not fit.

    Source: DAPO https://arxiv.org/abs/2503.14476, eq. 11.
    """
    require_dim(1, rewards=rewards)
    require_same_shape(rewards=rewards, prompt_ids=prompt_ids)
    ids, group = prompt_ids.unique(return_inverse=True)
    rewards = rewards.float()
    zeros = rewards.new_zeros(len(ids))
    lowest = zeros.scatter_reduce(0, group, rewards, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, group, rewards, "amax", include_self=False)
    return (lowest != highest)[group]  # not <: a group with a NaN stays, and is seen


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


def estimate(
    name: str,
    token_rewards: torch.Tensor,
    action_mask: torch.Tensor,
    *,
    values: torch.Tensor | None = None,
    prompt_ids: torch.Tensor | None = None,
    baseline: torch.Tensor | None = None,
    gamma: float,
    gae_lambda: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantage of every action token, and the return that it was measured on.

    gae and reinforce_pp go token by token: a reward inside a row (of a turn, or the KL penalty) counts for the
    tokens up to it. The others know one score a row, the sum of its token rewards over all turns, and give
    each action token the advantage of that score; gamma has no effect on them.

    Args:
        name: one of ``ADVANTAGES``.
        token_rewards: (B, T), as ``per_token_rewards`` gives them.
        action_mask: (B, T) bool. A row without an action token does not count in its group.
        values: (B, T) critic estimates before each token.
        prompt_ids: (B,) int, equal for responses to one prompt.
        baseline: (B,) score of the greedy response to the row's prompt.
        gamma: discount per action token, in [0, 1].
        gae_lambda: bias/variance trade-off of gae, in [0, 1].

    Returns:
        ``(advantages, returns)``, both (B, T) float32 and zero outside ``action_mask``. Returns are
        ``advantages + values`` for gae, the discounted reward-to-go for reinforce_pp, the row's score for the
        others.

    Raises:
        ValueError: on an unknown name, if an input that the estimator needs is missing, on shapes that do not fit or a
            factor that it reads and that is outside [0, 1].
    """
    require_known("name", name, ADVANTAGES)
    require_dim(2, token_rewards=token_rewards)
    require_same_shape(token_rewards=token_rewards, action_mask=action_mask)
    kind = ADVANTAGE_KINDS[name]
    for needs, tensor, needed in (
        ("values", values, kind.needs_critic),
        ("prompt_ids", prompt_ids, kind.needs_groups),
        ("baseline", baseline, kind.needs_greedy_baseline),
    ):
        if needed and tensor is None:
            raise ValueError(f"{name} needs {needs}")
    return ADVANTAGES[name](
        token_rewards,
        action_mask,
        values=values,
        prompt_ids=prompt_ids,
        baseline=baseline,
        gamma=gamma,
        gae_lambda=gae_lambda,
    )


def _gae(
    token_rewards: torch.Tensor,
    action_mask: torch.Tensor,
    *,
    values: torch.Tensor,
    gamma: float,
    gae_lambda: float,
    **_: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    return gae(token_rewards, values, action_mask, gamma=gamma, gae_lambda=gae_lambda)


def _reward_to_go(
    token_rewards: torch.Tensor, action_mask: torch.Tensor, *, gamma: float, **_: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Discounted sum of the rewards from each token on: GAE with lambda 1 and a critic that says 0."""
    return gae(token_rewards, torch.zeros_like(token_rewards), action_mask, gamma=gamma, gae_lambda=1.0)


def _group(
    token_rewards: torch.Tensor, action_mask: torch.Tensor, *, kind: str, prompt_ids: torch.Tensor, **_: object
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = _scores(token_rewards, action_mask)
    require_same_shape(scores=scores, prompt_ids=prompt_ids)
    counts = action_mask.bool().any(1)
    advantages = torch.zeros_like(scores)
    advantages[counts] = group_advantages(scores[counts], prompt_ids[counts], kind=kind)
    return _spread(advantages, action_mask), _spread(scores, action_mask)


def _greedy_baseline(
    token_rewards: torch.Tensor, action_mask: torch.Tensor, *, baseline: torch.Tensor, **_: object
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = _scores(token_rewards, action_mask)
    require_same_shape(scores=scores, baseline=baseline)
    return _spread(scores - baseline, action_mask), _spread(scores, action_mask)


def _scores(token_rewards: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:
    """(B,) sum of each row. In float64 first: rows with the same rewards at other tokens get the same score."""
    return masked(token_rewards, action_mask).double().sum(1).float()


def _spread(per_row: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:
    """(B, T) the row's number at each of its action tokens."""
    return masked(per_row[:, None], action_mask)


ADVANTAGES: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "gae": _gae,
    "grpo": partial(_group, kind="grpo"),
    "dr_grpo": partial(_group, kind="dr_grpo"),
    "rloo": partial(_group, kind="rloo"),
    "reinforce_pp": _reward_to_go,
    "reinforce_baseline": partial(_group, kind="reinforce_baseline"),
    "remax": _greedy_baseline,
}
"""Every estimator by its name in a config: takes the arguments of ``estimate`` and names those that it reads.

Source: gae and the group kinds at ``gae`` and ``group_advantages``; REINFORCE++ https://arxiv.org/abs/2501.03262;
ReMax https://arxiv.org/abs/2310.10505, algorithm 1.
"""
