"""A plan with some settings changed, planned again."""

from __future__ import annotations

from typing import Any

from rayllm.config.plan import ClusterConfig
from rayllm.errors import InputError
from rayllm.planning.plan import Plan, make_plan

Changes = dict[str, Any]
"""Dotted key -> new value: of the job's config, or below ``cluster.`` of the machines."""


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


def is_valid(plan: Plan, changes: Changes) -> bool:
    """Whether the job's config takes them."""
    try:
        with_changes(plan, changes)
    except (ValueError, InputError):
        return False
    return True
