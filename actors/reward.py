"""The reward model, which scores whole responses."""

from __future__ import annotations

import torch

from actors.environment import device_of
from actors.scoring import micro_batches
from rayllm.algorithms.rewards import standardize
from rayllm.data.experience import Experience
from rayllm.models.heads import ScalarModel, sequence_rewards


class RewardActor:
    """Scores responses with a frozen reward model."""

    def __init__(self, *, model: str, micro_batch_size: int) -> None:
        self.device = device_of()
        self.micro_batch_size = micro_batch_size
        self.model = ScalarModel.from_folder(model).to(self.device).eval()
        config = self.model.classifier.config
        self.mean = float(getattr(config, "reward_mean", 0.0))  # of another maker's reward model: as it is
        self.std = float(getattr(config, "reward_std", 1.0))

    @torch.no_grad()
    def score(self, shard: Experience) -> torch.Tensor:
        """(B,) float32, standardised by the mean and deviation that the reward model's training measured."""
        parts = []
        for part in micro_batches(shard, self.micro_batch_size):
            part = part.to(self.device)
            scores = self.model(part.sequences, part.attention_mask)
            parts.append(sequence_rewards(scores, part.attention_mask).cpu())
        return standardize(torch.cat(parts), mean=self.mean, std=self.std)

    def rewards(self, shard: Experience) -> torch.Tensor:
        """(B,) float32: the scores and, on top, what an environment's turns earned."""
        scores = self.score(shard)
        return scores if shard.turn_rewards is None else scores + shard.turn_rewards.sum(1)
