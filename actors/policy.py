"""The policy: the model being trained (PPO's policy half)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch

from actors.learner import LearnerActor
from actors.weights import pack
from rayllm.algorithms.advantages import gae, masked_moments, whiten
from rayllm.algorithms.kl import kl_estimate
from rayllm.algorithms.logprobs import token_logprobs
from rayllm.algorithms.losses import policy_loss
from rayllm.algorithms.metrics import approx_kl, clip_fraction, masked_mean
from rayllm.algorithms.rewards import per_token_rewards
from rayllm.config.ppo import PPOConfig
from rayllm.data.experience import Experience
from rayllm.models.engine import Engine
from rayllm.models.loading import load_causal_lm, load_tokenizer, save_model


class PolicyActor(LearnerActor):
    """One rank of the policy."""

    def __init__(self, *, rank: int, world_size: int, config: PPOConfig) -> None:
        super().__init__(rank=rank, world_size=world_size, config=config, role=config.policy)

    def setup(self, address: tuple[str, int]) -> None:
        """Join the ranks and load the model."""
        self.join(address)
        self.engine = Engine(load_causal_lm(self.config.model), self.role.optimizer, self.role.learner)

    def logprobs(self, shard: Experience) -> torch.Tensor:
        """(B, T) nats under the weights before this step's update, at the sampling temperature."""
        return self.score(shard, self._logprobs)

    def ref_logprobs(self, shard: Experience) -> torch.Tensor:
        """(B, T) nats under the start policy, which is this one with its adapters switched off (LoRA only)."""
        with self.engine.reference():
            return self.score(shard, self._logprobs)

    def experience(
        self,
        shard: Experience,
        rewards: torch.Tensor,
        logprobs: torch.Tensor,
        ref_logprobs: torch.Tensor,
        values: torch.Tensor,
    ) -> Experience:
        """The shard with all that both updates need: KL-penalised token rewards, advantages, returns."""
        algorithm = self.config.algorithm
        token_rewards = per_token_rewards(
            rewards - algorithm.missing_eos_penalty * (~shard.stopped),
            logprobs,
            ref_logprobs,
            shard.action_mask,
            kl_coef=algorithm.kl_coef,
            estimator=algorithm.kl_estimator,
            clip=algorithm.reward_clip,
        )
        advantages, returns = gae(
            token_rewards, values, shard.action_mask, gamma=algorithm.gamma, gae_lambda=algorithm.gae_lambda
        )
        return shard.replace(
            rewards=rewards,
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            values=values,
            advantages=advantages,
            returns=returns,
        )

    def update(self, *shards: Experience, step: int) -> dict[str, float]:
        """Whiten over the global batch, then clipped policy steps. Returns metrics of rollouts and update."""
        experience = self.joined(shards)
        metrics = self.mean_over_ranks(self._rollout_sums(experience))
        moments = self.engine.sum_tensor(masked_moments(experience.advantages, experience.action_mask))
        experience = experience.replace(
            advantages=whiten(experience.advantages, experience.action_mask, moments=moments)
        )
        if step < self.config.algorithm.critic_warmup_steps:
            return metrics
        return {**metrics, **self._optimize(experience, step)}

    def _optimize(self, experience: Experience, step: int) -> dict[str, float]:
        stats = []
        sums = {"policy/clipfrac": (0.0, 0.0), "policy/approx_kl": (0.0, 0.0)}
        learning_rate = self.learning_rate(step)
        for batch in self.minibatches(experience, step):
            tokens = self.global_tokens(batch)
            loss = partial(self._loss, tokens=tokens, sums=sums)
            stats.append(self.engine.update(batch, loss, learning_rate=learning_rate))
        return {**self.update_metrics("loss/policy", "policy", stats), **self.mean_over_ranks(sums)}

    def _loss(self, part: Experience, tokens: float, sums: dict[str, tuple[float, float]]) -> torch.Tensor:
        part = part.to(self.engine.device)
        new_logprobs = self._logprobs(part)
        clip_range = self.config.algorithm.clip_range
        count = float(part.action_mask.sum())
        old, mask, detached = part.logprobs, part.action_mask, new_logprobs.detach()
        for name, value in (
            ("policy/clipfrac", clip_fraction(detached, old, mask, clip_range)),
            ("policy/approx_kl", approx_kl(detached, old, mask)),
        ):
            total, seen = sums[name]
            sums[name] = (total + float(value) * count, seen + count)
        return policy_loss(new_logprobs, old, part.advantages, mask, clip_range=clip_range, normalizer=tokens)

    def _logprobs(self, part: Experience) -> torch.Tensor:
        logits = self.engine(input_ids=part.sequences, attention_mask=part.attention_mask).logits
        return token_logprobs(logits, part.sequences, temperature=self.config.rollout.temperature)

    def _rollout_sums(self, experience: Experience) -> dict[str, tuple[float, float]]:
        mask = experience.action_mask
        rows, tokens = float(len(experience)), float(mask.sum())
        kl = kl_estimate(
            experience.logprobs, experience.ref_logprobs, estimator=self.config.algorithm.kl_estimator, mask=mask
        )
        mismatch = masked_mean((experience.logprobs - experience.rollout_logprobs).abs(), mask)
        return {
            "objective/rewards": (float(experience.rewards.sum()), rows),
            "objective/kl": (float(kl.sum()), rows),
            "objective/entropy": (-float(experience.logprobs[mask].sum()), tokens),
            "response/length_mean": (tokens, rows),
            "response/stop_rate": (float(experience.stopped.sum()), rows),
            "rollout/logprob_mismatch": (float(mismatch) * tokens, tokens),
        }

    def publish_weights(self, version: int) -> list[ray.ObjectRef]:
        """Put the full weights into the object store; rank 0 returns their reference in a list, others an empty one.

        The list keeps Ray from fetching the weights on the way through the driver.
        """
        if self.rank == 0:
            return [ray.put(pack(self.engine.named_tensors(), version=version))]
        for _ in self.engine.named_tensors():  # ZeRO-3 gathers on all ranks
            continue
        return []

    def export(self, folder: str) -> None:
        """Write the model folder (rank 0; every rank must be called)."""
        weights: dict[str, Any] = self.engine.state_dict()
        self.engine.save_adapter(Path(folder) / "adapter")
        if self.rank == 0:
            tokenizer = load_tokenizer(self.config.model)
            save_model(self.engine.module, tokenizer, Path(folder), state_dict=weights)
