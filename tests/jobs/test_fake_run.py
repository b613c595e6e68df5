"""The RL loop over fake engines: that it is the real one, that it stays as large as it was, what it says of faults."""

from __future__ import annotations

import gc
import json
import sys
import time

import psutil
import pytest
import ray
from ray._private.internal_api import memory_summary

from actors.group import ActorGroup, Role
from actors.rollout import RolloutActor
from rayllm import faults
from rayllm.faults import Fault, plan, struck
from tests.actors.fake_engine import FakeEngineActor
from tests.jobs.fake_run import CPUS, fake_run


def events(folder):
    return [json.loads(line) for line in (folder / "run/events.jsonl").read_text().splitlines()]


@pytest.fixture
def arm(monkeypatch, tmp_path):
    """Faults for the actors that are started from now on."""

    def armed(*chosen: Fault):
        plan(tmp_path / "faults", chosen)
        monkeypatch.setattr(faults, "_planned", faults._Planned(tmp_path / "faults"))
        return tmp_path / "faults"

    return armed


@pytest.mark.scorecard("R64")
def test_two_hundred_steps_leave_memory_store_and_files_as_they_were(local_ray, tmp_path, tiny_model_dir, seen):
    """From a step on at which all caches are filled; a leak of one shard a step would be seen four times over."""
    process, warm, num_steps = psutil.Process(), 60, 200

    def state():
        gc.collect()
        summary = memory_summary(address=ray.get_runtime_context().gcs_address, stats_only=True)
        used = float(summary.split("Plasma memory usage ")[1].split(" MiB")[0])
        return process.memory_info().rss / 2**20, used, process.num_fds()

    settings = (f"num_steps={num_steps}", "rollout.num_actors=2", "max_policy_lag=1")
    with fake_run(tmp_path, tiny_model_dir, *settings) as run:
        after, found = run.watch.after, {}

        def watched(step, metrics):
            after(step, metrics)
            if step in (warm, num_steps):
                found[step] = state()

        run.watch.after = watched
        run.train()
        assert run.roles.rollout.call(RolloutActor.version) == [num_steps] * 2
        modules = ray.get(run.roles.rollout._actor.__ray_call__.remote(lambda fleet: {*sys.modules}))
        assert not modules & {"torch", "actors.rollout"}  # it hands on what it does not look at
    assert [event["step"] for event in events(tmp_path) if "metrics" in event] == list(range(1, num_steps + 1))
    (rss, store, files), (rss_end, store_end, files_end) = found[warm], found[num_steps]
    slope = (rss_end - rss) / (num_steps - warm)
    assert slope < 0.1, f"{slope} MiB a step"
    assert store_end <= store + 1, (store, store_end)
    assert files_end <= files + 4, (files, files_end)
    size = (tmp_path / "run/events.jsonl").stat().st_size
    assert size < num_steps * 2_000
    seen(f"driver {1024 * slope:+.0f} KiB a step, store {store_end - store:+.1f} MiB, open files {files_end - files:+d}")


@pytest.mark.scorecard("R65")
def test_ten_thousand_steps_make_a_small_log(tmp_path, seen):
    from rayllm.config.base import load_config
    from rayllm.config.tokenizer import TokenizerConfig
    from rayllm.report.run import Run

    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    keys = [f"run_dir={tmp_path / 'run'}", f"documents={tmp_path / 'd.jsonl'}"]
    with Run("tokenizer", load_config(TokenizerConfig, None, keys)) as run:
        metrics = {f"group/metric_{n}": 0.123456789 for n in range(30)}
        for step in range(10_000):
            run.log(step, metrics)
    total = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert total < 20 << 20
    seen(f"{total / 2**20:.0f} MiB of metrics, 30 of them in each of 10,000 lines; Ray's logs turn over at 32 MiB")


@pytest.mark.scorecard("R06")
def test_an_engine_that_fails_at_its_start_is_told_with_its_own_words(local_ray, tmp_path, tiny_model_dir, arm, seen):
    folder = arm(Fault("rollout.init", "raise"))
    began = time.monotonic()
    arguments = {"model_dir": str(tiny_model_dir), "engine": {}, "seed": 0}
    group = ActorGroup(Role("rollout", 1, CPUS, 0), FakeEngineActor, lambda rank: arguments)
    try:
        with pytest.raises(RuntimeError, match=r"rollout: .*(.|\n)*a fault on purpose at rollout.init"):
            group.call(RolloutActor.info)
    finally:
        group.stop()
    assert len(struck(folder)) == 1
    seen("the run fails with the engine's own error", detected=time.monotonic() - began)
