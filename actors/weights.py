"""Named tensors as one flat byte buffer, the form in which weights travel from a learner to the rollout engines.

The buffer lies in memory that others on this node map (``memory.py``): all read the same pages, and nothing is copied
on the way to the engine. Names are those of the Hugging Face checkpoint. Needs torch only.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from safetensors import safe_open

from actors.memory import Memory
from actors.tensors import bytes_of

ALIGNMENT = 64
"""Bytes. Every tensor starts on such a boundary, so that a view of any dtype is legal."""

CHECKED_TOGETHER = 1 << 20
"""Bytes that still lie in a core's cache when they are looked at again."""

HASH = xxhash.xxh3_128
"""Of weights, wherever two sides compare theirs."""

ADAPTER_A, ADAPTER_B = ".lora_A", ".lora_B"
"""What the names of an adapter's two matrices add to that of the weight."""


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

    scaling: dict[str, float] = field(default_factory=dict)
    """Where only adapters are in the buffer: checkpoint name of an adapted weight -> factor of their product."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {entry.name: entry.shape for entry in self.entries}


def pack(
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    version: int,
    dtype: torch.dtype | None = None,
    scaling: dict[str, float] | None = None,
    memory: Memory | None = None,
) -> WeightBundle:
    """Copy tensors into one buffer, each as soon as it is yielded, so a generator may free or reuse them.

    Args:
        named_tensors: checkpoint names and whole tensors, on any device.
        version: number of policy updates in them.
        dtype: floating point tensors are cast to it; None keeps theirs.
        scaling: of adapters, where the tensors are adapters.
        memory: to pack into; the bundle holds until the next one is packed there. None takes new memory.

    Raises:
        ValueError: a name comes twice.
        RuntimeError: a weight is NaN or infinite: whoever reads the last version keeps it.
    """
    memory = memory or Memory()
    end = 0
    checksum = HASH()
    entries: dict[str, Entry] = {}
    fresh: list[Entry] = []  # of one dtype, checked together: on its own a small one takes longer than its copy

    def close(until: int) -> None:
        """Look at what is fresh and hash it, with the zeros after it, while it is in the cache."""
        if fresh:
            _check_finite(fresh, torch.from_numpy(memory.array), version)
            checksum.update(memory.array[fresh[0].offset : until].data)
            fresh.clear()

    for name, tensor in named_tensors:
        if name in entries:
            raise ValueError(f"weights: {name} comes twice")
        tensor = tensor.detach()
        kept = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        start = end + -end % ALIGNMENT
        nbytes = tensor.numel() * kept.itemsize
        entry = Entry(name, str(kept).removeprefix("torch."), tuple(tensor.shape), start, nbytes)
        memory.reserve(start + nbytes)
        memory.array[end:start] = 0
        if fresh and (fresh[0].dtype != entry.dtype or end - fresh[0].offset > CHECKED_TOGETHER):
            close(start)
        entries[name] = entry
        fresh.append(entry)
        end = start + nbytes
        if tensor.device.type != "cpu":
            tensor = tensor.to(kept)  # there, for fewer bytes to fetch
        _view(torch.from_numpy(memory.array), [entry]).view(entry.shape).copy_(tensor)
    close(end)
    return WeightBundle(
        buffer=memory.array[:end],
        entries=tuple(entries.values()),
        version=version,
        checksum=checksum.hexdigest(),
        scaling=scaling or {},
    )


def _check_finite(entries: Sequence[Entry], flat: torch.Tensor, version: int) -> None:
    """Of entries that lie side by side. Between them are zeros."""
    values = _view(flat, entries)
    if not values.numel() or not values.is_floating_point() or all(map(math.isfinite, torch.aminmax(values))):
        return
    if len(entries) == 1:
        raise RuntimeError(f"weights of version {version} are not handed out: {entries[0].name} holds NaN or infinity")
    for entry in entries:
        _check_finite([entry], flat, version)


def _view(flat: torch.Tensor, entries: Sequence[Entry]) -> torch.Tensor:
    """From the first to the last, which are of one dtype and lie side by side."""
    return flat[entries[0].offset : entries[-1].offset + entries[-1].nbytes].view(getattr(torch, entries[0].dtype))


def unpack(bundle: WeightBundle) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in their order, as views of the buffer. A buffer out of Ray's store is read-only: do not write."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        flat = torch.from_numpy(bundle.buffer)
    for entry in bundle.entries:
        yield entry.name, _view(flat, [entry]).view(entry.shape)


def merged(bundle: WeightBundle, model_dir: Path | str) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a model folder with the bundle's adapters in them, float32 where one is; Hu et al. 2021, eq. 3."""
    adapters = dict(unpack(bundle))
    for name, tensor in read_safetensors(model_dir):
        if name in bundle.scaling:
            a, b = adapters[name + ADAPTER_A].float(), adapters[name + ADAPTER_B].float()
            tensor = torch.addmm(tensor.float(), b, a, alpha=bundle.scaling[name])
        yield name, tensor


def verify(bundle: WeightBundle) -> None:
    """Raise RuntimeError when the buffer is not the one that was packed."""
    found = HASH(bundle.buffer.data).hexdigest()
    if found != bundle.checksum:
        raise RuntimeError(
            f"weights of version {bundle.version} arrived damaged: checksum {found}, packed {bundle.checksum}"
        )


def digest(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """xxh3-128 of names and weights, in hex."""
    found = HASH()
    for name, tensor in named_tensors:
        found.update(name.encode())
        found.update(bytes_of(tensor).data)
    return found.hexdigest()


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
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        elsewhere = [name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)]
        if elsewhere:
            raise ValueError(f"{index} names a file outside its folder: {elsewhere[0]!r}")
        return [model_dir / name for name in names]
    shards = sorted(model_dir.glob("*.safetensors"))
    if not shards:
        raise ValueError(f"{model_dir} has no *.safetensors weights")
    return shards
