"""What two hundred steps of PPO leave in memory, on the real stack: DeepSpeed and vLLM.

After more steps than that: an engine on CPU keeps what it has compiled for every new shape of its batches, which come to
an end.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.jobs.test_elastic import WITHIN_S, start, steps_of, wait_for
from tests.jobs.test_pipeline import ppo_arguments

STEPS, WARM, EVERY = 500, 300, 10
MIB_A_STEP = 0.15
"""A leak of one copy of the model's weights (0.4 MiB) would be far above."""


def state(root: psutil.Process) -> dict[tuple[int, str], tuple[float, int]]:
    """Pid and name -> MiB that the process has for itself, and its open files; of the job's processes that are there."""
    found = {}
    for process in [root, *root.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            name = "driver" if process == root else process.name().partition(".")[0]  # without what it is doing
            found[process.pid, name] = process.memory_full_info().uss / 2**20, process.num_fds()
    return found


@pytest.mark.long
@pytest.mark.scorecard("R64", tier="full")
def test_two_hundred_steps_after_a_warm_up_leave_every_process_as_it_was(tiny_run, tmp_path: Path, seen):
    run_dir = tmp_path / "run"
    quiet = ("eval.every_steps=1000", "checkpoint.every_steps=50", "checkpoint.keep=1")
    job = start(ppo_arguments(tiny_run, run_dir, f"num_steps={STEPS}", *quiet))
    root, samples = psutil.Process(job.pid), {}
    for step in range(WARM, STEPS, EVERY):
        wait_for(lambda step=step: len(steps_of(run_dir)) > step, job)
        samples[len(steps_of(run_dir)) - 1] = state(root)
    output, _ = job.communicate(timeout=WITHIN_S)
    assert job.returncode == 0, output
    throughout = set.intersection(*(set(sample) for sample in samples.values()))
    names = {name for _, name in throughout}
    assert {"driver", "raylet", "gcs_server"} <= names
    assert {f"ray::{role}" for role in ("PolicyActor", "CriticActor", "RolloutActor", "FleetActor")} <= names
    slopes, files = {}, {}
    for process in throughout:
        memory, opened = zip(*(sample[process] for sample in samples.values()), strict=True)
        slopes[process] = float(np.polyfit(list(samples), memory, 1)[0])
        files[process] = opened[-1] - opened[0]
    told = {f"{name} {pid}": f"{1024 * slopes[pid, name]:+.0f} KiB a step, {files[pid, name]:+d} files" for pid, name in throughout}
    print(told)
    assert max(slopes.values()) < MIB_A_STEP, told
    assert max(files.values()) <= 4, told
    steepest = max(throughout, key=lambda process: slopes[process])
    seen(f"of {len(throughout)} processes {steepest[1]} grew most: {1024 * slopes[steepest]:+.0f} KiB a step; "
         f"open files {max(files.values()):+d}")  # fmt: skip
