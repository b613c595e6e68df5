"""The actors of an RL run without their models: same methods, answers of the same size, at once."""

from __future__ import annotations

from typing import Any

import torch

from actors.proof import Prover, Served
from actors.publishing import Published, Publisher
from actors.reward_source import SourceActor
from bench.workload import NEW_TOKENS, PROMPT_TOKENS
from rayllm.data.experience import Experience
from rayllm.data.prompts import PromptSpan
from rayllm.data.scores import Mix, Scores, ShardStats, mixed, sample_ids_of

METRICS = (
    "objective/rewards", "objective/entropy", "objective/kl", "response/length_mean", "response/stop_rate",
    "rollout/logprob_mismatch", "rollout/logprob_mismatch_kl", "rollout/logprob_mismatch_max", "loss/policy",
    "policy/skipped_steps", "policy/grad_norm", "policy/lr", "policy/clipfrac", "policy/approx_kl",
)  # fmt: skip
"""What a policy's update reports."""

WEIGHTS = [(f"model.layers.{i // 11}.weight-{i % 11}", torch.zeros(8)) for i in range(311)]
"""As many tensors as a model of 0.5B has."""


def shard_of(num: int) -> Experience:
    """``num`` responses as long as the workload's."""
    shape = (num, PROMPT_TOKENS + NEW_TOKENS)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:, PROMPT_TOKENS:] = True
    return Experience(
        sequences=torch.ones(shape, dtype=torch.int64),
        attention_mask=torch.ones(shape, dtype=torch.bool),
        action_mask=mask,
        rollout_logprobs=torch.zeros(shape),
        policy_versions=torch.zeros(shape, dtype=torch.int32),
        prompt_ids=torch.arange(num),
        stopped=torch.ones(num, dtype=torch.bool),
    )


class FakeRolloutActor(Prover):
    """For ``RolloutActor``."""

    async def experience(self, span: PromptSpan, *, step: int, again: int) -> Experience:
        return shard_of(span.count)

    async def sync(self, weights: Published, *, probe: list[int], **settings: Any) -> int:
        self._served = Served(weights.version, [0.0] * (len(probe) - 1))
        return weights.version

    async def served(self) -> Served:
        return self._served


class FakeSourceActor:
    """For ``SourceActor``; as that one it runs an event loop."""

    async def scores(self, shard: Experience) -> Scores:
        return Scores("model", sample_ids_of(shard.prompt_ids), torch.zeros(len(shard)))

    def stats(self, *scores: Scores) -> list[ShardStats]:
        return SourceActor.stats(*scores)


class FakeModelActor:
    """For policy, critic and reference: one call after the other, without an event loop."""

    def __init__(self) -> None:
        self.publisher = Publisher()

    def logprobs(self, shard: Experience) -> torch.Tensor:
        return torch.zeros(shard.sequences.shape)

    def values(self, shard: Experience) -> torch.Tensor:
        return torch.zeros(shard.sequences.shape)

    def experience(
        self, shard: Experience, logprobs: torch.Tensor, ref_logprobs: torch.Tensor, values: torch.Tensor,
        *scores: Scores, mix: Mix, **settings: Any,
    ) -> Experience:  # fmt: skip
        rewards = mixed(shard, scores, mix)
        per_token = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values}
        return shard.replace(rewards=rewards, advantages=values, returns=values, **per_token)

    def update(self, *shards: Experience, **settings: Any) -> dict[str, float]:
        return {**dict.fromkeys(METRICS, 0.0), "objective/entropy": 1.0}  # none would be told as an alarm, every step

    def publish_weights(self, version: int, *, dtype: str, nodes: list[str]) -> Published:
        return self.publisher.publish(WEIGHTS, version=version, nodes=nodes)

    def text_logprobs(self, token_ids: list[int], after: None = None) -> list[float]:
        return [0.0] * (len(token_ids) - 1)

    def checkpoint_bytes(self) -> int:
        return 0

    def save(self, folder: str) -> dict[str, Any]:
        return {}
