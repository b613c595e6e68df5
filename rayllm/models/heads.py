"""A scalar head on a decoder: one number per position, used as reward (at the last token) and as value.

Of an ensemble the head gives H numbers per position; its folder is that of a classifier with H labels, and
``reward_mean`` and ``reward_std`` in its config are lists of H held-out moments (for one head: two numbers).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rayllm.errors import InputError
from rayllm.models.loading import load_sequence_classifier


class ScalarModel(nn.Module):
    """Wraps a transformers sequence classifier, a label a head; its folder loads in plain transformers."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier: Any = classifier

    @classmethod
    def from_folder(
        cls, path: Path | str, *, dtype: str = "float32", seed: int | None = None, num_heads: int | None = None
    ) -> ScalarModel:
        """Load a classifier's folder, or a decoder's with new heads drawn from ``seed`` (InstructGPT: normal with
        deviation 1 / sqrt(width + 1), Stiennon et al. 2020).

        Args:
            path: model folder.
            dtype: of the weights.
            seed: of new heads; None keeps those of the folder.
            num_heads: None: as many as the folder holds, 1 for a decoder's. 1 of an ensemble's folder: the mean of
                its heads, each divided by its deviation.

        Raises:
            InputError: a classifier of several labels that are no ensemble's.
        """
        new = None if seed is None else num_heads or 1
        classifier: Any = load_sequence_classifier(path, num_labels=new, dtype=dtype)
        if seed is not None:
            head = classifier.score.weight
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                head.copy_(torch.randn(head.shape, generator=generator) / math.sqrt(head.shape[1] + 1))
            return cls(classifier)
        model = cls(classifier)
        if model.num_heads > 1 and not isinstance(getattr(classifier.config, "reward_std", None), list):
            raise InputError(
                f"{path}: a classifier of {model.num_heads} labels, expected a reward model: one label, or an ensemble "
                "with reward_mean and reward_std of each in its config.json"
            )
        if num_heads == 1 < model.num_heads:
            model._merge_heads()
        return model

    @property
    def num_heads(self) -> int:
        return int(self.classifier.score.out_features)

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """((H,) mean, (H,) deviation) of the rewards on held-out data, as stored with the model; 0 and 1 of another
        maker's model."""
        config, ones = self.classifier.config, [1.0] * self.num_heads
        mean, std = getattr(config, "reward_mean", [0.0] * self.num_heads), getattr(config, "reward_std", ones)
        return torch.tensor(mean).reshape(-1).float(), torch.tensor(std).reshape(-1).float()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """(B, T) float32, (B, T, H) of an ensemble: the head at every position, seeing the tokens up to and including
        it. Tokens are counted from the first real one, on whatever side the padding is."""
        positions = None if attention_mask is None else (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        hidden = self.classifier.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions
        ).last_hidden_state
        return self.classifier.score(hidden).squeeze(-1).float()

    def gradient_checkpointing_enable(self) -> None:
        self.classifier.gradient_checkpointing_enable()

    def _merge_heads(self) -> None:
        weight, (_, std) = self.classifier.score.weight, self.moments()
        self.classifier.score = nn.Linear(weight.shape[1], 1, bias=False, dtype=weight.dtype)
        with torch.no_grad():
            self.classifier.score.weight.copy_((weight / std[:, None]).mean(0, keepdim=True))
        self.classifier.config.num_labels = 1
        for name in ("reward_mean", "reward_std"):
            delattr(self.classifier.config, name)


def sequence_rewards(scores: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """(B,), or (B, H) of an ensemble: the score at each row's last real token, which ends the assistant's turn.

    Only the mask tells where that is: no token stands for padding.

    Args:
        scores: (B, T) or (B, T, H) of `ScalarModel`.
        attention_mask: (B, T) bool, padded on either side.
    """
    places = torch.arange(attention_mask.shape[1], device=scores.device)
    last = (attention_mask * places).argmax(1)
    return scores[torch.arange(len(scores), device=scores.device), last]


def token_values(scores: torch.Tensor) -> torch.Tensor:
    """(B, T) value before each token: the score at the token before it; column 0 is 0."""
    return nn.functional.pad(scores[:, :-1], (1, 0))
