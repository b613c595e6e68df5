"""One sampled response, as the rollout engine reported it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rayllm.data.experience import Experience


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """A prompt, one sampled response and the sampler's own log-probabilities. Made by the rollout actor only.

    Tokens are kept as sampled; text is decoded from them where a person or a judge reads it, and never
    encoded again for training.
    """

    prompt_id: int
    """Row of the prompt in its data set; equal for every sample of one prompt."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """The response, end-of-turn token included when the model produced it."""

    logprobs: tuple[float, ...]
    """Nats, one per response token, under the sampling temperature."""

    finish_reason: str
    """"stop": the model ended its turn; "length": cut at max_new_tokens."""

    policy_version: int
    """Number of policy updates in the weights that sampled it."""

    @property
    def stopped(self) -> bool:
        return self.finish_reason == "stop"


def collate(rollouts: list[Rollout], *, pad_token_id: int) -> Experience:
    """Right-pad rollouts into one batch; fields that only scoring knows stay None."""
    width = max(len(r.prompt_token_ids) + len(r.token_ids) for r in rollouts)
    shape = (len(rollouts), width)
    sequences = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.bool)
    action_mask = torch.zeros(shape, dtype=torch.bool)
    rollout_logprobs = torch.zeros(shape, dtype=torch.float32)
    for row, rollout in enumerate(rollouts):
        start = len(rollout.prompt_token_ids)
        end = start + len(rollout.token_ids)
        sequences[row, :end] = torch.tensor(rollout.prompt_token_ids + rollout.token_ids)
        attention_mask[row, :end] = True
        action_mask[row, start:end] = True
        rollout_logprobs[row, start:end] = torch.tensor(rollout.logprobs)
    return Experience(
        sequences=sequences,
        attention_mask=attention_mask,
        action_mask=action_mask,
        rollout_logprobs=rollout_logprobs,
        prompt_ids=torch.tensor([r.prompt_id for r in rollouts]),
        stopped=torch.tensor([r.stopped for r in rollouts]),
    )
