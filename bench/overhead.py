"""Orchestration alone: the loop of `jobs/ppo.py` over actors that answer at once.

    python -m bench.overhead --json OUT

For 1, 4 and 16 rollout actors and 64 to 4,096 sequences a step: wall and driver CPU milliseconds of a step, and the
bytes that the driver handles in one: pickled arguments of its calls and pickled results that it fetches.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import yaml
from rich.console import Console
from rich.table import Table

from actors.fleet import PROBE_TOKENS, RolloutFleet
from actors.group import ActorGroup, Role
from actors.health import Deadlines
from actors.member import Call
from actors.supervisor import Blueprint, Size
from bench.fakes import FakeModelActor, FakeRolloutActor
from bench.figures import circumstances, console, spread, written
from bench.workload import PROMPT_TOKENS, settings
from jobs.ppo import train
from jobs.ppo_batches import Batches
from jobs.ppo_rewards import RewardGroups
from jobs.ppo_roles import Roles
from jobs.ppo_watch import Controls, Watch
from jobs.session import ray_session
from rayllm.config.base import load_config
from rayllm.config.ppo import PPOConfig
from rayllm.data.prompts import PromptData
from rayllm.lineage import write_json
from rayllm.report.run import Run
from rayllm.report.terminal import Progress

NUM_ACTORS, NUM_SEQUENCES = (1, 4, 16), (64, 512, 4096)
COLD, REPEATS = 3, 10
CPUS = 0.01
ROLES = ("policy", "critic", "reference", "reward")


class _Pickler(pickle.Pickler):
    """References count with their ids: what they stand for is not handled here."""

    def persistent_id(self, value: Any) -> Any:
        return value.binary() if isinstance(value, ray.ObjectRef) else None


def pickled_size(value: Any) -> int:
    """Bytes."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(value)
    return len(buffer.getbuffer())


@dataclass
class Traffic:
    """What the driver sends and fetches while ``counting``: in the first step, so that the others are timed without."""

    counting: bool = True
    calls: int = 0
    sent: int = 0
    answers: list[Any] = field(default_factory=list)

    def call(self, arguments: Any) -> None:
        if self.counting:
            self.calls += 1
            self.sent += pickled_size(arguments)

    def stop(self) -> int:
        """Bytes of all answers."""
        self.counting = False
        return sum(pickled_size(answer) for answer in ray.get(self.answers))


class CountingGroup(ActorGroup[Any]):
    """An actor group that tells its calls to ``traffic``. What ``map`` and calls of one rank return stays in the
    actors."""

    traffic: Traffic

    def submit(self, method: Callable[..., Any], *args: Any, rank: int | None = None, **kwargs: Any) -> list[Any]:
        references = super().submit(method, *args, rank=rank, **kwargs)
        for reference in references:
            self.traffic.call((args, kwargs))
            self.traffic.answers += [reference] if self.traffic.counting and rank is None else []
        return references

    def map(self, method: Callable[..., Any], *columns: Any, **kwargs: Any) -> list[Any]:
        for row in zip(*columns, strict=True):
            self.traffic.call((row, kwargs))
        return super().map(method, *columns, **kwargs)


class CountingFleet(RolloutFleet):
    """A fleet that tells its calls to ``traffic``."""

    traffic: Traffic

    def _submit(self, *arguments: Any) -> ray.ObjectRef:
        self.traffic.call(arguments)
        return super()._submit(*arguments)

    def _sync(self, call: Call) -> ray.ObjectRef:
        self.traffic.call(call)
        reference = super()._sync(call)
        self.traffic.answers += [reference] if self.traffic.counting else []
        return reference


class Meter(Watch):
    """The run's own watch, with a look at the clocks after every step."""

    def __init__(self, traffic: Traffic, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.traffic = traffic
        self.clocks: list[tuple[float, float]] = []
        self.received = 0

    def after(self, step: int, metrics: dict[str, float]) -> None:
        super().after(step, metrics)
        if self.traffic.counting:
            self.received = self.traffic.stop()
        self.clocks.append((time.perf_counter(), time.process_time()))


def measure_one(
    work: Path, groups: dict[str, CountingGroup], fleet: CountingFleet, num_sequences: int
) -> dict[str, Any]:
    """One run of the loop; ``groups`` by role."""
    num_actors = fleet.role.num_actors
    num_steps = COLD + REPEATS
    folder = work / f"{num_actors}-{num_sequences}"
    paths = {"run_dir": folder, **{key: work / "input" for key in ("model", "reward_model", "prompts")}}
    tree = settings("ppo", num_steps=num_steps, **paths)
    tree |= {"prompts_per_step": num_sequences, "rollout": {**tree["rollout"], "num_actors": num_actors}}
    tree |= {name: {**tree[name], "num_actors": len(groups[name])} for name in ROLES}
    path = work / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    loaded = load_config(PPOConfig, path, [])
    reward: Any = RewardGroups(loaded.config.reward, {"model": groups["reward"]})
    others: dict[str, Any] = {**groups, "reward": reward, "rollout": fleet}
    roles = Roles(config=loaded.config, **others, probe=[1] * PROBE_TOKENS)
    num_prompts = num_sequences * num_steps
    prompts = PromptData([{}] * num_prompts, [[1] * PROMPT_TOKENS] * num_prompts, {})
    batches, controls = Batches(roles, prompts, loaded.config), Controls(loaded.config)
    traffic = Traffic(counting=False)
    for group in (*groups.values(), fleet):
        group.traffic = traffic
    with Path(os.devnull).open("w") as nowhere, Run("ppo", loaded) as job:
        progress = Progress(Console(file=nowhere), "ppo", num_steps)
        watch = Meter(traffic, job, loaded.config, roles, batches, controls, progress, None, None)
        roles.sync_weights(version=0)
        traffic.counting = True
        train(roles, batches, controls, loaded.config, watch)
    clocks = watch.clocks[COLD - 1 :]
    wall, cpu = ([1e3 * (b[i] - a[i]) for a, b in zip(clocks[:-1], clocks[1:], strict=True)] for i in (0, 1))
    return {
        "rollout_actors": num_actors, "sequences": num_sequences, "shards": loaded.config.num_shards,
        "wall_ms": spread(wall), "driver_cpu_ms": spread(cpu), "calls": traffic.calls,
        "sent_bytes": traffic.sent, "received_bytes": watch.received,
    }  # fmt: skip


def measure() -> list[dict[str, Any]]:
    """All sizes, in one Ray session."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-overhead-") as folder, ray_session(None):
        work = Path(folder)
        (work / "input").write_text("stands for every model and data set: nothing reads it")
        others = {
            name: CountingGroup(Role(name, 1, CPUS, 0), FakeModelActor, lambda rank: {})
            for name in ("policy", "critic", "reference", "reward")
        }
        for num_actors in NUM_ACTORS:
            engines = Blueprint(Role("rollout", num_actors, CPUS, 0), FakeRolloutActor, lambda number: {})
            fleet = CountingFleet(engines, Size(num_actors, 1, num_actors, 0, 0.0), Deadlines(60.0, 60.0))
            rows += [measure_one(work, others, fleet, num_sequences) for num_sequences in NUM_SEQUENCES]
            fleet.stop()
    return rows


def show(result: dict[str, Any], to: Console) -> None:
    """Print the figures as a table."""
    table = Table(title="the loop over actors that answer at once", title_justify="left")
    for column in ("rollout actors", "sequences", "shards", "step, ms", "driver CPU, ms", "calls", "bytes sent", "got"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        sizes = (row["rollout_actors"], row["sequences"], row["shards"])
        traffic = (row["calls"], row["sent_bytes"], row["received_bytes"])
        times = (written(row["wall_ms"], 1), written(row["driver_cpu_ms"], 1))
        table.add_row(*(f"{n:,}" for n in sizes), *times, *(f"{n:,}" for n in traffic))
    to.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    result = {"bench": "overhead", **circumstances(), "rows": measure()}
    write_json(given.json, result)
    show(result, console())


if __name__ == "__main__":
    main()
