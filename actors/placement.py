"""What the roles need against what the cluster has, before anything starts."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from actors.group import Role
from rayllm.errors import InputError


def check_capacity(roles: Sequence[Role]) -> None:
    """Raise InputError at once when the cluster is too small: Ray itself would wait for ever without a word."""
    has = ray.cluster_resources()
    for resource, unit in (("CPU", "cpus"), ("GPU", "gpus")):
        needs = [(role, role.num_actors * getattr(role, unit)) for role in roles]
        total = sum(amount for _, amount in needs)
        if total > has.get(resource, 0) + 1e-6:
            listed = " + ".join(f"{role.name} {role.num_actors} x {getattr(role, unit):g}" for role, _ in needs)
            raise InputError(
                f"placement: the roles need {total:g} {resource} ({listed}), the cluster has "
                f"{has.get(resource, 0):g}; lower {unit}_per_actor or num_actors, or add nodes"
            )


def describe(roles: Sequence[Role]) -> list[tuple[str, str]]:
    """(role, what it runs on) rows for people."""
    rows = []
    for role in roles:
        device = f"{role.gpus:g} GPU, {role.cpus:g} CPU" if role.gpus else f"{role.cpus:g} CPU"
        rows.append((role.name, f"{role.num_actors} x {device}"))
    return rows
