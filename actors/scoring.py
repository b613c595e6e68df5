"""Forward passes over an experience in micro-batches, padding cut off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from actors.counters import count
from rayllm.algorithms.losses import language_model_loss
from rayllm.data.experience import Experience


def micro_batches(experience: Experience, size: int) -> list[Experience]:
    """Rows in order, at most ``size`` each, cut to the longest row of the part."""
    parts = [experience[i : i + size] for i in range(0, len(experience), size)]
    return [part.trimmed() for part in parts]


def select(experience: Experience, rows: Sequence[int]) -> Experience:
    """These rows as a micro-batch; for no rows one that weighs nothing, as no token of it is an action."""
    if rows:
        return experience[torch.tensor(rows)].trimmed()
    idle = experience[:1].trimmed()
    return idle.replace(action_mask=torch.zeros_like(idle.action_mask))


def per_token(
    experience: Experience, size: int, device: torch.device, forward: Callable[[Experience], torch.Tensor]
) -> torch.Tensor:
    """(B, T) float32 on the CPU: ``forward`` of at most ``size`` rows at a time, put back to full width."""
    rows = range(len(experience))
    return per_token_in_parts(experience, [rows[i : i + size] for i in rows[::size]], device, forward)


@torch.no_grad()
def per_token_in_parts(
    experience: Experience,
    parts: Sequence[Sequence[int]],
    device: torch.device,
    forward: Callable[[Experience], torch.Tensor],
) -> torch.Tensor:
    """(B, T) float32 on the CPU: ``forward`` of each part's rows, put back to their places.

    Args:
        experience: B rows.
        parts: every row in one of them; an empty part is computed on and thrown away (a rank that only keeps pace).
        device: of the model.
        forward: micro-batch -> a value for each of its tokens.
    """
    result = torch.zeros(experience.sequences.shape)
    for rows in parts:
        values = forward(select(experience, rows).to(device)).float().cpu()
        count("parts")
        if rows:
            result[torch.tensor(rows), : values.shape[1]] = values
    return result


@torch.no_grad()
def mean_nats(model: Callable[..., Any], rows: torch.Tensor, size: int, device: torch.device) -> float:
    """Mean loss per predicted token over (R, T) rows of text, in nats."""
    total = 0.0
    for part in rows.split(size):
        part = part.to(device)
        total += float(language_model_loss(model(input_ids=part).logits, part)) * len(part)
        count("parts")
    return total / len(rows)
