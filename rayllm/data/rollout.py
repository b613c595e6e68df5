"""One sampled response, or one conversation with an environment, as the rollout engine reported it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rayllm.data.experience import Experience


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledTurn:
    """The span of one of the policy's turns in a conversation with an environment."""

    start: int
    """Place of its first token in ``Rollout.token_ids``."""

    end: int
    """One past the place of its last token."""

    reward: float
    """What the environment gave for this turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """A prompt, one sampled response and the sampler's own log-probabilities. Made by the rollout actor only.

    Tokens are kept as sampled; text is decoded from them where a person or a judge reads it, and never
    encoded again for training. In a conversation with an environment the response is all that follows the prompt: the
    policy's turns and, between them, the environment's observations. It ends with a turn of the policy.
    """

    prompt_id: int
    """Row of the prompt in its data set; equal for every sample of one prompt."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """The response, end-of-turn token included when the model produced it."""

    logprobs: tuple[float, ...]
    """Nats, one per sampled token, under the sampling temperature."""

    finish_reason: str
    """"stop": the model ended its turn; "length": cut at max_new_tokens. Of a conversation with an environment, whose
    last turn is told about, also "max_turns" and "max_model_len": the model ended its turn and the environment was not
    done, but there was no turn or no room left."""

    policy_versions: tuple[int, ...]
    """Number of policy updates in the weights that sampled each token; they may change on the way."""

    turns: tuple[SampledTurn, ...] = ()
    """The policy's turns in order; none without an environment: all of ``token_ids`` is sampled then."""

    def __post_init__(self) -> None:
        assert len(self.logprobs) == sum(self.sampled), "one log-probability for each sampled token"
        assert len(self.policy_versions) == len(self.logprobs), "one policy version for each sampled token"

    @property
    def stopped(self) -> bool:
        """The model ended its last turn by itself."""
        return self.finish_reason != "length"

    @property
    def sampled(self) -> tuple[bool, ...]:
        """For each of ``token_ids``: sampled by the policy, not said by the environment."""
        if not self.turns:
            return (True,) * len(self.token_ids)
        places = {place for turn in self.turns for place in range(turn.start, turn.end)}
        return tuple(place in places for place in range(len(self.token_ids)))


def collate(rollouts: list[Rollout], *, pad_token_id: int) -> Experience:
    """Right-pad rollouts into one batch; fields that only scoring knows stay None.

    Observations of an environment are outside ``action_mask``, and each turn's reward is on its last token.
    """
    with_environment = any(rollout.turns for rollout in rollouts)
    assert all(bool(rollout.turns) == with_environment for rollout in rollouts), "one kind of rollout in a batch"
    width = max(len(r.prompt_token_ids) + len(r.token_ids) for r in rollouts)
    shape = (len(rollouts), width)
    sequences = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.bool)
    action_mask = torch.zeros(shape, dtype=torch.bool)
    rollout_logprobs = torch.zeros(shape, dtype=torch.float32)
    policy_versions = torch.zeros(shape, dtype=torch.int32)
    turn_rewards = torch.zeros(shape, dtype=torch.float32)
    for row, rollout in enumerate(rollouts):
        start = len(rollout.prompt_token_ids)
        end = start + len(rollout.token_ids)
        sequences[row, :end] = torch.tensor(rollout.prompt_token_ids + rollout.token_ids)
        attention_mask[row, :end] = True
        action_mask[row, start:end] = torch.tensor(rollout.sampled)
        rollout_logprobs[row, action_mask[row]] = torch.tensor(rollout.logprobs)
        policy_versions[row, action_mask[row]] = torch.tensor(rollout.policy_versions, dtype=torch.int32)
        for turn in rollout.turns:
            turn_rewards[row, start + turn.end - 1] = turn.reward
    return Experience(
        sequences=sequences,
        attention_mask=attention_mask,
        action_mask=action_mask,
        rollout_logprobs=rollout_logprobs,
        policy_versions=policy_versions,
        prompt_ids=torch.tensor([r.prompt_id for r in rollouts]),
        stopped=torch.tensor([r.stopped for r in rollouts]),
        turn_rewards=turn_rewards if with_environment else None,
    )
