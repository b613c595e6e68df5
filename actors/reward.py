"""What scores responses: a reward model, or the toy world's own judge. One number per response."""

from __future__ import annotations

from typing import Any

import torch

from actors.environment import device_of
from actors.scoring import micro_batches
from rayllm.algorithms.advantages import has_signal
from rayllm.algorithms.rewards import RunningMoments, standardize
from rayllm.data.experience import Experience, concat
from rayllm.data.files import Row
from rayllm.models.heads import ScalarModel, sequence_rewards


class RewardSource:
    """What the sources of rewards share. A source implements ``score``."""

    def score(self, shard: Experience) -> torch.Tensor:
        """(B,) float32."""
        raise NotImplementedError

    def rewards(self, shard: Experience) -> torch.Tensor:
        """(B,) float32: those that the shard brings, or else its scores and what its turns earned."""
        if shard.rewards is not None:
            return shard.rewards
        scores = self.score(shard)
        return scores if shard.turn_rewards is None else scores + shard.turn_rewards.sum(1)

    @staticmethod
    def moments(rewards: torch.Tensor) -> RunningMoments:
        """Of a shard's rewards, for the scale of the whole run."""
        return RunningMoments().update(rewards)

    @staticmethod
    def count_without_signal(shard: Experience, rewards: torch.Tensor) -> int:
        """Prompts of the shard whose responses all got the same reward."""
        return len(shard.prompt_ids[~has_signal(rewards, shard.prompt_ids)].unique())

    @staticmethod
    def replace_without_signal(
        shard: Experience, rewards: torch.Tensor, spare: Experience, spare_rewards: torch.Tensor
    ) -> Experience:
        """The shard with prompts that teach nothing replaced by those of ``spare`` that do; it brings its rewards.

        Prompts have equal numbers of responses, next to each other, so that the shard keeps its size.
        """
        shard, spare = shard.replace(rewards=rewards), spare.replace(rewards=spare_rewards)
        keep = has_signal(rewards, shard.prompt_ids)
        chosen = spare[has_signal(spare_rewards, spare.prompt_ids)]
        parts = [part for part in (shard[keep], chosen, shard[~keep]) if len(part)]
        return concat(parts)[slice(0, len(shard))]


class RewardActor(RewardSource):
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


class GoldRewardActor(RewardSource):
    """Scores responses with the toy world's exact judge."""

    def __init__(self, *, tokenizer: str, rows: list[Row]) -> None:
        """
        Args:
            tokenizer: model folder.
            rows: of the training prompts; a shard's prompt ids are indices into them.
        """
        from rayllm.models.loading import load_tokenizer

        device_of()
        self.tokenizer: Any = load_tokenizer(tokenizer)
        self.rows = rows

    def score(self, shard: Experience) -> torch.Tensor:
        """(B,) float32 gold scores, about -5 to 3."""
        from rayllm.world.judge import judge
        from rayllm.world.prompts import Prompt

        scores = []
        for index, prompt_id in enumerate(shard.prompt_ids.tolist()):
            token_ids = shard.sequences[index][shard.action_mask[index]].tolist()
            text = self.tokenizer.decode(token_ids, skip_special_tokens=True).strip()
            prompt = Prompt.from_row(self.rows[prompt_id])
            scores.append(judge(prompt, text, stopped=bool(shard.stopped[index])).gold)
        return torch.tensor(scores)


class EnvironmentRewardActor(RewardSource):
    """Nothing but what the environment's turns earned."""

    def score(self, shard: Experience) -> torch.Tensor:
        """(B,) zeros."""
        return torch.zeros(len(shard))
