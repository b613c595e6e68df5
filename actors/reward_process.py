"""The source of kind `process`: a process reward model, which scores the steps of a response."""

from __future__ import annotations

import math
from typing import Any

import torch

from actors.environment import device_of
from actors.scoring import per_token
from actors.weights import digest
from rayllm.config.reward import ProcessSource
from rayllm.data.experience import Experience
from rayllm.data.samples import Failed
from rayllm.data.steps import StepFinder
from rayllm.errors import InputError
from rayllm.models.folders import load_tokenizer
from rayllm.models.heads import ScalarModel


class ProcessScorer:
    """Gives, for each response, a number for each of its action tokens: 2p - 1 at the end of a step, else 0."""

    def __init__(self, source: ProcessSource) -> None:
        """Raises InputError unless the folder is that of a process reward model."""
        self.device = device_of()
        self.micro_batch_size = source.micro_batch_size
        self.model = ScalarModel.from_folder(source.model).to(self.device).eval()
        separator = getattr(self.model.classifier.config, "step_separator", None)
        if separator is None:
            raise InputError(
                f"model: {source.model} has no step_separator in its config.json: it is no process reward model; make "
                "one with `rayllm process-reward-model`"
            )
        self.finder = StepFinder(load_tokenizer(source.model), separator)

    def digest(self) -> str:
        """Of all weights."""
        return digest(self.model.named_parameters())

    def score(self, shard: Experience, _: Any) -> list[list[float] | Failed]:
        scores = per_token(
            shard, self.micro_batch_size, self.device, lambda part: self.model(part.sequences, part.attention_mask)
        )
        return [self._of_response(scores[row], shard, row) for row in range(len(shard))]

    def _of_response(self, scores: torch.Tensor, shard: Experience, row: int) -> list[float] | Failed:
        mask = shard.action_mask[row]
        earned = (2 * scores[mask].sigmoid() - 1).tolist()
        ends = set(self.finder.ends(shard.sequences[row][mask].tolist()))
        if not all(math.isfinite(earned[end]) for end in ends):
            return Failed("gave a number that is not finite")
        return [value if place in ends else 0.0 for place, value in enumerate(earned)]
