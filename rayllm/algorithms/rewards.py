"""Shaping of rewards: first the score of each response, then one reward a token.

Shapes: B rows, T tokens; per-token tensors are (B, T) aligned to the sequences, scores and lengths (B,).
Penalties are <= 0: add them to the score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rayllm.algorithms.advantages import group_advantages
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
    turn_rewards: torch.Tensor | None = None,
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
        turn_rewards: (B, T) rewards of an environment, added as they are, each at the last action token of the
            turn that earned it; a reward on any other token outside the mask is lost. None: the score is all.

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
    mask = action_mask.bool()
    score = clip_rewards(masked(rewards, mask.any(1)), clip=clip)
    penalty = -kl_coef * kl_estimate(logprobs, ref_logprobs, estimator=estimator, mask=mask)
    actions_after = mask.flip(1).cumsum(1).flip(1)  # this one included
    is_last = mask & (actions_after == 1)
    token_rewards = penalty + torch.where(is_last, score[:, None], 0.0)
    if turn_rewards is not None:
        require_same_shape(turn_rewards=turn_rewards, action_mask=action_mask)
        token_rewards = token_rewards + turn_rewards
    return masked(token_rewards, mask)


def clip_rewards(rewards: torch.Tensor, *, clip: float | None) -> torch.Tensor:
    """Rewards of any shape in [-clip, clip], NaN where they are NaN; None leaves them alone.

    Raises:
        ValueError: on a clip that is not positive.
    """
    if clip is None:
        return rewards
    if not clip > 0:
        raise ValueError(f"clip must be > 0, got {clip}")
    return rewards.clamp(-clip, clip)


def overlong_penalty(lengths: torch.Tensor, *, max_length: int, buffer: int) -> torch.Tensor:
    """0 up to ``max_length - buffer`` tokens, from there linear down to -1 at ``max_length``, -1 beyond.

    Args:
        lengths: (B,) action tokens of each response.
        max_length: tokens at which the penalty is full.
        buffer: tokens over which it grows, in [1, max_length].

    Returns:
        (B,) float32 in [-1, 0].

    Raises:
        ValueError: on a buffer out of range.

    Source: DAPO https://arxiv.org/abs/2503.14476, eq. 13.
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"need 1 <= buffer <= max_length: {buffer=} {max_length=}")
    return ((max_length - buffer - lengths) / buffer).clamp(-1.0, 0.0)


def length_penalty(lengths: torch.Tensor, *, per_token: float) -> torch.Tensor:
    """(B,) float32 ``-per_token * lengths``; ``lengths`` (B,) are action tokens, ``per_token`` >= 0 is in reward.

    Raises:
        ValueError: on a negative ``per_token``.
    """
    if not per_token >= 0:
        raise ValueError(f"per_token must be >= 0, got {per_token}")
    return -per_token * lengths.float()


def group_normalize(rewards: torch.Tensor, prompt_ids: torch.Tensor) -> torch.Tensor:
    """(B,) float32 rewards with mean 0 and deviation 1 among the responses to one prompt, 0 without spread.

    The same numbers as GRPO's advantage, under a name for rewards that go on to per-token estimators.

    Raises:
        ValueError: on shapes that differ.
    """
    return group_advantages(rewards, prompt_ids, kind="grpo")


def standardize(rewards: torch.Tensor, *, mean: float, std: float) -> torch.Tensor:
    """(B,) float32 ``(rewards - mean) / std``, with the moments of a reward model's training or ``RunningMoments``.

    Raises:
        ValueError: unless ``std`` > 0.
    """
    if not std > 0:
        raise ValueError(f"std must be > 0, got {std}")
    return (rewards.float() - mean) / std


@dataclass(frozen=True)
class RunningMoments:
    """Count, mean and sum of squared deviations of all rewards seen; the three fields are the whole state.

    Source: Chan, Golub & LeVeque 1979, STAN-CS-79-773, eq. 2.1.
    """

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    @property
    def std(self) -> float:
        """Population deviation; 1 as long as there is no spread to divide by."""
        return math.sqrt(self.m2 / self.count) if self.m2 > 0 else 1.0

    def update(self, rewards: torch.Tensor) -> RunningMoments:
        """With the rewards of a batch added, of any shape. Ranks update an empty one each and ``merge`` them."""
        # float64 sums of equal float32 rewards are exact: without spread m2 is exactly 0.
        values = rewards.float().double()
        if not values.numel():
            return self
        mean = values.sum() / values.numel()
        return self.merge(RunningMoments(values.numel(), float(mean), float((values - mean).square().sum())))

    def merge(self, other: RunningMoments) -> RunningMoments:
        """The moments of both sets of rewards together."""
        count = self.count + other.count
        if not count:
            return self
        delta, share = other.mean - self.mean, other.count / count
        between = delta * delta * self.count * share
        return RunningMoments(count, self.mean + delta * share, self.m2 + other.m2 + between)
