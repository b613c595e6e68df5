"""What the benchmarks measured, as Markdown.

    python -m bench.report FOLDER OUT

Reads every JSON of ``bench.ppo``, ``bench.floors``, ``bench.sync`` and ``bench.overhead`` in FOLDER. Repeated
measurements of one thing are pooled: medians and quartiles are over the warm steps of all of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.figures import spread, written
from bench.floors import STEP
from bench.overhead import COLUMNS, SEQUENCES_EACH, SIMULATED_COLUMNS, cells
from bench.workload import MICRO_BATCH, NEW_TOKENS, NUM_RESPONSES, PROMPT_TOKENS

TITLE = f"""# What a step costs

`bench/report.py` wrote this file; nothing in it is written by hand. A step is {NUM_RESPONSES} responses of
{NEW_TOKENS} tokens to prompts of {PROMPT_TOKENS} random tokens, in micro-batches of {MICRO_BATCH}, one epoch, float32
(`bench/workload.py`), unless a section's title says otherwise. Figures are medians (quartiles) over warm steps. `lag`
is `max_policy_lag`: without it sampling and learning take turns, with 1 the next step is sampled meanwhile. *Sum of the
floors*: what sampling, scoring and updating cost on one core with nothing around them.

GPU paths (NCCL, bfloat16 on tensor cores, several hosts) have not been run."""


def size(result: dict[str, Any]) -> str:
    """Of the model, in millions of parameters."""
    return f"{result['parameters'] / 1e6:.0f}M"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def where(results: Sequence[dict[str, Any]]) -> str:
    """Machine, versions, dates, commands."""
    first = results[0]
    machine, code = first["machine"], first["code"]
    loads = [result["machine"]["load_before"] for result in results]
    dates = sorted(result["date"] for result in results)
    commands = dict.fromkeys(result["command"] for result in results)
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    commit = f"{code['commit'][:12]}{' with changes' if code['modified'] else ''}" if code else "outside a checkout"
    return "\n".join(
        [
            f"- {machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']} GiB, {machine['system']}; load "
            f"before each run {min(loads)} to {max(loads)}",
            f"- {dates[0]} to {dates[-1]}, commit {commit}",
            f"- {versions}",
            *(f"- `{command}`" for command in commands),
        ]
    )


def pooled_floors(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Floor -> spread of wall and CPU seconds over all results."""
    found = {}
    for name in results[0]["floors"]:
        samples = [sample for result in results for sample in result["floors"][name]["samples"]]
        found[name] = {kind: spread([sample[kind] for sample in samples]) for kind in ("wall", "cpu")}
    return found


def floors_section(label: str, results: Sequence[dict[str, Any]]) -> str:
    rows = [(f"`{n}`", written(f["wall"]), written(f["cpu"])) for n, f in pooled_floors(results).items()]
    return f"## Floors, {label}\n\n" + markdown_table(("one thread", "wall s", "CPU s"), rows)


def job_section(label: str, results: Sequence[dict[str, Any]], floors: Sequence[dict[str, Any]]) -> str:
    """One algorithm at one size, beside the floors of that size."""
    steps = [step for result in results for step in result["steps"][-result["warm_steps"] :]]
    figures = {name: spread([step[name] for step in steps]) for name in steps[0]}
    seconds = [(f"{name}, s", written(figure)) for name, figure in figures.items() if name != "tokens_per_s"]
    lines = [*seconds, ("tokens/s", written(figures["tokens_per_s"], 0))]
    if floors:
        pooled = pooled_floors(floors)
        times = STEP[results[0]["algorithm"]]
        cpu = sum(count * pooled[name]["cpu"]["median"] for name, count in times.items())
        lines += [
            ("sum of the floors, CPU s", f"{cpu:.3f}"),
            ("CPU s of all processes / sum of the floors", f"{figures['all_cpu']['median'] / cpu:.2f}"),
            ("step / sum of the floors", f"{figures['step']['median'] / cpu:.2f}"),
        ]
        if not results[0]["lag"]:
            raw = pooled["async_llm"]["wall"]["median"] / figures["rollout"]["median"]
            bare = sum(count * pooled[name]["wall"]["median"] for name, count in times.items() if "update" in name)
            lines += [
                ("sampling throughput / raw AsyncLLM", f"{raw:.2f}"),
                ("update throughput / bare PyTorch on one core", f"{bare / figures['update']['median']:.2f}"),
            ]
    for name, what in (("start_s", "start to first step, s"), ("first_step_done_s", "start to first step done, s")):
        lines.append((what, ", ".join(f"{result[name]:.0f}" for result in results)))
    last = results[-1]
    apart = last["last_metrics"].get("rollout/logprob_mismatch")
    if apart is not None:  # else all was sampled by older weights
        lines.append(("sampler and learner apart in the last step, nats a token", f"{apart:.2g}"))
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in last["startup"].items())
    lines.append(("of it in the last run, s: roles side by side", parts))
    memory, cpu_of = last["peak_memory_gib"], last["cpu_seconds_per_step"]
    kinds = [
        (kind, f"{cpu_of.get(kind, sum(cpu_of.values())):.3f}", f"{memory[kind]:.2f}")
        for kind in sorted(memory, key=memory.__getitem__, reverse=True)
    ]
    table = markdown_table(("processes of the last run", "CPU s a step", "GiB at the peak"), kinds)
    return f"## {label}\n\n{markdown_table(('', 'median (quartiles)'), lines)}\n\n{table}"


def sync_section(results: Sequence[dict[str, Any]]) -> str:
    head = ("model", "MB", "serve, ms", "prove, ms", "two copies in memory, ms")
    rows = []
    for result in results:
        label = ", ".join([size(result), *result["overrides"]])
        times = [{k: 1e3 * v for k, v in result[name].items()} for name in ("serve_s", "prove_s", "copies_s")]
        rows.append([label, f"{result['bytes'] / 1e6:.1f}", *(written(figure, 1) for figure in times)])
    text = (
        "*Serve*: from the learner until an idle engine serves the new weights, their checksum compared. *Prove*: from "
        "then until a text is shown to be as probable to it as to the policy; it samples meanwhile, and nothing of "
        "that is handed out before. What a step of the loop waits for is its row *sync*. Beside them, the bytes copied "
        "out and in."
    )
    return f"## Weight sync\n\n{text}\n\n{markdown_table(head, rows)}"


def overhead_section(result: dict[str, Any]) -> str:
    measured, counted = (
        markdown_table(list(columns.values()), [cells(row, columns) for row in result[name]])
        for name, columns in (("rows", COLUMNS), ("simulated", SIMULATED_COLUMNS))
    )
    text = (
        "The loop over actors that answer at once. *Ray alone*: the same calls, with arrays as large, between plain "
        "actors in the same minutes, with nothing of rayllm in them; it is what cannot be saved but by fewer calls. "
        "Bytes are what the driver itself sends and fetches in a step."
    )
    more = (
        f"More engines than this machine has room for, {SEQUENCES_EACH} sequences each: the fleet's own code over "
        "engines without processes, and Ray's part of its calls as it was for each of the most real engines above. The "
        "driver knows shards, not engines: its calls stay what they are with these."
    )
    return f"## Orchestration alone\n\n{text}\n\n{measured}\n\n{more}\n\n{counted}"


def report(results: Sequence[dict[str, Any]]) -> str:
    """The whole file."""
    floors: dict[str, list[dict[str, Any]]] = {}
    jobs: dict[str, list[dict[str, Any]]] = {}
    sections = [TITLE, where(results)]
    for result in results:
        if result["bench"] == "floors":
            floors.setdefault(size(result), []).append(result)
        elif result["bench"] == "ppo":
            extra = [f"lag {result['lag']}"] if result["lag"] else []
            label = ", ".join([result["algorithm"].upper(), size(result), *extra, *result["overrides"]])
            jobs.setdefault(label, []).append(result)
    sections += [job_section(label, group, floors.get(size(group[0]), [])) for label, group in jobs.items()]
    sections += [floors_section(label, group) for label, group in floors.items()]
    syncs = [result for result in results if result["bench"] == "sync"]
    sections += [sync_section(syncs)] if syncs else []
    sections += [overhead_section(result) for result in results if result["bench"] == "overhead"]
    return "\n\n".join(sections) + "\n"


def main(folder: str, out: str) -> None:
    found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    results = sorted(found, key=lambda result: (result.get("parameters", 0), result["date"]))
    Path(out).write_text(report(results))
    print(f"{out}: {len(results)} measurements")


if __name__ == "__main__":
    main(*sys.argv[1:])
