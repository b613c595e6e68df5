"""PPO on the real stack, DeepSpeed and vLLM, that loses its actors: three at random in a run, and one that hangs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from rayllm.faults import Fault, plan, struck
from tests.jobs.test_elastic import LEARNED, WITHIN_S, notes, start, steps_of, wait_for
from tests.jobs.test_pipeline import ppo_arguments, record

ACTORS = ("PolicyActor", "CriticActor", "ReferenceActor", "SourceActor", "RolloutActor")
KILLS = 3
STEPS = 20


def kill_one(job: subprocess.Popen, actor: str) -> bool:
    """SIGKILL for the oldest process of a class of actors; False while there is none. The system cuts names off at 15
    letters, Ray adds what they do."""
    name, found = f"ray::{actor}"[:15], []
    for child in psutil.Process(job.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if child.name().startswith(name) and child.status() != psutil.STATUS_ZOMBIE:
                found.append((child.create_time(), child))
    with suppress(psutil.NoSuchProcess):
        if found:
            min(found, key=lambda pair: pair[0])[1].kill()
            return True
    return False


def kill_at_random(job: subprocess.Popen, run_dir: Path, rng: random.Random) -> list[str]:
    """Kill actors in some steps, after a time in which any phase may be under way, or a rebuild; returns who it was."""
    killed = []
    for step in sorted(rng.choices(range(STEPS - 6), k=KILLS)):
        wait_for(lambda step=step: len(steps_of(run_dir)) > step, job)
        time.sleep(rng.uniform(0, 1))
        actor = rng.choice(ACTORS)
        wait_for(lambda actor=actor: kill_one(job, actor), job)  # it may just be starting anew
        killed.append(f"{actor} after step {step}")
    return killed


def prompts_used(run_dir: Path) -> dict:
    """Of the prompts, what the last checkpoint says."""
    state = json.loads((run_dir / f"checkpoints/step-{STEPS:06d}/state.json").read_text())
    return {name: state[name] for name in ("prompts", "drawn", "ahead")}


def settings(tiny_run, run_dir: Path, *more: str) -> list[str]:
    steps = (f"num_steps={STEPS}", "eval.every_steps=10")
    return ppo_arguments(tiny_run, run_dir, *steps, "rollout.num_actors=2", "rollout.cpus_per_actor=0.2", *more)


def finished(tiny_run, run_dir: Path, *more: str, **env: str) -> Path:
    job = start(settings(tiny_run, run_dir, *more), **env)
    output, _ = job.communicate(timeout=WITHIN_S)
    assert job.returncode == 0, output + notes(run_dir)
    return run_dir


def difference(one: list[dict], other: list[dict], told: str) -> float:
    """The largest of what was learned, in all steps of a run and of a disturbed one; more than rounding fails."""
    assert [event["step"] for event in other] == [event["step"] for event in one] == list(range(STEPS + 1)), told
    apart = 0.0
    for before, after in zip(one, other, strict=True):
        for name in LEARNED:
            if name in before["metrics"]:
                value = before["metrics"][name]
                assert after["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), (after["step"], name, told)
                apart = max(apart, abs(after["metrics"][name] - value))
    return apart


@pytest.fixture(scope="module")
def undisturbed(tiny_run, tmp_path_factory) -> Path:
    return finished(tiny_run, tmp_path_factory.mktemp("undisturbed") / "run")


@pytest.mark.long
@pytest.mark.scorecard("R16", tier="full")
@pytest.mark.parametrize("seed", range(5))
def test_three_random_kills_change_nothing_that_is_learned(tiny_run, undisturbed, tmp_path, seed, seen):
    run_dir = tmp_path / "run"
    job = start(settings(tiny_run, run_dir))
    killed = kill_at_random(job, run_dir, random.Random(seed))
    output, _ = job.communicate(timeout=WITHIN_S)
    told = f"{killed}\n{output}"
    print(told)
    assert job.returncode == 0 and record(run_dir)["status"] == "done", told
    apart = difference(steps_of(undisturbed), steps_of(run_dir), told)
    assert prompts_used(run_dir) == prompts_used(undisturbed)
    seen(f"seed {seed}: {', '.join(killed)}: exit 0, all steps and prompts, metrics apart by at most {apart:.1g}")


@pytest.mark.long
@pytest.mark.scorecard("R07", "R10", "R18", tier="full")
def test_a_rank_that_hangs_and_models_that_die_are_rebuilt_beside_real_engines(tiny_run, tmp_path, seen):
    chosen = [
        Fault("policy.update", "stop", passes=3, rank=1),  # the other rank waits for it in a collective
        Fault("reference.logprobs", "kill", passes=3),
        Fault("critic.values", "kill", passes=4),
    ]
    more = ("policy.num_actors=2", "policy.cpus_per_actor=0.2", "recovery.stall_s=10")
    calm = finished(tiny_run, tmp_path / "calm", *more)
    run_dir = finished(tiny_run, tmp_path / "run", *more, **{**os.environ, **plan(tmp_path / "faults", chosen)})
    told = notes(run_dir)
    print(told)
    assert len(struck(tmp_path / "faults")) == len(chosen), told
    apart = difference(steps_of(calm), steps_of(run_dir), told)
    stacks = (run_dir / "logs/model-stacks.txt").read_text()
    assert "policy rank 0: " in stacks and "policy rank 1: " in stacks and "hread 0x" in stacks
    seen(f"a stopped rank, then reference and critic killed: all rebuilt, metrics apart by at most {apart:.1g}")
