"""Orchestration alone: the loop of `jobs/ppo.py` over actors that answer at once.

    python -m bench.overhead --json OUT

For 1 to 16 rollout actors, 1 to 4 ranks of each learner and 64 to 4,096 sequences a step: wall milliseconds of a step,
CPU milliseconds of the driver and of the fleet's process, and the bytes that the driver handles in one: pickled
arguments of its calls and pickled results that it fetches. Beside them, where a learner has one rank, what Ray takes by
itself for the same calls and arrays between plain actors (``ray_alone.py``). What 64 to 1,024 engines would cost is
counted: the fleet's own code, run here over engines without processes, and for each call what Ray's part of it costs
with 16 real ones.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from rich.console import Console
from rich.table import Table

from actors.carried import Carried
from actors.fleet import PROBE_TOKENS, RolloutFleet
from actors.fleet_actor import FleetActor
from actors.group import ActorGroup, Role
from actors.health import Deadlines
from actors.member import Call
from actors.proof import Answer, Proof
from actors.supervisor import Blueprint, Size
from actors.watched import shell
from bench.fakes import FakeModelActor, FakeRolloutActor, FakeSourceActor, shard_of
from bench.figures import circumstances, console, spread, written
from bench.ray_alone import RayAlone, Sizes
from bench.workload import NEW_TOKENS, PROMPT_TOKENS, settings
from jobs.ppo import train
from jobs.ppo_batches import Batches
from jobs.ppo_rewards import RewardGroups
from jobs.ppo_roles import Roles
from jobs.ppo_watch import Controls, Watch
from jobs.session import ray_session
from rayllm.config.base import load_config
from rayllm.config.ppo import SHARDS_A_RANK, PPOConfig
from rayllm.config.rl import FleetConfig
from rayllm.data.experience import Experience, concat
from rayllm.data.prompts import PromptData
from rayllm.lineage import write_json
from rayllm.report.run import Run
from rayllm.report.terminal import Progress

NUM_ACTORS, NUM_SEQUENCES = ((1, 1), (2, 2), (4, 4), (16, 1)), (64, 1024, 4096)
"""Rollout actors and ranks of each learner."""

NUM_SIMULATED, SEQUENCES_EACH = (64, 256, 1024), 64
COLD, REPEATS = 3, 10
CPUS = 0.01
DEADLINES = Deadlines(FleetConfig().stall_s, FleetConfig().stall_s)
LEARNERS, SCORERS = ("policy", "critic"), ("reference", "reward")


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

    def readers(self) -> ray.ObjectRef:
        self.traffic.call(())
        return super().readers()

    def synced(self) -> ray.ObjectRef:
        self.traffic.call(())
        return super().synced()

    def _submit(self, *arguments: Any) -> ray.ObjectRef:
        self.traffic.call(arguments)
        return super()._submit(*arguments)

    def _sync(self, call: Call, proof: Proof | None) -> ray.ObjectRef:
        self.traffic.call((call, proof))
        reference = super()._sync(call, proof)
        self.traffic.answers += [reference] if self.traffic.counting else []
        return reference


class Meter(Watch):
    """The run's own watch, with a look at the clocks after every step."""

    def __init__(self, traffic: Traffic, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.traffic = traffic
        self.clocks: list[tuple[float, float, float]] = []
        self.received = 0

    def after(self, step: int, metrics: dict[str, float]) -> None:
        super().after(step, metrics)
        if self.traffic.counting:
            self.received = self.traffic.stop()
            processes = psutil.Process().children(recursive=True)
            (self._fleet,) = [p for p in processes if p.cmdline() and p.cmdline()[0].startswith("ray::FleetActor")]
        used = self._fleet.cpu_times()
        self.clocks.append((time.perf_counter(), time.process_time(), used.user + used.system))


def measure_one(
    work: Path, groups: dict[str, CountingGroup], fleet: CountingFleet, num_sequences: int
) -> dict[str, Any]:
    """One run of the loop; ``groups`` by role."""
    num_actors = fleet.role.num_actors
    num_steps = COLD + REPEATS
    ranks = len(groups["policy"])
    folder = work / f"{num_actors}-{ranks}-{num_sequences}"
    paths = {"run_dir": folder, **{key: work / "input" for key in ("model", "reward_model", "prompts")}}
    tree = settings("ppo", num_steps=num_steps, **paths)
    tree |= {"prompts_per_step": num_sequences, "rollout": {**tree["rollout"], "num_actors": num_actors}}
    tree |= {name: {**tree[name], "num_actors": len(group)} for name, group in groups.items()}
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
        "rollout_actors": num_actors, "ranks": ranks, "sequences": num_sequences, "shards": loaded.config.num_shards,
        "wall_ms": spread(wall), "driver_cpu_ms": spread(cpu), "calls": traffic.calls,
        "fleet_cpu_ms": 1e3 * (clocks[-1][2] - clocks[0][2]) / len(wall),  # the kernel counts in 10 ms
        "sent_bytes": traffic.sent, "received_bytes": watch.received,
    }  # fmt: skip


def measure() -> list[dict[str, Any]]:
    """All sizes, in one Ray session."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-overhead-") as folder, ray_session(None):
        work = Path(folder)
        (work / "input").write_text("stands for every model and data set: nothing reads it")
        scorers = _start(SCORERS, 1)
        for num_actors, ranks in NUM_ACTORS:
            learners = _start(LEARNERS, ranks)
            engines = Blueprint(Role("rollout", num_actors, CPUS, 0), shell(FakeRolloutActor), lambda number: {})
            fleet = CountingFleet(engines, Size(num_actors, 1, num_actors, 0, 0.0), DEADLINES)
            found = [measure_one(work, learners | scorers, fleet, num_sequences) for num_sequences in NUM_SEQUENCES]
            for group in (*learners.values(), fleet):
                group.stop()
            rows += beside_ray_alone(found) if ranks == 1 else [{**row, "ray_alone_ms": None} for row in found]
    return rows


def beside_ray_alone(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one number of engines, with what Ray takes by itself."""
    alone = RayAlone(rows[0]["rollout_actors"], cpus=CPUS)
    found = []
    for row in rows:
        engines, shards = row["rollout_actors"], row["shards"]
        of_shard = row["sequences"] // shards
        answer, shard = (pickled_size(shard_of(num)) for num in (of_shard // max(engines // shards, 1), of_shard))
        column = 4 * of_shard * (PROMPT_TOKENS + NEW_TOKENS)
        sizes = Sizes(answer, 4 * of_shard, column, shard + 4 * column)  # of the reference, values, advantages, returns
        wall = []
        for _ in range(COLD + REPEATS):
            alone.calls, began = 0, time.perf_counter()
            alone.step(shards, sizes)
            wall.append(1e3 * (time.perf_counter() - began))
        assert alone.calls == row["calls"], "these are other calls than the loop's"
        found.append({**row, "ray_alone_ms": spread(wall[COLD:])})
    alone.stop()
    return found


def _start(roles: tuple[str, ...], ranks: int) -> dict[str, CountingGroup]:
    classes = {"reward": FakeSourceActor}
    return {
        name: CountingGroup(Role(name, ranks, CPUS, 0), classes.get(name, FakeModelActor), lambda rank: {})
        for name in roles
    }


class _Engine:
    """Stands for the handle of an engine: every call is answered when it is made."""

    def __init__(self, shard: Experience) -> None:
        self._answer = Answer(Carried(shard), None)

    def __getattr__(self, method: str) -> _Engine:
        return self

    def remote(self, *arguments: Any, **settings: Any) -> Any:
        answer = asyncio.get_running_loop().create_future()
        answer.set_result(self._answer)
        return answer


async def simulate(num_engines: int) -> list[float]:
    """Milliseconds of the fleet's own code in each step, one call of an engine after the other."""
    blueprint = Blueprint(Role("rollout", num_engines, CPUS, 0), shell(FakeRolloutActor), lambda number: {})
    fleet = FleetActor(blueprint, Size(num_engines, 1, num_engines, 0, 0.0), DEADLINES)
    await fleet.adopt([_Engine(shard_of(SEQUENCES_EACH))] * num_engines)
    found = []
    for step in range(COLD + REPEATS):
        began = time.perf_counter()
        await fleet.sync(Call("sync"))
        pieces = num_engines // SHARDS_A_RANK
        work = range(pieces), [1] * pieces, Carried(concat), {"step": step}
        shards = [fleet.work("experience", *work) for _ in range(SHARDS_A_RANK)]
        joined = await asyncio.gather(*shards)
        found.append(1e3 * (time.perf_counter() - began))
        sampled = [len(part.open()) for delivery in joined for part in delivery.parts]
        assert sum(sampled) == num_engines * SEQUENCES_EACH
    return found[COLD:]


def simulated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What steps with many more engines than there are here would cost the fleet."""
    largest = max(rows, key=lambda row: (row["rollout_actors"], row["sequences"] == NUM_SEQUENCES[1]))
    engines = largest["rollout_actors"]
    own = spread(asyncio.run(simulate(engines)))["median"]
    per_engine = (largest["fleet_cpu_ms"] - own) / engines
    return [
        {"engines": count, "own_ms": spread(asyncio.run(simulate(count))), "ray_ms": per_engine * count,
         "driver_calls": largest["calls"], "driver_cpu_ms": largest["driver_cpu_ms"]["median"]}
        for count in NUM_SIMULATED
    ]  # fmt: skip


COLUMNS = {
    "rollout_actors": "rollout actors", "ranks": "learner ranks", "sequences": "sequences", "shards": "shards",
    "wall_ms": "step, ms", "ray_alone_ms": "Ray alone, ms", "driver_cpu_ms": "driver CPU, ms",
    "fleet_cpu_ms": "fleet CPU, ms", "calls": "calls",
    "sent_bytes": "bytes sent", "received_bytes": "bytes got",
}  # fmt: skip
SIMULATED_COLUMNS = {
    "engines": "engines", "own_ms": "fleet's own code, ms", "ray_ms": "Ray's part of its calls, CPU ms",
    "driver_calls": "driver's calls", "driver_cpu_ms": "driver CPU, ms",
}  # fmt: skip


def cells(row: dict[str, Any], columns: dict[str, str]) -> list[str]:
    """As written in a table."""

    def cell(value: Any) -> str:
        if isinstance(value, dict):
            return written(value, 1)
        return "–" if value is None else f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"

    return [cell(row[name]) for name in columns]


def show(result: dict[str, Any], to: Console) -> None:
    """Print the figures as tables."""
    both = (("the loop over actors that answer at once", COLUMNS, "rows"),
            ("the fleet over engines that are not there", SIMULATED_COLUMNS, "simulated"))  # fmt: skip
    for title, columns, name in both:
        table = Table(title=title, title_justify="left")
        for column in columns.values():
            table.add_column(column, justify="right")
        for row in result[name]:
            table.add_row(*cells(row, columns))
        to.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    rows = measure()
    result = {"bench": "overhead", **circumstances(), "rows": rows, "simulated": simulated(rows)}
    write_json(given.json, result)
    show(result, console())


if __name__ == "__main__":
    main()
