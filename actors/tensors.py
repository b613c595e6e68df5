"""How tensors travel between actors: as arrays, which pickle hands over as they lie. By themselves they are written out
one by one in the format of a file, ten times slower."""

from __future__ import annotations

import numpy as np
import torch


def send_as_arrays() -> None:
    """From now on, for all tensors that leave this process; they arrive on the CPU. For the methods of an actor."""
    import ray.util

    ray.util.register_serializer(torch.Tensor, serializer=_array_of, deserializer=_tensor_of)


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """(bytes,) uint8, for not every dtype is one of an array's; shared with a tensor that lies in one piece on the
    CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _array_of(tensor: torch.Tensor) -> tuple[np.ndarray, torch.dtype, torch.Size]:
    return bytes_of(tensor), tensor.dtype, tensor.shape


def _tensor_of(sent: tuple[np.ndarray, torch.dtype, torch.Size]) -> torch.Tensor:
    """A copy: an array out of Ray's store is read-only, which tensors do not know."""
    array, dtype, shape = sent
    tensor = torch.empty(shape, dtype=dtype)
    bytes_of(tensor)[:] = array
    return tensor
