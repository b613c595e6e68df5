"""The reward model, which scores whole responses; or several, as an ensemble."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from actors.environment import device_of
from actors.scoring import micro_batches
from actors.weights import digest
from rayllm.algorithms.ensembles import combine_ensemble
from rayllm.data.experience import Experience
from rayllm.data.padding import pad_right
from rayllm.models.heads import ScalarModel, sequence_rewards


class RewardActor:
    """Scores responses with a frozen reward model, or with an ensemble: several heads, several models, or both."""

    def __init__(
        self,
        *,
        model: str | Sequence[str],
        micro_batch_size: int,
        uncertainty: str = "none",
        uncertainty_coef: float = 1.0,
        standard: bool = True,
    ) -> None:
        """
        Args:
            model: folder of the reward model, or of each of several.
            micro_batch_size: most rows in one forward pass.
            uncertainty: kind of `combine_ensemble`.
            uncertainty_coef: its coef.
            standard: put every head on its own scale first.
        """
        self.device = device_of()
        self.micro_batch_size = micro_batch_size
        self.uncertainty, self.uncertainty_coef, self.standard = uncertainty, uncertainty_coef, standard
        folders = [model] if isinstance(model, str) else model
        self.models = [ScalarModel.from_folder(folder).to(self.device).eval() for folder in folders]

    def digest(self) -> str:
        """Of all weights."""
        named = enumerate(self.models)
        return digest((f"{index}.{name}", p) for index, model in named for name, p in model.named_parameters())

    def score(self, shard: Experience) -> torch.Tensor:
        """(B,) float32: of an ensemble with what its disagreement takes off."""
        return combine_ensemble(self.members(shard), kind=self.uncertainty, coef=self.uncertainty_coef)[0]

    def rewards(self, shard: Experience) -> torch.Tensor:
        """(B,) float32: the scores and, on top, what an environment's turns earned."""
        scores = self.score(shard)
        return scores if shard.turn_rewards is None else scores + shard.turn_rewards.sum(1)

    @torch.no_grad()
    def members(self, shard: Experience) -> torch.Tensor:
        """(B, H) float32: of every head of every model, unless ``standard`` is off by the mean and deviation that its
        training measured on held-out data."""
        parts = micro_batches(shard, self.micro_batch_size)
        columns = [
            torch.cat([self._read(model, part.sequences, part.attention_mask) for part in parts])
            for model in self.models
        ]
        raw = torch.cat(columns, 1)
        return self.standardised(raw) if self.standard else raw

    def standardised(self, raw: torch.Tensor) -> torch.Tensor:
        """(B, H) every head's scores on its own scale."""
        means, deviations = zip(*(model.moments() for model in self.models), strict=True)
        return (raw - torch.cat(means)) / torch.cat(deviations)

    @torch.no_grad()
    def raw_scores(self, sequences: list[np.ndarray]) -> torch.Tensor:
        """(B, H) float32 of prompts with responses as they come from the heads."""
        columns = []
        for model in self.models:
            parts = [sequences[i : i + self.micro_batch_size] for i in range(0, len(sequences), self.micro_batch_size)]
            columns.append(torch.cat([self._read(model, *pad_right(part, 0)) for part in parts]))
        return torch.cat(columns, 1)

    def _read(self, model: ScalarModel, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        return sequence_rewards(model(tokens, mask), mask).reshape(len(tokens), -1).cpu()
