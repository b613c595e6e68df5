"""Time the `ppo` job on the fixed workload: real Ray, vLLM and DeepSpeed, by the command that a user types.

    python -m bench.ppo --model DIR --algorithm ppo|grpo --steps N --json OUT [--lag K] [key=value ...]

Any local Hugging Face folder with a tokenizer serves as the model; ``python -m bench.models`` makes random ones. PPO
takes a reward model of the same size, made with a random head unless ``reward_model=DIR`` is given. Further settings go
over those of ``bench/workload.py``. Medians are over the warm steps: all but the first two.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from bench.figures import circumstances, console, spread, written
from bench.models import make_reward_model
from bench.process_watch import ProcessWatch
from bench.workload import GROUPS, NUM_RESPONSES, make_prompts, settings
from rayllm.data.files import write_parquet
from rayllm.lineage import write_json
from rayllm.models.folders import count_stored_parameters, load_tokenizer

COLD_STEPS = 2


def measure(model: Path, algorithm: str, *, num_steps: int, lag: int, overrides: list[str]) -> dict[str, Any]:
    """Run the job in a folder that goes afterwards; returns what was measured.

    Raises:
        RuntimeError: the job failed; its last output is on the screen.
    """
    with tempfile.TemporaryDirectory(prefix="bench-ppo-") as folder:
        work = Path(folder)
        random_head = algorithm == "ppo" and not any(text.startswith("reward_model=") for text in overrides)
        config = _config(work, model, algorithm, num_steps, random_head=random_head)
        command = [sys.executable, "-m", "jobs.cli", "ppo", "--config", str(config)]
        command += [f"max_policy_lag={lag}"] if lag else []
        output = work / "output.txt"
        with output.open("w") as stream:
            job = subprocess.Popen([*command, *overrides], stdout=stream, stderr=subprocess.STDOUT)
            with ProcessWatch(job.pid, work / "run/events.jsonl") as watch:
                status = job.wait()
        if status:
            print(output.read_text()[-4000:], file=sys.stderr)
            raise RuntimeError(f"the ppo job ended with status {status}")
        events = [json.loads(line) for line in (work / "run/events.jsonl").read_text().splitlines()]
    return summarize(events, watch)


def _config(work: Path, model: Path, algorithm: str, num_steps: int, *, random_head: bool) -> Path:
    """Write the prompts, a reward model with a ``random_head`` if wanted, and the config file; returns the last."""
    num_prompts = NUM_RESPONSES // GROUPS[algorithm] * num_steps  # none comes twice: no prefix is cached
    prompts = make_prompts(num_prompts, len(load_tokenizer(model)))
    write_parquet([{"prompt": ids} for ids in prompts], work / "prompts.parquet")
    paths = {"run_dir": work / "run", "model": model.absolute(), "prompts": work / "prompts.parquet"}
    if random_head:
        paths["reward_model"] = work / "reward_model"
        make_reward_model(model, paths["reward_model"])
    path = work / "config.yaml"
    path.write_text(yaml.safe_dump(settings(algorithm, num_steps=num_steps, **paths)))
    return path


def summarize(lines: list[dict[str, Any]], watch: ProcessWatch) -> dict[str, Any]:
    """Figures of a run.

    Args:
        lines: of its events.jsonl; the first metrics are of the moment before the first step.
        watch: of its processes, with a mark for each line.
    """
    places = [place for place, line in enumerate(lines) if "metrics" in line]  # the others are notes
    events = [lines[place] for place in places]
    steps = []
    for index, (before, event) in enumerate(zip(events[:-1], events[1:], strict=True)):
        times = {n.removeprefix("time/"): s for n, s in event["metrics"].items() if n.startswith("time/")}
        tokens = event["metrics"]["perf/tokens_per_second"] * times.pop("step")
        seconds = event["t"] - before["t"]
        cpu = watch.cpu_seconds(places[index], places[index + 1])
        steps.append(
            {
                "step": seconds,
                **times,
                "driver": seconds - sum(times.values()),
                "driver_cpu": cpu["driver"],
                "all_cpu": sum(cpu.values()),
                "tokens_per_s": tokens / seconds,
            }
        )
    warm = steps[COLD_STEPS:] or steps[-1:]
    first = len(steps) - len(warm)
    cpu = watch.cpu_seconds(places[first], places[-1])
    return {
        "warm_steps": len(warm),
        "warm": {name: spread([step[name] for step in warm]) for name in warm[0]},
        "cpu_seconds_per_step": {kind: seconds / len(warm) for kind, seconds in sorted(cpu.items())},
        "startup": {n.removeprefix("startup/"): s for n, s in events[0]["metrics"].items() if n.startswith("startup/")},
        "start_s": watch.marks[places[0]].seconds,
        "first_step_done_s": watch.marks[places[1]].seconds,
        "peak_memory_gib": {"total": sum(watch.peak.values()), **dict(sorted(watch.peak.items()))},
        "own_memory_gib": dict(sorted(watch.own.items())),
        "steps": steps,
        "engines": [event["metrics"]["rollout/engines"] for event in events[1:]],
        "last_metrics": events[-1]["metrics"],
    }


def show(result: dict[str, Any], to: Console) -> None:
    """Print the figures as tables."""
    title = f"{result['algorithm']}, {result['parameters']:,} parameters, {result['warm_steps']} warm steps"
    table = Table(title=title, title_justify="left")
    for column in ("a step's", "median (quartiles)"):
        table.add_column(column, justify="left" if column == "a step's" else "right")
    for name, figure in result["warm"].items():
        table.add_row(name if name == "tokens_per_s" else f"{name}, s", written(figure))
    to.print(table)
    table = Table()
    for column in ("processes", "CPU s a step", "GiB at the peak"):
        table.add_column(column, justify="left" if column == "processes" else "right")
    memory, cpu = result["peak_memory_gib"], result["cpu_seconds_per_step"]
    for kind in sorted(memory.keys() | cpu.keys(), key=lambda kind: -memory.get(kind, 0.0)):
        seconds = sum(cpu.values()) if kind == "total" else cpu.get(kind, 0.0)
        table.add_row(kind, f"{seconds:.3f}", f"{memory.get(kind, 0.0):.2f}")
    to.print(table)
    sampling: dict[float, list[float]] = {}
    for step, engines in list(zip(result["steps"], result["engines"], strict=True))[COLD_STEPS:]:
        sampling.setdefault(engines, []).append(step["rollout"])
    for engines, times in sorted(sampling.items()):
        to.print(f"sampling with {engines:g} engines, {len(times)} steps: {written(spread(times))} s")
    to.print(
        f"start to first step {result['start_s']:.0f} s, until it is done {result['first_step_done_s']:.0f} s"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--algorithm", choices=sorted(GROUPS), default="ppo")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--lag", type=int, default=0, help="updates by which a response's policy may be behind")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_intermixed_args(arguments)
    result = {
        "bench": "ppo",
        "algorithm": given.algorithm,
        "model": str(given.model),
        "parameters": count_stored_parameters(given.model),
        "lag": given.lag,
        "overrides": given.overrides,
        **circumstances(),
    }
    result |= measure(
        given.model, given.algorithm, num_steps=given.steps, lag=given.lag, overrides=given.overrides
    )
    write_json(given.json, result)
    show(result, console())


if __name__ == "__main__":
    main()
