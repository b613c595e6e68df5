"""GPUs by name: what their makers' data sheets say. Nothing here was measured by us."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from rayllm.errors import InputError

GIB = 1 << 30
TERA, GIGA = 10**12, 10**9


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of GPU."""

    memory: float
    """Bytes that a process can see."""

    bfloat16_flops: float
    """Dense tensor-core operations a second."""

    float32_flops: float
    """Operations a second in plain float32, which torch uses unless told otherwise."""

    bandwidth: float
    """Bytes a second of its memory."""

    link: float
    """Bytes a second, each way, to another GPU of the node."""


def _gpu(memory_gib: float, bfloat16: float, float32: float, bandwidth_gb: float, link_gb: float) -> Gpu:
    return Gpu(memory_gib * GIB, bfloat16 * TERA, float32 * TERA, bandwidth_gb * GIGA, link_gb * GIGA)


# GiB, TFLOP/s in bfloat16, in float32, GB/s of memory, GB/s of NVLink (or PCIe 4 without it)
GPUS = {
    "l4": _gpu(22.0, 121, 30.3, 300, 32),
    "a10g": _gpu(22.0, 70, 31.2, 600, 32),
    "rtx-4090": _gpu(23.5, 165, 82.6, 1008, 32),
    "a100-40gb": _gpu(39.4, 312, 19.5, 1555, 300),
    "l40s": _gpu(44.4, 362, 91.6, 864, 32),
    "a100-80gb": _gpu(79.1, 312, 19.5, 2039, 300),
    "h100": _gpu(79.1, 989, 67, 3350, 450),
    "h200": _gpu(139.8, 989, 67, 4800, 450),
    "b200": _gpu(178.0, 2250, 75, 8000, 900),
}
"""Name -> data sheet, from the least memory to the most."""

RAY_NAMES = {
    "L4": "l4", "A10G": "a10g", "A100": "a100-40gb", "A100-40G": "a100-40gb", "A100-80G": "a100-80gb",
    "L40S": "l40s", "H100": "h100", "H200": "h200", "B200": "b200",
}  # fmt: skip
"""What Ray calls them (``accelerator_type:...`` of a node) -> ours. It does not always tell the A100s apart: the
smaller one is then assumed."""

PCIE = 25 * GIGA
"""Bytes a second between a GPU and its host, each way (PCIe 4, as usually reached)."""

HOST_COPY = 2.5 * GIGA
"""Bytes a second of one thread that copies memory: packing weights, writing and reading the object store."""

HOST_ADAM = 4e8
"""Parameters a second and host core that an offloaded AdamW steps: bound by the memory, 28 bytes each."""


def find_gpu(name: str) -> Gpu:
    """The data sheet of a GPU. Raises InputError with the nearest name."""
    key = name.lower()
    if key in GPUS:
        return GPUS[key]
    near = difflib.get_close_matches(key, GPUS, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(GPUS)}"
    raise InputError(
        f"cluster.gpu: {name!r} is not known. {hint} (of another one, name the nearest and set cluster.gpu_memory_gib)"
    )
