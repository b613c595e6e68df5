"""A plan for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rayllm.planning.advice import Advice, blocked
from rayllm.planning.balance import Split
from rayllm.planning.changes import Changes
from rayllm.planning.hardware import GIB
from rayllm.planning.memory import Memory
from rayllm.planning.plan import Plan, PlannedRole, machine_of

BAR = 8
"""Columns of a bar."""

PARTS = ("weights", "gradients", "optimizer", "activations", "buffers", "kv_cache", "runtime")
"""Columns of memory, in order."""

MEASURED = (
    "Counted: what DeepSpeed and autograd hold. Measured, on CPU: what a process takes before it holds a model, and "
    "what a core computes. Assumed: the same of GPUs, and all efficiencies; no GPU has been run."
)
"""How far to trust it, below every plan."""


def print_plan(
    console: Console,
    name: str,
    plan: Plan,
    advice: Advice | None,
    split: Split | None,
    batches: Sequence[tuple[str, str, str]],
) -> None:
    """The plan as tables: memory by role, seconds by phase, and what to change."""
    console.rule(f"[bold]plan[/bold] {name} on {escape(_machines(plan))}", align="left", style="dim")
    _print_batches(console, batches)
    console.print(_memory_table(plan))
    host, has = plan.host_bytes / GIB, plan.cluster.memory_gib
    fits = _mark(host <= has)
    console.print(f"{fits} host memory of the fullest node: {_gib(plan.host_bytes)} of {has:,.0f} GiB", highlight=False)
    console.print()
    console.print(_phase_table(plan))
    _print_totals(console, plan)
    _print_advice(console, plan, advice)
    if split is not None:
        _print_split(console, plan if advice is None else advice.plan, split)
    console.print(f"\n[dim]{MEASURED}[/dim]", highlight=False)


def _machines(plan: Plan) -> str:
    cluster = plan.cluster
    nodes = f"{cluster.nodes} node{'s' * (cluster.nodes > 1)}"
    gpu = machine_of(cluster).gpu
    if gpu is None:
        return f"{nodes} of {cluster.cpus_per_node:g} CPUs and {cluster.memory_gib:g} GiB"
    return f"{nodes} of {cluster.gpus_per_node} x {cluster.gpu} ({gpu.memory / GIB:.0f} GiB)"


def _print_batches(console: Console, batches: Sequence[tuple[str, str, str]]) -> None:
    """The arithmetic of a step's batches, as `rayllm ppo --explain` prints it, as one line."""
    shown = [f"{what} [bold]{number}[/bold]" for what, number, _ in batches if ":" not in what]
    if shown:
        console.print(" · ".join(shown[:4]) + "\n", style="dim", highlight=False)


def _memory_table(plan: Plan) -> Table:
    table = Table(
        title="GiB of one process at its worst moment",
        title_justify="left", title_style="dim", box=None, padding=(0, 2, 0, 0), pad_edge=False,
    )  # fmt: skip
    table.add_column("role", style="bold", no_wrap=True)
    table.add_column("processes", no_wrap=True)
    table.add_column("model", no_wrap=True)
    for column in ("weights", "grads", "optimizer", "activations", "buffers", "KV", "runtime", "peak"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("of its room", no_wrap=True)
    table.add_column("", no_wrap=True, style="dim")
    for role in plan.roles:
        table.add_row(*_memory_row(plan, role))
    return table


def _memory_row(plan: Plan, role: PlannedRole) -> list[Any]:
    spec, memory = role.spec, role.memory
    where = "shared GPU" if spec.gpus and spec.share else f"{spec.gpus:g} GPU" if spec.gpus else f"{spec.cpus:g} CPU"
    shape = spec.shape
    name = "–" if shape is None else f"{shape.name} [dim]{_count(shape.parameters)}[/dim]"
    parts = [_gib(getattr(memory, part)) for part in PARTS]
    return [
        spec.name, f"{spec.num_actors:,} x {where}", name, *parts, f"[bold]{_gib(memory.peak)}[/bold]",
        _share(plan, role), _moment(memory),
    ]  # fmt: skip


def _moment(memory: Memory) -> str:
    if memory.concurrency is not None:
        return f"{memory.concurrency:,} at once"
    return f"at {memory.moment}"


def _share(plan: Plan, role: PlannedRole) -> Text:
    """How full its GPU, or its node's memory, gets."""
    room = role.available if role.available is not None else plan.cluster.memory_gib * GIB
    if not room:  # others fill the GPU
        return Text("━" * BAR + " none left ✗", style="red")
    used = role.memory.peak / room
    good = role.problem is None
    full = min(BAR, max(0, round(used * BAR)))
    style = "green" if good and used <= 0.9 else "yellow" if good else "red"
    text = Text("━" * full, style=style)
    text.append("━" * (BAR - full), style="bright_black")
    text.append(f" {100 * used:3.0f} % ", style=style)
    text.append("✓" if good else "✗", style=style)
    return text


def _phase_table(plan: Plan) -> Table:
    table = Table(
        title="seconds of a step", title_justify="left", title_style="dim", box=None,
        padding=(0, 2, 0, 0), pad_edge=False,
    )  # fmt: skip
    table.add_column("phase", style="bold")
    table.add_column("seconds", justify="right")
    table.add_column("")
    table.add_column("slowest role", style="dim")
    longest = plan.slowest.seconds
    for phase in plan.phases:
        full = round(BAR * phase.seconds / longest) if longest else 0
        style = "yellow" if phase is plan.slowest else "cyan"
        table.add_row(phase.name, _seconds(phase.seconds), Text("━" * full, style=style), phase.role)
    return table


def _print_totals(console: Console, plan: Plan) -> None:
    rate = plan.tokens_per_step / plan.step_seconds
    parts = [f"[bold]{_seconds(plan.step_seconds)} s[/bold] a step", f"[bold]{rate:,.0f}[/bold] tokens/s"]
    lag = getattr(plan.job, "max_policy_lag", None)
    if lag is not None:
        parts.append("sampling beside learning" if lag else "sampling and learning in turns")
    parts.append(f"slowest: {plan.slowest.name} ({plan.slowest.role})")
    if plan.cost_per_thousand_steps is not None:
        parts.append(f"[bold]{plan.cost_per_thousand_steps:,.2f}[/bold] per thousand steps")
    console.print(" · ".join(parts), highlight=False)


def _print_advice(console: Console, plan: Plan, advice: Advice | None) -> None:
    if plan.fits:
        console.print("[green]✓[/green] everything fits", highlight=False)
        return
    console.print("\n[red]✗[/red] [bold]does not fit[/bold]", highlight=False)
    for problem in plan.problems:
        console.print(f"  {escape(problem)}", highlight=False, soft_wrap=True)
    if advice is None:
        console.print("no change of these settings or machines was found that fits", highlight=False)
        for line in blocked(plan):
            console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)
        return
    console.print("[bold]the nearest change found that fits[/bold]", highlight=False)
    for line in _written(advice.changes):
        console.print(f"  [cyan]{escape(line)}[/cyan]", highlight=False, soft_wrap=True)
    seconds = _seconds(advice.plan.step_seconds)
    console.print(f"  then {seconds} s a step on {escape(_machines(advice.plan))}", highlight=False)


def _print_split(console: Console, plan: Plan, split: Split) -> None:
    gain = plan.step_seconds / split.plan.step_seconds
    if gain < 1.02:
        console.print("[green]✓[/green] balanced: no other split of the GPUs is faster", highlight=False)
        return
    console.print(
        f"\n[bold]balanced[/bold]: {_shares(split)}; then {_seconds(split.plan.step_seconds)} s a step, "
        f"{gain:.1f} times as fast",
        highlight=False,
    )
    for line in _written(split.changes):
        console.print(f"  [cyan]{escape(line)}[/cyan]", highlight=False, soft_wrap=True)


def _shares(split: Split) -> str:
    parts = [(split.gpus("policy", "critic"), "learn"), (split.gpus("reference", "reward"), "score")]
    shown = [f"{gpus} GPUs {verb}" for gpus, verb in [*parts, (split.gpus("rollout"), "sample")] if gpus]
    return ", ".join(shown)


def _written(changes: Changes) -> list[str]:
    """As they are given to `rayllm plan`."""
    lines = []
    for key, value in changes.items():
        shown = f"{value:g}" if isinstance(value, float) else json.dumps(value)
        shown = value if isinstance(value, str) else shown
        lines.append(f"{key if key.startswith('cluster.') else f'settings.{key}'}={shown}")
    return lines


def as_json(name: str, plan: Plan, advice: Advice | None, split: Split | None) -> dict[str, Any]:
    """The plan as plain data; memory in bytes."""
    return {
        "job": name,
        "cluster": plan.cluster.model_dump(),
        "workload": plan.workload.model_dump(),
        "fits": plan.fits,
        "problems": list(plan.problems),
        "roles": [_role_json(role) for role in plan.roles],
        "host_bytes": plan.host_bytes,
        "phases": {phase.name: {"seconds": phase.seconds, "slowest": phase.role} for phase in plan.phases},
        "step_seconds": plan.step_seconds,
        "tokens_per_second": plan.tokens_per_step / plan.step_seconds,
        "slowest_phase": plan.slowest.name,
        "cost_per_thousand_steps": plan.cost_per_thousand_steps,
        "advice": None if advice is None else {
            "changes": advice.changes, "step_seconds": advice.plan.step_seconds
        },
        "balanced_split": None if split is None else {
            "changes": split.changes, "learner_gpus": split.gpus("policy", "critic"),
            "scorer_gpus": split.gpus("reference", "reward"), "rollout_gpus": split.gpus("rollout"),
            "step_seconds": split.plan.step_seconds,
        },
        "note": MEASURED,
    }  # fmt: skip


def _role_json(role: PlannedRole) -> dict[str, Any]:
    spec, memory = role.spec, role.memory
    return {
        "role": spec.name,
        "processes": spec.num_actors,
        "gpus_per_process": spec.gpus,
        "shares_gpus_with": [name for name in spec.share if name != spec.name],
        "cpus_per_process": spec.cpus,
        "model": None if spec.shape is None else spec.shape.name,
        "parameters": 0 if spec.shape is None else spec.shape.parameters,
        **{part: getattr(memory, part) for part in PARTS},
        "peak": memory.peak,
        "peak_at": memory.moment,
        "available": role.available,
        "host": memory.host,
        "concurrency": memory.concurrency,
        "fits": role.problem is None,
    }


def _gib(size: float) -> str:
    if not size:
        return "–"
    value = size / GIB
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _count(parameters: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if parameters >= size:
            return f"{parameters / size:.3g} {unit}"
    return f"{parameters:,}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"


def _mark(good: bool) -> str:
    return "[green]✓[/green]" if good else "[red]✗[/red]"
