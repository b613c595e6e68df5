"""The nearest changes with which a run fits, and the split of its GPUs that balances its phases.

Every advice was planned again with its changes made before it is given.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rayllm.config.common import LearnerConfig
from rayllm.config.plan import ClusterConfig
from rayllm.config.ppo import PPOConfig
from rayllm.config.rl import LearnerActorsConfig
from rayllm.errors import InputError
from rayllm.planning.hardware import GIB, GPUS
from rayllm.planning.memory import GPU_USABLE, Memory
from rayllm.planning.plan import Plan, PlannedRole, machine_of, make_plan
from rayllm.planning.roles import RoleSpec
from rayllm.planning.roofline import Machine

ROUNDS = 24
"""Problems that are solved one after the other before the search gives up."""

Changes = dict[str, Any]
"""Dotted key -> new value: of the job's config, or below ``cluster.`` of the machines."""


@dataclass(frozen=True, slots=True)
class Advice:
    """What to change, and the plan with it."""

    changes: Changes
    plan: Plan


@dataclass(frozen=True, slots=True)
class Split:
    """GPUs of the learners and of the engines, and a step's seconds with them."""

    changes: Changes
    learner_gpus: int
    rollout_gpus: int
    plan: Plan


def nearest_fit(plan: Plan) -> Advice | None:
    """The cheapest changes found with which everything fits; None where nothing helps."""
    changes: Changes = {}
    current = plan
    for _ in range(ROUNDS):
        if current.fits:
            return Advice(changes, current)
        more = _next_change(current)
        if more is None:
            return None
        changes |= more
        current = with_changes(plan, changes)
    return None


def with_changes(plan: Plan, changes: Changes) -> Plan:
    """The same run planned again. Raises InputError or ValueError where the job's config refuses a value."""
    job, cluster = plan.job, plan.cluster
    tree = job.model_dump()
    machines = cluster.model_dump()
    for key, value in changes.items():
        section, _, rest = key.partition(".")
        if section == "cluster":
            machines[rest] = value
        else:
            _set(tree, key, value)
    return make_plan(type(job).model_validate(tree), ClusterConfig.model_validate(machines), plan.workload)


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree[parent]
    tree[leaf] = value


def _next_change(plan: Plan) -> Changes | None:
    """For the first thing that does not fit."""
    machine = machine_of(plan.cluster)
    for role in plan.roles:
        if role.problem is not None:
            found = _fit_role(plan, role, machine)
            return found if found is not None else _larger_gpu(plan)
    found = _enough_places(plan)
    if found is not None:
        return found
    return _enough_host_memory(plan, machine)


def _fit_role(plan: Plan, role: PlannedRole, machine: Machine) -> Changes | None:
    """The cheapest settings of one role with which its process fits its share of the GPU."""
    for changes in _cheapest(role, machine, _fits_share(role, machine)):
        if _is_valid(plan, changes):
            return changes
    return None


def _is_valid(plan: Plan, changes: Changes) -> bool:
    """Whether the job's config takes them."""
    try:
        with_changes(plan, changes)
    except (ValueError, InputError):
        return False
    return True


def _fits_share(role: PlannedRole, machine: Machine) -> Any:
    def fits(spec: RoleSpec, memory: Memory) -> bool:
        if memory.cache_needed > memory.cache_size or (spec.kind == "engine" and not memory.concurrency):
            return False
        if not spec.gpus or machine.gpu is None:
            return True
        usable = 1.0 if spec.kind == "engine" else GPU_USABLE
        return memory.peak <= min(1.0, spec.gpus / spec.split) * machine.gpu.memory * usable

    return fits


def _cheapest(role: PlannedRole, machine: Machine, fits: Any) -> Iterator[Changes]:
    """Changes of the role with which ``fits`` holds, the least of a change first."""
    moves = {"learner": _learner_moves, "frozen": _frozen_moves, "engine": _engine_moves}.get(role.spec.kind)
    if moves is None:
        return
    for _, changes, spec in sorted(moves(role.spec, machine), key=lambda move: move[0]):
        if changes and fits(spec, spec.memory(machine)):
            yield changes


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
        changed = replace(spec, learner=LearnerConfig.model_validate({**learner.model_dump(), **wanted}))
        for rows in _smaller(spec.rows):
            more = {**settings, **({size_key: rows} if rows < spec.rows else {})}
            if rows < spec.rows and section != "workers":
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


def _larger_gpu(plan: Plan) -> Changes | None:
    """The GPU with the least more memory on which some settings make every role fit."""
    machine = machine_of(plan.cluster)
    if machine.gpu is None:
        return None
    for name, gpu in sorted(GPUS.items(), key=lambda item: item[1].memory):
        if gpu.memory <= machine.gpu.memory:
            continue
        changes: Changes = {"cluster.gpu": name}
        if plan.cluster.gpu_memory_gib is not None:
            changes["cluster.gpu_memory_gib"] = None
        larger = with_changes(plan, changes)
        where = machine_of(larger.cluster)
        if all(role.problem is None or _fit_role(larger, role, where) is not None for role in larger.roles):
            return changes
    return None


def _enough_places(plan: Plan) -> Changes | None:
    """As many nodes as all processes ask for, or GPUs of a node for the largest process."""
    cluster = plan.cluster
    largest = max(role.spec.gpus for role in plan.roles)
    if largest > cluster.gpus_per_node:
        return {"cluster.gpus_per_node": math.ceil(largest)}
    nodes = cluster.nodes
    for unit, each in (("gpus", cluster.gpus_per_node), ("cpus", cluster.cpus_per_node)):
        need = sum(role.spec.num_actors * getattr(role.spec, unit) for role in plan.roles)
        if need > cluster.nodes * each + 1e-6:
            nodes = max(nodes, math.ceil(need / each - 1e-9))
    if nodes == cluster.nodes:
        return None
    fewer = _fewer_processes(plan)
    return fewer if fewer is not None else {"cluster.nodes": nodes}


def _fewer_processes(plan: Plan) -> Changes | None:
    """The same job in fewer processes on the cluster that there is, where their memory allows."""
    if not isinstance(plan.job, PPOConfig):
        workers = plan.job.workers.num_workers
        tried: list[Changes] = [{"workers.num_workers": n} for n in range(workers - 1, 0, -1)]
    else:
        tried = [split.changes for split in _splits(plan)]
    for changes in tried:
        if _is_valid(plan, changes) and with_changes(plan, changes).fits:
            return changes
    return None


def _enough_host_memory(plan: Plan, machine: Machine) -> Changes | None:
    """Smaller processes where they compute on CPU, or nodes with more memory."""
    on_cpu = [role for role in plan.roles if role.available is None]
    if plan.cluster.gpus_per_node == 0:
        for role in sorted(on_cpu, key=lambda role: -role.memory.peak):
            over = plan.host_bytes - plan.cluster.memory_gib * GIB
            wanted = role.memory.peak - over / min(role.spec.num_actors, _on_a_node(role, plan.cluster))
            for changes in _cheapest(role, machine, lambda spec, memory: memory.peak <= wanted):
                if not any(key.endswith(("num_actors", "num_workers")) for key in changes) and _is_valid(plan, changes):
                    return changes
    return {"cluster.memory_gib": float(math.ceil(plan.host_bytes / GIB / 16) * 16)}


def _on_a_node(role: PlannedRole, cluster: ClusterConfig) -> int:
    return max(1, int(cluster.cpus_per_node // role.spec.cpus))


def best_split(plan: Plan) -> Split | None:
    """The split of the GPUs between learners and engines with the fewest seconds a step, of those that fit; None for a
    job without engines on GPUs."""
    fitting = [split for split in _splits(plan) if split.plan.fits]
    return min(fitting, key=lambda split: split.plan.step_seconds, default=None)


def _splits(plan: Plan) -> list[Split]:
    """Numbers of policy and critic ranks and of engines that fill the cluster's GPUs, fastest first."""
    job = plan.job
    if not isinstance(job, PPOConfig) or not (job.policy.gpus_per_actor and job.rollout.gpus_per_actor):
        return []
    learners = [name for name in ("policy", "critic") if name in job.learner_ranks]
    sections: dict[str, LearnerActorsConfig] = {name: getattr(job, name) for name in learners}
    others = sum(
        role.spec.num_actors * role.spec.gpus for role in plan.roles if role.spec.name not in (*learners, "rollout")
    )
    room = plan.cluster.nodes * plan.cluster.gpus_per_node - others
    each = sum(section.gpus_per_actor for section in sections.values())
    found = []
    for ranks in _counts(int(room // each), job.prompts_per_step):
        left = room - ranks * each
        engines = _engines(int(left // job.rollout.gpus_per_actor), ranks, job.prompts_per_step)
        if not engines:
            continue
        changes: Changes = {f"{name}.num_actors": ranks for name in learners} | {"rollout.num_actors": engines}
        if _is_valid(plan, changes):
            split = with_changes(plan, changes)
            gpus = math.ceil(engines * job.rollout.gpus_per_actor)
            found.append(Split(changes, math.ceil(ranks * each), gpus, split))
    return sorted(found, key=lambda split: split.plan.step_seconds)


def _counts(most: int, prompts: int) -> list[int]:
    """Numbers of ranks that divide a step's prompts."""
    return [n for n in range(1, min(most, prompts) + 1) if prompts % n == 0]


def _engines(most: int, ranks: int, prompts: int) -> int:
    """The most engines with which the shards of ``ranks`` learners divide a step's prompts; 0 for none."""
    for engines in range(min(most, prompts), 0, -1):
        shards = ranks * -(-max(2, engines) // ranks)
        if prompts % shards == 0:
            return engines
    return 0
