"""`rayllm plan`: what a run needs on a cluster, what fits and what a step takes, before anything is started."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from jobs.ppo_explain import lines
from rayllm.config.base import Loaded
from rayllm.config.plan import ClusterConfig, PlanConfig
from rayllm.config.ppo import PPOConfig
from rayllm.errors import InputError
from rayllm.planning.advice import nearest_fit
from rayllm.planning.balance import best_split
from rayllm.planning.hardware import GIB, GPUS, RAY_NAMES
from rayllm.planning.plan import load_job, make_plan
from rayllm.planning.view import as_json, print_plan

EXIT_DOES_NOT_FIT = 1


def plan(loaded: Loaded[PlanConfig], console: Console, *, address: str | None = None, to_json: bool = False) -> int:
    """Print the plan; returns the exit status: 0 if everything fits, else 1.

    Args:
        loaded: of `rayllm plan`.
        console: where to print.
        address: dashboard of a live cluster whose nodes are taken.
        to_json: print one JSON object and nothing else.

    Raises:
        InputError: a config, model or GPU that is not known, or no cluster at the address.
    """
    config = loaded.config
    cluster = config.cluster if address is None else live_cluster(address, loaded)
    job = load_job(config)
    found = make_plan(job, cluster, config.workload)
    advice = nearest_fit(found) if config.advice and not found.fits else None
    split = best_split(found if advice is None else advice.plan) if config.advice else None
    if to_json:
        console.out(json.dumps(as_json(config.job, found, advice, split), indent=2), highlight=False)
    else:
        batches = lines(job) if isinstance(job, PPOConfig) else []
        print_plan(console, config.job, found, advice, split, batches)
    return 0 if found.fits else EXIT_DOES_NOT_FIT


def live_cluster(address: str, loaded: Loaded[PlanConfig]) -> ClusterConfig:
    """The nodes of a running cluster, under what the config sets itself.

    Of nodes that differ, those with GPUs count, and of each quantity the least.

    Raises:
        InputError: no cluster answers there.
    """
    nodes = [node for node in _nodes(address) if node]
    with_gpus = [node for node in nodes if node.get("GPU")]
    chosen = with_gpus or nodes
    if not chosen:
        raise InputError(f"--address: the cluster at {address} has no node that is alive")
    memory = [node.get("memory", 0.0) + node.get("object_store_memory", 0.0) for node in chosen]
    tree: dict[str, Any] = {
        **loaded.config.cluster.model_dump(),
        "nodes": len(chosen),
        "gpus_per_node": int(min(node.get("GPU", 0) for node in chosen)),
        "cpus_per_node": min(node.get("CPU", 1.0) for node in chosen) or 1.0,
        "memory_gib": min(memory) / GIB,
    }
    kinds = {name.split(":", 1)[1] for node in with_gpus for name in node if name.startswith("accelerator_type:")}
    known = [RAY_NAMES[kind] for kind in kinds if kind in RAY_NAMES]
    if known:
        tree["gpu"] = min(known, key=lambda name: GPUS[name].memory)
    usual = ClusterConfig()
    set_here = {
        name: value
        for name, value in loaded.config.cluster.model_dump().items()
        if value != getattr(usual, name) or f"cluster.{name}" in loaded.origins
    }
    return ClusterConfig.model_validate(tree | set_here)


def _nodes(address: str) -> list[dict[str, float]]:
    """Resources of every node that is alive."""
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        found = list_nodes(address=address, filters=[("state", "=", "ALIVE")], limit=10_000)
    except (ConnectionError, RuntimeError, RayStateApiException) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--address: no cluster answers at {address}: {reason}") from None
    return [dict(node.resources_total or {}) for node in found]


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("plan")
