"""What the roles need against what the cluster has, before anything starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from actors.group import Role
from rayllm.errors import InputError

UNITS = {"CPU": "cpus", "GPU": "gpus"}
"""Resource of Ray -> what a role calls its share."""

LOOK_S = 2.0


def check_capacity(roles: Sequence[Role], wait_s: float, say: Callable[[str], Any]) -> None:
    """Return when all roles can be placed. Ray itself would wait for ever without a word.

    A cluster that is too small is an error at once, or after ``wait_s`` seconds in which an autoscaler may bring nodes;
    for resources that other jobs hold it waits as long as they do. Either way it says what it waits for.

    Raises:
        InputError: need against have.
    """
    deadline = time.monotonic() + wait_s
    lacks = _lacks(roles)
    if lacks and not wait_s:
        raise InputError(f"placement: {lacks}; ask for less, or set placement.wait_s where nodes may come")
    wanted = [{name: getattr(role, unit) for name, unit in UNITS.items() if getattr(role, unit)} for role in roles]
    bundles = [bundle for role, bundle in zip(roles, wanted, strict=True) if bundle for _ in range(role.num_actors)]
    told = None
    demand = placement_group(bundles)  # an autoscaler sees it; it is gone when this process is
    try:
        while not demand.wait(LOOK_S):
            lacks = _lacks(roles)
            if lacks and time.monotonic() > deadline:
                raise InputError(f"placement: {lacks}; no nodes came within placement.wait_s={wait_s:g}")
            waits_for = f"nodes: {lacks}" if lacks else f"other jobs to end: {_busy(roles)}"
            if waits_for != told:
                say(f"waiting for {waits_for}")
                told = waits_for
    finally:
        remove_placement_group(demand)


def _lacks(roles: Sequence[Role]) -> str | None:
    """What the cluster can never place as it is; None if it is large enough."""
    has = ray.cluster_resources()
    for resource, unit in UNITS.items():
        if _total(roles, unit) > has.get(resource, 0) + 1e-6:
            listed = " + ".join(f"{role.name} {role.num_actors} x {getattr(role, unit):g}" for role in roles)
            return (
                f"the roles need {_total(roles, unit):g} {resource} ({listed}), the cluster has "
                f"{has.get(resource, 0):g}"
            )
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for role in roles:
        if not any(role.cpus <= node.get("CPU", 0) and role.gpus <= node.get("GPU", 0) for node in nodes):
            return f"one actor of {role.name} needs {role.cpus:g} CPU and {role.gpus:g} GPU; no node has both"
    return None


def _busy(roles: Sequence[Role]) -> str:
    has, free = ray.cluster_resources(), ray.available_resources()
    return ", ".join(
        f"the roles need {_total(roles, unit):g} {resource}, {free.get(resource, 0):g} of {has[resource]:g} are free"
        for resource, unit in UNITS.items()
        if _total(roles, unit)
    )


def _total(roles: Sequence[Role], unit: str) -> float:
    return sum(role.num_actors * getattr(role, unit) for role in roles)


def describe(roles: Sequence[Role]) -> list[tuple[str, str]]:
    """(role, what it runs on) rows for people."""
    rows = []
    for role in roles:
        device = f"{role.gpus:g} GPU, {role.cpus:g} CPU" if role.gpus else f"{role.cpus:g} CPU"
        rows.append((role.name, f"{role.num_actors} x {device}"))
    return rows
