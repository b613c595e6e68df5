"""A scalar head on a decoder: one number per position, used as reward (at the last token) and as value."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rayllm.models.loading import load_sequence_classifier


class ScalarModel(nn.Module):
    """Wraps a transformers sequence classifier with one label; its folder loads in plain transformers."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier: Any = classifier

    @classmethod
    def from_folder(cls, path: Path | str, *, dtype: str = "float32", seed: int | None = None) -> ScalarModel:
        """Load a classifier's folder, or a decoder's with a new head drawn from ``seed`` (InstructGPT: normal with
        deviation 1 / sqrt(width + 1), Stiennon et al. 2020)."""
        classifier: Any = load_sequence_classifier(path, dtype=dtype)
        if seed is not None:
            head = classifier.score.weight
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                head.copy_(torch.randn(head.shape, generator=generator) / math.sqrt(head.shape[1] + 1))
        return cls(classifier)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B, T) float32: the head at every position, seeing the tokens up to and including it."""
        hidden = self.classifier.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.classifier.score(hidden).squeeze(-1).float()

    def gradient_checkpointing_enable(self) -> None:
        self.classifier.gradient_checkpointing_enable()


def sequence_rewards(scores: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """(B,) the score at each row's last real token.

    Args:
        scores: (B, T) of `ScalarModel`.
        attention_mask: (B, T) bool, right-padded.
    """
    last = attention_mask.sum(1) - 1
    return scores.gather(1, last[:, None]).squeeze(1)


def token_values(scores: torch.Tensor) -> torch.Tensor:
    """(B, T) value before each token: the score at the token before it; column 0 is 0."""
    return nn.functional.pad(scores[:, :-1], (1, 0))
