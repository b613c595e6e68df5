"""The nearest changes with which a run fits.

Every advice was planned again with its changes made before it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rayllm.config.plan import ClusterConfig
from rayllm.config.ppo import PPOConfig
from rayllm.planning.balance import splits
from rayllm.planning.changes import Changes, is_valid, with_changes
from rayllm.planning.hardware import GIB, GPUS
from rayllm.planning.memory import Memory
from rayllm.planning.moves import cheapest
from rayllm.planning.plan import Plan, PlannedRole, machine_of, place, room
from rayllm.planning.roles import RoleSpec
from rayllm.planning.sharing import held_by_others

ROUNDS = 24
"""Problems that are solved one after the other before the search gives up."""


@dataclass(frozen=True, slots=True)
class Advice:
    """What to change, and the plan with it."""

    changes: Changes
    plan: Plan


def nearest_fit(plan: Plan) -> Advice | None:
    """The cheapest changes found with which everything fits; None where nothing helps (`blocked` says what).

    Settings first, then more or larger nodes, then larger GPUs: the least that will do.
    """
    if all(_can_fit(plan, role) for role in plan.roles):
        found = _settle(plan, {})
        if found is not None:
            return found
    for changes in _larger_gpus(plan):
        larger = with_changes(plan, changes)
        if all(_can_fit(larger, role) for role in larger.roles):
            return _settle(plan, changes)
    return None


def blocked(plan: Plan) -> list[str]:
    """The roles that fit on no GPU that is known, whatever is set: why `nearest_fit` finds nothing."""
    largest = [*_larger_gpus(plan)][-1:]
    on_largest = with_changes(plan, largest[0]) if largest else plan
    lines = []
    for role in on_largest.roles:
        if not _can_fit(on_largest, role):
            hint = "every process holds the whole model in float32" if role.spec.kind == "frozen" else "at any setting"
            if role.spec.name == "reference":
                hint += "; with policy.learner.lora.rank the policy is its own reference"
            lines.append(f"{role.spec.name} fits on no GPU up to {on_largest.cluster.gpu}: {hint}")
    return lines


def _settle(plan: Plan, changes: Changes) -> Advice | None:
    """Solve one problem after the other."""
    for _ in range(ROUNDS):
        current = with_changes(plan, changes)
        if current.fits:
            return Advice(changes, current)
        more = _next_change(current)
        if more is None:
            return None
        changes = changes | more
    return None


def _next_change(plan: Plan) -> Changes | None:
    """For the first thing that does not fit."""
    for role in plan.roles:
        if role.problem is not None:
            return _fit_role(plan, role)
    places = _enough_places(plan)
    return places if places is not None else _enough_host_memory(plan)


def _can_fit(plan: Plan, role: PlannedRole) -> bool:
    return role.problem is None or _fit_role(plan, role) is not None


def _fit_role(plan: Plan, role: PlannedRole) -> Changes | None:
    """The cheapest settings of one role with which its process fits its share of the GPU; those that ask for more GPUs
    than are free only where nothing else helps."""
    machine = machine_of(plan.cluster)
    free = max(0.0, plan.cluster.nodes * plan.cluster.gpus_per_node - plan.gpus)
    elsewhere: Changes | None = None
    valid: dict[int, bool] = {}  # what a config refuses is a number of processes that does not divide
    for changes, spec in cheapest(role.spec, machine, _fits_share(plan, role)):
        more = spec.num_actors * spec.gpus - role.spec.num_actors * role.spec.gpus
        if more > free and elsewhere is not None:
            continue
        if spec.num_actors not in valid:
            valid[spec.num_actors] = is_valid(plan, changes)
        if not valid[spec.num_actors]:
            continue
        if more <= free:
            return changes
        elsewhere = changes
    return elsewhere


def _fits_share(plan: Plan, role: PlannedRole) -> Callable[[RoleSpec, Memory], bool]:
    machine = machine_of(plan.cluster)
    others = held_by_others(role.spec, [(other.spec, other.memory) for other in plan.roles])

    def fits(spec: RoleSpec, memory: Memory) -> bool:
        if memory.cache_needed > memory.cache_size or (spec.kind == "engine" and not memory.concurrency):
            return False
        has = room(spec, others, machine)
        return has is None or memory.peak <= has

    return fits


def _larger_gpus(plan: Plan) -> Iterator[Changes]:
    """Kinds with more memory than the cluster's, from the least of it."""
    gpu = machine_of(plan.cluster).gpu
    given: Changes = {} if plan.cluster.gpu_memory_gib is None else {"cluster.gpu_memory_gib": None}
    for name, other in sorted(GPUS.items(), key=lambda item: item[1].memory):
        if gpu is not None and other.memory > gpu.memory:
            yield {"cluster.gpu": name, **given}


def _enough_places(plan: Plan) -> Changes | None:
    """Fewer processes where their memory allows, or as many nodes as all of them ask for."""
    cluster = plan.cluster
    if not place(plan.roles, cluster)[1]:
        return None
    fewer = _fewer_processes(plan)
    if fewer is not None:
        return fewer
    largest = max(role.spec.gpus for role in plan.roles)
    if largest > cluster.gpus_per_node:
        return {"cluster.gpus_per_node": math.ceil(largest)}
    largest = max(role.spec.cpus for role in plan.roles)
    if largest > cluster.cpus_per_node:
        return {"cluster.cpus_per_node": math.ceil(largest)}
    most = sum(role.spec.num_actors for role in plan.roles)
    return next(
        {"cluster.nodes": nodes}
        for nodes in range(cluster.nodes + 1, cluster.nodes + most + 1)
        if not place(plan.roles, cluster.model_copy(update={"nodes": nodes}))[1]
    )


def _fewer_processes(plan: Plan) -> Changes | None:
    """The same job in fewer processes on the cluster that there is, where their memory allows."""
    if not isinstance(plan.job, PPOConfig):
        workers = plan.job.workers.num_workers
        tried: list[Changes] = [{"workers.num_workers": n} for n in range(workers - 1, 0, -1)]
    else:
        tried = [split.changes for split in splits(plan)]
    for changes in tried:
        if is_valid(plan, changes) and with_changes(plan, changes).fits:
            return changes
    return None


def _enough_host_memory(plan: Plan) -> Changes | None:
    """Smaller processes where they compute on CPU, or nodes with more memory."""
    if plan.cluster.gpus_per_node == 0:
        roles = sorted(plan.roles, key=lambda role: -role.memory.peak)
        over = plan.host_bytes - plan.cluster.memory_gib * GIB
        enough = [role.memory.peak - over / _on_a_node(role, plan.cluster) for role in roles]
        # One role that makes up for all of it, or else the largest that can be made a good deal smaller.
        halves = [role.memory.peak / 2 for role in roles]
        for role, limit in [*zip(roles, enough, strict=True), *zip(roles, halves, strict=True)]:
            found = _below(plan, role, limit)
            if found is not None:
                return found
    return {"cluster.memory_gib": math.ceil(plan.host_bytes / GIB / 16) * 16}


def _below(plan: Plan, role: PlannedRole, limit: float) -> Changes | None:
    """The cheapest settings with which as many processes of the role take no more than ``limit`` bytes each."""

    def fits(spec: RoleSpec, memory: Memory) -> bool:
        return memory.peak <= limit and spec.num_actors == role.spec.num_actors

    found = (changes for changes, _ in cheapest(role.spec, machine_of(plan.cluster), fits))
    return next((changes for changes in found if is_valid(plan, changes)), None)


def _on_a_node(role: PlannedRole, cluster: ClusterConfig) -> int:
    return max(1, min(role.spec.num_actors, int(cluster.cpus_per_node // role.spec.cpus)))
