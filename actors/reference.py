"""A frozen language model: the reference in RLHF, and the scorer of text in evaluation."""

from __future__ import annotations

import torch

from actors.environment import device_of
from actors.scoring import per_token
from rayllm.algorithms.logprobs import token_logprobs
from rayllm.algorithms.losses import language_model_loss
from rayllm.data.experience import Experience
from rayllm.models.loading import load_causal_lm


class ReferenceActor:
    """Log-probabilities under weights that do not change."""

    def __init__(self, *, model: str, temperature: float, micro_batch_size: int) -> None:
        self.device = device_of()
        self.temperature, self.micro_batch_size = temperature, micro_batch_size
        self.load(model)

    def load(self, model: str) -> None:
        """Replace the model by that of a folder."""
        self.model = load_causal_lm(model).to(self.device)  # type: ignore[arg-type]

    def logprobs(self, shard: Experience) -> torch.Tensor:
        """(B, T) nats at the sampling temperature."""
        return per_token(shard, self.micro_batch_size, self.device, self._logprobs)

    @torch.no_grad()
    def bits_per_byte(self, model: str, text: tuple[torch.Tensor, float]) -> float:
        """Load ``model`` and measure it on text.

        Args:
            model: a model folder.
            text: (R, T) int64 rows of text, and the factor from nats per token to bits per byte.
        """
        self.load(model)
        rows, factor = text
        total = 0.0
        for part in rows.split(self.micro_batch_size):
            part = part.to(self.device)
            total += float(language_model_loss(self.model(input_ids=part).logits, part)) * len(part)
        return total / len(rows) * factor

    def _logprobs(self, part: Experience) -> torch.Tensor:
        logits = self.model(input_ids=part.sequences, attention_mask=part.attention_mask).logits
        return token_logprobs(logits, part.sequences, temperature=self.temperature)
