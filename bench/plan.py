"""`rayllm plan` against reality on this machine: every role's memory and every phase's seconds.

    python -m bench.plan [RESULT.json ...] [--json OUT]

Takes the JSON files that ``bench.ppo`` wrote, plans the same configs for a cluster that is the machine they ran on, and
puts both side by side. Models that are gone by now are skipped. Memory is what one process has for itself at its own
worst moment. Besides, how long a plan takes, with advice and the balanced split, for 8 to 1,024 GPUs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.figures import GIB, console
from bench.workload import PROMPT_TOKENS, settings
from rayllm.config.base import apply_override, merge
from rayllm.config.plan import ClusterConfig, PlanConfig, WorkloadConfig
from rayllm.lineage import write_json
from rayllm.planning.advice import nearest_fit
from rayllm.planning.balance import best_split
from rayllm.planning.plan import Plan, load_job, make_plan

ACTORS = {"policy": "PolicyActor", "critic": "CriticActor", "reference": "ReferenceActor", "reward": "SourceActor",
          "rollout": "RolloutActor"}  # fmt: skip
"""Role -> its processes' kind in the result."""


def plan_of(result: dict[str, Any]) -> Plan:
    """The plan of a run that ``bench.ppo`` measured and wrote down as ``result``."""
    tree = merge({}, settings(result["algorithm"], num_steps=1, model=Path(result["model"])))
    for override in [*result["overrides"], f"max_policy_lag={result['lag']}"]:
        apply_override(tree, {}, override)
    job = load_job(PlanConfig(settings=tree))
    machine = result["machine"]
    cluster = ClusterConfig(gpus_per_node=0, cpus_per_node=machine["cores"], memory_gib=machine["memory_gib"])
    return make_plan(job, cluster, WorkloadConfig(prompt_tokens=PROMPT_TOKENS))


def compared(result: dict[str, Any], plan: Plan) -> list[tuple[str, float, float]]:
    """(what, planned, measured): GiB of the roles that hold a model, seconds of the phases and of the step."""
    own = result["own_memory_gib"]
    memory = [
        (f"{role.spec.name}, GiB", role.memory.peak / GIB, own[ACTORS[role.spec.name]])
        for role in plan.roles
        if role.spec.shape is not None
    ]
    warm = {name: figure["median"] for name, figure in result["warm"].items()}
    seconds = [(f"{phase.name}, s", phase.seconds, warm[phase.name]) for phase in plan.phases if phase.seconds]
    return [*memory, *seconds, ("step, s", plan.step_seconds, warm["step"])]


def planning_seconds(num_gpus: int) -> float:
    """To plan an 8B model on ``num_gpus`` GPUs, find what makes it fit, and share the GPUs out."""
    share = {"num_actors": num_gpus // 4, "gpus_per_actor": 1}
    scorer = {"num_actors": num_gpus // 8, "gpus_per_actor": 1}
    tree = {
        "model": "llama-3-8b", "prompts_per_step": 3072, "policy": share, "critic": share, "reference": scorer,
        "reward": scorer, "rollout": {**share, "max_new_tokens": 1024},
    }  # fmt: skip
    began = time.perf_counter()
    job = load_job(PlanConfig(settings=tree))
    plan = make_plan(job, ClusterConfig(nodes=num_gpus // 8, gpus_per_node=8), WorkloadConfig())
    advice = nearest_fit(plan)
    assert not plan.fits and advice is not None
    best_split(advice.plan)
    return time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="*")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    planning_seconds(8)  # what is imported late
    speed = {str(num_gpus): planning_seconds(num_gpus) for num_gpus in (8, 64, 256, 1024)}
    for num_gpus, seconds in speed.items():
        console().print(f"planned {num_gpus} GPUs in {seconds:.2f} s", highlight=False)
    kept = []
    for path in given.results:
        result = json.loads(path.read_text())
        if result.get("bench") != "ppo" or not Path(result["model"]).is_dir():
            continue
        rows = compared(result, plan_of(result))
        table = Table(title=f"{result['algorithm']}, {result['parameters']:,} parameters", title_justify="left")
        for column in ("", "planned", "measured", "planned / measured"):
            table.add_column(column, justify="right" if column else "left")
        for what, planned, measured in rows:
            table.add_row(what, f"{planned:.3g}", f"{measured:.3g}", f"{planned / measured:.2f}")
        console().print(table)
        kept.append({"result": str(path), "rows": rows})
    if given.json:
        write_json(given.json, {"compared": kept, "planning_seconds": speed})


if __name__ == "__main__":
    main()
