"""Named tensors as one flat byte buffer, the form in which weights travel from a learner to the rollout engines.

One buffer is one object in Ray's store: every actor on a node reads the same pages, and nothing is copied on the
way to the engine. Names are those of the Hugging Face checkpoint. Needs torch only.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from safetensors import safe_open

ALIGNMENT = 64
"""Bytes. Every tensor starts on such a boundary, so that a view of any dtype is legal."""


class Entry(NamedTuple):
    """Where one tensor lies in the buffer."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightBundle:
    """Every tensor of a checkpoint, at one policy version."""

    buffer: np.ndarray  # uint8, flat
    entries: tuple[Entry, ...]
    version: int
    """Number of policy updates in the weights."""

    checksum: str
    """xxh3-128 of the buffer, in hex."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {entry.name: entry.shape for entry in self.entries}


def pack(
    named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int, dtype: torch.dtype | None = None
) -> WeightBundle:
    """Copy tensors into one buffer, each as soon as it is yielded, so a generator may free or reuse them.

    Args:
        named_tensors: checkpoint names and whole tensors, on any device.
        version: number of policy updates in them.
        dtype: floating point tensors are cast to it; None keeps theirs.

    Raises:
        ValueError: a name comes twice.
    """
    buffer = bytearray()
    entries: dict[str, Entry] = {}
    for name, tensor in named_tensors:
        if name in entries:
            raise ValueError(f"weights: {name} comes twice")
        tensor = tensor.detach()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        buffer.extend(bytes(-len(buffer) % ALIGNMENT))
        dtype_name = str(tensor.dtype).removeprefix("torch.")
        entries[name] = Entry(name, dtype_name, tuple(tensor.shape), len(buffer), data.nbytes)
        buffer.extend(data.data)
    flat = np.frombuffer(buffer, dtype=np.uint8)
    return WeightBundle(
        buffer=flat, entries=tuple(entries.values()), version=version, checksum=_checksum(flat)
    )


def unpack(bundle: WeightBundle) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in their order, as views of the buffer. A buffer out of Ray's store is read-only: do not write."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        flat = torch.from_numpy(bundle.buffer)
    for entry in bundle.entries:
        data = flat[entry.offset : entry.offset + entry.nbytes]
        yield entry.name, data.view(getattr(torch, entry.dtype)).view(entry.shape)


def verify(bundle: WeightBundle) -> None:
    """Raise RuntimeError when the buffer is not the one that was packed."""
    found = _checksum(bundle.buffer)
    if found != bundle.checksum:
        raise RuntimeError(
            f"weights of version {bundle.version} arrived damaged: checksum {found}, packed {bundle.checksum}"
        )


def check_shapes(
    shapes: dict[str, tuple[int, ...]],
    *,
    expected: dict[str, tuple[int, ...]],
    optional: Collection[str] = (),
) -> None:
    """Raise RuntimeError unless ``shapes`` has the expected names, all of them, each with its shape.

    Engines take an incomplete update without a word and then serve a mixture of two models.

    Args:
        optional: names that may be missing or unexpected.
    """
    missing = sorted(expected.keys() - shapes.keys() - set(optional))
    unknown = sorted(shapes.keys() - expected.keys() - set(optional))
    if missing or unknown:
        raise RuntimeError(f"weight update refused: missing {missing}, unknown {unknown}")
    for name in sorted(shapes.keys() & expected.keys()):
        if shapes[name] != expected[name]:
            raise RuntimeError(
                f"weight update refused: {name} has shape {shapes[name]}, expected {expected[name]}"
            )


def read_safetensors(model_dir: Path | str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a model folder, all shards, one in memory at a time."""
    for shard in _shards(Path(model_dir)):
        with safe_open(shard, framework="pt") as tensors:
            for name in tensors.keys():
                yield name, tensors.get_tensor(name)


def safetensors_shapes(model_dir: Path | str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model folder, from the files' headers."""
    shapes = {}
    for shard in _shards(Path(model_dir)):
        with safe_open(shard, framework="pt") as tensors:
            for name in tensors.keys():
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
    return shapes


def _shards(model_dir: Path) -> list[Path]:
    """The index names the shards where there is one: a folder may hold the same weights twice in other layouts."""
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        return sorted({model_dir / name for name in json.loads(index.read_text())["weight_map"].values()})
    shards = sorted(model_dir.glob("*.safetensors"))
    if not shards:
        raise ValueError(f"{model_dir} has no *.safetensors weights")
    return shards


def _checksum(buffer: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(buffer.data)
