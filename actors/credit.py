"""What the responses of a step earned, put where the updates of policy and critic look for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rayllm.algorithms.advantages import estimate
from rayllm.algorithms.rewards import (
    clip_rewards,
    group_normalize,
    length_penalty,
    overlong_penalty,
    per_token_rewards,
)
from rayllm.config.ppo import PPOConfig
from rayllm.data.experience import Experience, check_finite, without_dropped
from rayllm.data.scores import Mix, Scores, mixed, with_step_rewards


def completed(
    shard: Experience,
    logprobs: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    values: torch.Tensor | None,
    scores: Sequence[Scores],
    *,
    mix: Mix,
    kl_coef: float,
    config: PPOConfig,
    greedy: tuple[Experience, Sequence[Scores]] | None = None,
) -> Experience:
    """The shard with all that the updates need: token rewards, advantages, returns, off-policy weights.

    Args:
        shard: rollouts.
        logprobs: (B, T) nats of the policy; None where the step's only update computes them: the penalty then takes the
            sampler's.
        ref_logprobs, values: (B, T); None in a run without them.
        scores: of the shard, one a source of rewards. A response that a source dropped is left out of everything that
            is learned.
        mix: how the sources count.
        kl_coef: of this step.
        greedy: for ReMax, the greedy responses to the prompts of all rows, (B, *), and their scores.

    Raises:
        RuntimeError: a number of an action token is not finite; says whose it is and names the prompts.
    """
    rewards = mixed(shard, scores, mix)
    baselines = None if greedy is None else _baselines(*greedy, mix=mix, config=config)
    shard, rewards, baselines = without_dropped(with_step_rewards(shard, scores, mix), rewards, baselines)
    check_finite(
        shard,
        {
            "the sampler's log-probabilities": shard.rollout_logprobs,
            "the policy's log-probabilities": logprobs,
            "the reference's log-probabilities": ref_logprobs,
            "the critic's values": values,
        },
    )
    advantages, returns = estimate(
        config.algorithm.advantage,
        _token_rewards(shard, rewards, logprobs, ref_logprobs, kl_coef, config),
        shard.action_mask,
        values=values,
        prompt_ids=shard.prompt_ids,
        baseline=baselines,
        gamma=config.algorithm.gamma,
        gae_lambda=config.algorithm.gae_lambda,
    )
    filled = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values}
    return shard.replace(
        rewards=rewards,
        advantages=advantages,
        returns=returns,
        **{name: tensor for name, tensor in filled.items() if tensor is not None},
    )


def _baselines(greedy: Experience, scores: Sequence[Scores], *, mix: Mix, config: PPOConfig) -> torch.Tensor:
    """(B,) what the greedy responses earn: shaped by their own lengths and ends, bounded as the sampled ones are."""
    return clip_rewards(_shaped(mixed(greedy, scores, mix), greedy, config), clip=config.shaping.clip)


def _token_rewards(
    shard: Experience,
    rewards: torch.Tensor,
    logprobs: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    kl_coef: float,
    config: PPOConfig,
) -> torch.Tensor:
    """(B, T): what the environment's turns earned where they ended, the rest of the (B,) rewards at the response's end,
    and the penalty for leaving the reference at every token, if it is part of the reward."""
    final = rewards if shard.turn_rewards is None else rewards - shard.turn_rewards.sum(1)
    sampled = shard.rollout_logprobs if logprobs is None else logprobs
    if ref_logprobs is None or config.algorithm.kl_in != "reward":
        ref_logprobs = sampled  # no penalty
    return per_token_rewards(
        _shaped(final, shard, config),
        sampled,
        ref_logprobs,
        shard.action_mask,
        kl_coef=kl_coef,
        estimator=config.algorithm.kl_estimator,
        clip=config.shaping.clip,
        turn_rewards=shard.turn_rewards,
    )


def _shaped(rewards: torch.Tensor, shard: Experience, config: PPOConfig) -> torch.Tensor:
    """(B,) rewards with what the response's length and end take off."""
    shaping, lengths = config.shaping, shard.action_mask.sum(1)
    if shaping.normalize == "group":
        kept = shard.action_mask.any(1)
        normalized = group_normalize(rewards[kept], shard.prompt_ids[kept])
        rewards = torch.zeros_like(rewards).masked_scatter(kept, normalized)
    rewards = rewards - shaping.missing_eos_penalty * (~shard.stopped)
    rewards = rewards + length_penalty(lengths, per_token=shaping.length_penalty)
    if shaping.overlong_buffer:
        limit = config.rollout.max_new_tokens
        rewards = rewards + overlong_penalty(lengths, max_length=limit, buffer=shaping.overlong_buffer)
    return rewards
