"""A frozen language model: the reference in RLHF, and the scorer of text in evaluation."""

from __future__ import annotations

import torch

from actors.environment import device_of
from actors.publishing import Published
from actors.scoring import mean_nats, per_token
from actors.weights import digest, unpack
from rayllm import faults
from rayllm.algorithms.logprobs import token_logprobs
from rayllm.data.experience import Experience
from rayllm.models.loading import load_causal_lm


class ReferenceActor:
    """Log-probabilities under weights that do not learn."""

    def __init__(self, *, model: str, temperature: float, micro_batch_size: int) -> None:
        self.device = device_of()
        self.temperature, self.micro_batch_size = temperature, micro_batch_size
        self.load(model)

    def load(self, model: str) -> None:
        """Replace the model by that of a folder."""
        self.model = load_causal_lm(model).to(self.device)  # type: ignore[arg-type]

    def logprobs(self, shard: Experience) -> torch.Tensor:
        """(B, T) nats at the sampling temperature."""
        logprobs = per_token(shard, self.micro_batch_size, self.device, self._logprobs)
        return faults.reach("reference.logprobs", logprobs)

    def digest(self) -> str:
        """Of all weights."""
        return digest(self.model.named_parameters())

    @torch.no_grad()
    def move(self, weights: Published, *, ema: float) -> None:
        """Towards the policy: ``ema`` times these weights plus ``1 - ema`` times the policy's."""
        own = dict(self.model.named_parameters())
        for name, tensor in unpack(weights.fetch()):
            own[name].lerp_(tensor.to(own[name]), 1 - ema)

    def save(self, folder: str) -> None:
        """The weights, for a checkpoint."""
        self.model.save_pretrained(folder)

    @torch.no_grad()
    def bits_per_byte(self, model: str, text: tuple[torch.Tensor, float]) -> float:
        """Load ``model`` and measure it on text.

        Args:
            model: a model folder.
            text: (R, T) int64 rows of text, and the factor from nats per token to bits per byte.
        """
        self.load(model)
        rows, factor = text
        return mean_nats(self.model, rows, self.micro_batch_size, self.device) * factor

    def _logprobs(self, part: Experience) -> torch.Tensor:
        logits = self.model(input_ids=part.sequences, attention_mask=part.attention_mask).logits
        return token_logprobs(logits, part.sequences, temperature=self.temperature)
