"""Roles on the same GPUs: what each leaves to the others, and how many GPUs all of them take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rayllm.planning.memory import BYTES, Memory, forward_only
from rayllm.planning.roles import RoleSpec


@dataclass(frozen=True, slots=True)
class Bundle:
    """What is placed on one node: an actor, or one of each role of a share with their GPU."""

    names: tuple[str, ...]
    cpus: float
    gpus: float
    host: float
    """Bytes of host memory; of a process without a GPU all that it takes."""


def bundles_of(found: Sequence[tuple[RoleSpec, Memory]]) -> Counter[Bundle]:
    """Of all roles, how many of each kind. Of a share, rank i of each role is in bundle i."""
    bundles: Counter[Bundle] = Counter()
    for share in dict.fromkeys(spec.share or (spec.name,) for spec, _ in found):
        members = [(spec, memory) for spec, memory in found if spec.name in share]
        on_gpu = [spec for spec, _ in members if spec.gpus]
        count = max(spec.num_actors for spec in on_gpu or [spec for spec, _ in members])
        ends = sorted({spec.num_actors % count for spec, _ in members} | {count})  # between two of them all are alike
        for index, end in zip([0, *ends], ends, strict=False):
            ranks = [(spec, memory, len(range(index, spec.num_actors, count))) for spec, memory in members]
            here = [(spec, memory, n) for spec, memory, n in ranks if n]
            gpus = [spec.gpus for spec, _, _ in here if spec.gpus]
            bundle = Bundle(
                names=tuple(spec.name for spec, _, _ in here),
                cpus=sum(n * spec.cpus for spec, _, n in here),
                gpus=1.0 if len(on_gpu) > 1 and gpus else sum(gpus),
                host=sum(n * (memory.host if spec.gpus else memory.peak) for spec, memory, n in here),
            )
            bundles[bundle] += end - index
    return +bundles


def held_by_others(spec: RoleSpec, found: Sequence[tuple[RoleSpec, Memory]]) -> float | None:
    """Bytes of a role's GPU that those which share it hold when it takes most itself; None where none does.

    In turns: while a learner updates, the engine sleeps and the other models stay without computing. While an engine
    samples, learners keep their weights and score, and so do the frozen models. Not in turns: all at their worst.
    """
    others = [(other, memory) for other, memory in found if other.name in spec.share and other.gpus and other != spec]
    if not spec.gpus or not others:
        return None
    if not spec.takes_turns:
        return sum(memory.peak for _, memory in others)
    if spec.kind == "learner":
        return sum(memory.runtime if other.kind == "engine" else memory.resident for other, memory in others)
    return sum(_scoring(other, memory) if other.kind == "learner" else memory.peak for other, memory in others)


def _scoring(spec: RoleSpec, memory: Memory) -> float:
    """A learner in a pass without gradients, its optimizer moved out."""
    assert spec.shape is not None and spec.learner is not None
    element = BYTES[spec.learner.dtype]
    return memory.resident + forward_only(spec.shape, rows=spec.rows, tokens=spec.tokens, element=element)
