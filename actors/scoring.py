"""Forward passes over an experience in micro-batches, padding cut off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rayllm.algorithms.losses import language_model_loss
from rayllm.data.experience import Experience


def micro_batches(experience: Experience, size: int) -> list[Experience]:
    """Rows in order, at most ``size`` each, cut to the longest row of the part."""
    parts = [experience[i : i + size] for i in range(0, len(experience), size)]
    return [part.trimmed() for part in parts]


@torch.no_grad()
def per_token(
    experience: Experience, size: int, device: torch.device, forward: Callable[[Experience], torch.Tensor]
) -> torch.Tensor:
    """(B, T) float32 on the CPU: ``forward`` of every micro-batch, put back to full width."""
    width = experience.sequences.shape[1]
    parts = []
    for part in micro_batches(experience, size):
        values = forward(part.to(device)).float().cpu()
        parts.append(torch.nn.functional.pad(values, (0, width - values.shape[1])))
    return torch.cat(parts)


@torch.no_grad()
def mean_nats(model: Callable[..., Any], rows: torch.Tensor, size: int, device: torch.device) -> float:
    """Mean loss per predicted token over (R, T) rows of text, in nats."""
    total = 0.0
    for part in rows.split(size):
        part = part.to(device)
        total += float(language_model_loss(model(input_ids=part).logits, part)) * len(part)
    return total / len(rows)
