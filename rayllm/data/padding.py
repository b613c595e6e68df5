"""Sequences of different lengths as one right-padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def pad_right(sequences: Sequence[np.ndarray], fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    """((B, T) int64 tokens, (B, T) bool mask of the real ones)."""
    width = max(len(sequence) for sequence in sequences)
    tokens = torch.full((len(sequences), width), fill, dtype=torch.int64)
    mask = torch.zeros((len(sequences), width), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.from_numpy(np.asarray(sequence))
        mask[row, : len(sequence)] = True
    return tokens, mask
