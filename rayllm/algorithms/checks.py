"""Input checks and the masking primitive that the other modules of this package share."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def masked(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``tensor`` in float32 with everything outside ``mask`` replaced by 0.

    Selects instead of multiplying, and before any arithmetic: what stands outside the mask (1e9, inf,
    NaN) then reaches neither a value nor a gradient.
    """
    return torch.where(mask.bool(), tensor.float(), 0.0)


def require_same_shape(**tensors: torch.Tensor) -> None:
    """Raise ValueError with every name and shape unless all tensors have one shape."""
    if len({tuple(tensor.shape) for tensor in tensors.values()}) > 1:
        listed = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes differ: {listed}")


def require_dim(dim: int, **tensors: torch.Tensor) -> None:
    """Raise ValueError with name and shape for the first tensor that does not have ``dim`` dimensions."""
    for name, tensor in tensors.items():
        if tensor.dim() != dim:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {dim} dimension(s)")


def require_known(name: str, value: str, known: Iterable[str]) -> None:
    """Raise ValueError that lists the known values unless ``value`` is one of them."""
    known = tuple(known)
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
