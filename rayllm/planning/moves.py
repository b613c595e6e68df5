"""What can be changed about one role, from the least of a change to the most."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from rayllm.planning.changes import Changes
from rayllm.planning.memory import Memory
from rayllm.planning.roles import RoleSpec
from rayllm.planning.roofline import Machine

Move = tuple[float, Changes, RoleSpec]
"""How much of a change it is, the settings, and the role with them."""


def _smaller(rows: int) -> list[int]:
    """rows, and the powers of two below it."""
    return [rows, *(1 << k for k in range(rows.bit_length() - 1, -1, -1) if 1 << k < rows)]


def _learner_moves(spec: RoleSpec, machine: Machine) -> Iterator[Move]:
    """Smaller micro-batches cost nothing but time, checkpointing a third more of it; sharding costs traffic, more ranks
    cost GPUs, bfloat16 changes the numbers, offloading is slow."""
    assert spec.learner is not None
    learner, section = spec.learner, spec.section
    prefix = "" if section == "workers" else f"{section}."
    size_key = "micro_batch_size" if section == "workers" else f"{section}.micro_batch_size"
    count_key = "workers.num_workers" if section == "workers" else f"{section}.num_actors"
    stages = sorted({learner.zero_stage, max(learner.zero_stage, 2), 3})
    dtypes = sorted({learner.dtype, "bfloat16"}, key=lambda dtype: dtype != learner.dtype)
    checkpointing = sorted({learner.gradient_checkpointing, True})
    offloads = [(learner.offload_optimizer, learner.offload_parameters), (True, False), (True, True)]
    counts = [spec.num_actors * factor for factor in (1, 2, 4, 8)]
    for stage, dtype, again, (optimizer, parameters), count in itertools.product(
        stages, dtypes, checkpointing, dict.fromkeys(offloads), counts
    ):
        if (parameters and stage != 3) or (optimizer and (stage == 0 or not spec.gpus)):
            continue
        if count > spec.num_actors and stage == 0:
            continue
        wanted = {
            "zero_stage": stage, "dtype": dtype, "gradient_checkpointing": again,
            "offload_optimizer": optimizer, "offload_parameters": parameters,
        }  # fmt: skip
        settings = {f"{prefix}learner.{name}": v for name, v in wanted.items() if v != getattr(learner, name)}
        cost = 2.0 * (again != learner.gradient_checkpointing) + (stage - learner.zero_stage)
        cost += 3.0 * (dtype != learner.dtype) + 4.0 * math.log2(count / spec.num_actors)
        cost += 5.0 * (optimizer != learner.offload_optimizer) + 5.0 * (parameters != learner.offload_parameters)
        changed = replace(spec, learner=learner.model_copy(update=wanted))
        for rows in _smaller(spec.rows):
            more = {**settings, **({size_key: rows} if rows < spec.rows else {})}
            if rows < spec.rows and spec.by_tokens:
                more[f"{section}.micro_batch_tokens"] = None
            if count > spec.num_actors:
                more[count_key] = count
            step = 0.1 * math.log2(spec.rows / rows) + (0.5 if rows < spec.rows else 0.0)
            yield cost + step, more, replace(changed, rows=rows, num_actors=count)


def _frozen_moves(spec: RoleSpec, machine: Machine) -> Iterator[Move]:
    for rows in _smaller(spec.rows):
        for gpus in dict.fromkeys([spec.gpus, 1.0 if 0 < spec.gpus < 1 else spec.gpus]):
            changes: Changes = {f"{spec.section}.micro_batch_size": rows} if rows < spec.rows else {}
            if gpus != spec.gpus:
                changes[f"{spec.section}.gpus_per_actor"] = gpus
            yield math.log2(spec.rows / rows) + 3 * (gpus != spec.gpus), changes, replace(spec, rows=rows, gpus=gpus)


def _engine_moves(spec: RoleSpec, machine: Machine) -> Iterator[Move]:
    """A shorter longest sequence, fewer at a time, a larger cache, more GPUs for each engine."""
    assert spec.shape is not None
    lengths = sorted(
        {int(spec.engine.get("max_model_len", spec.shape.max_positions)), _rounded(spec.tokens)}, reverse=True
    )
    splits = [spec.split, *(n for n in (2, 4, 8, 16) if n > spec.split and spec.shape.heads % n == 0)]
    for length, split in itertools.product(lengths, splits):
        if split > spec.split and (not spec.gpus or split > machine.gpus_per_node):
            continue
        engine = dict(spec.engine)
        if length < spec.shape.max_positions:
            engine["max_model_len"] = length
        gpus = spec.gpus
        if split > 1 and spec.gpus:
            engine["tensor_parallel_size"], gpus = split, float(split)
        for share in (None, spec.gpus if 0 < spec.gpus < 1 else None):
            tried = dict(engine)
            if share is not None and gpus < 1:
                tried["gpu_memory_utilization"] = round(0.95 * share, 3)
            if not spec.gpus and spec.shape is not None:
                needed = replace(spec, engine=engine).memory(machine)
                want = max(needed.cache_needed, needed.cache_needed / length * spec.tokens * min(8, spec.sequences))
                if want > needed.cache_size:
                    tried["kv_cache_memory_bytes"] = math.ceil(want / (64 << 20)) * (64 << 20)
            changes: Changes = {f"rollout.engine.{k}": v for k, v in tried.items() if spec.engine.get(k) != v}
            if gpus != spec.gpus:
                changes["rollout.gpus_per_actor"] = gpus
            cost = 0.2 * len(changes) + (length != lengths[0]) + 3 * math.log2(split / spec.split)
            yield cost, changes, replace(spec, engine=tried, gpus=gpus)


def _rounded(tokens: int) -> int:
    """Up to a multiple of 256."""
    return -(-tokens // 256) * 256


def cheapest(
    spec: RoleSpec, machine: Machine, fits: Callable[[RoleSpec, Memory], bool]
) -> Iterator[tuple[Changes, RoleSpec]]:
    """Changes of the role with which ``fits`` holds, and the role with them, the least of a change first."""
    moves = {"learner": _learner_moves, "frozen": _frozen_moves, "engine": _engine_moves}.get(spec.kind)
    if moves is None:
        return
    for _, changes, changed in sorted(moves(spec, machine), key=lambda move: move[0]):
        if changes and fits(changed, changed.memory(machine)):
            yield changes, changed
