"""PPO on real engines that are lost and that come while it runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.conftest import heed_ctrl_c
from tests.jobs.conftest import ROOT, rayllm
from tests.jobs.test_cluster import Cluster, environment, free_ports, record, start_head

WITHIN_S = 240.0
FAKE_HEAD_ID = "f" * 51 + "00000"
LEARNED = ("eval/gold", "eval/rewards", "objective/rewards", "objective/kl", "loss/value", "loss/policy",
           "policy/grad_norm", "response/length_mean")  # fmt: skip


def events(folder: Path) -> list[dict]:
    """What is written so far; the last line may be half written."""
    path = folder / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps_of(folder: Path) -> list[dict]:
    return [event for event in events(folder) if "metrics" in event]


def notes(folder: Path) -> str:
    return "\n".join(event["text"] for event in events(folder) if event.get("kind") == "note")


def wait_for(condition: Callable[[], object], job: subprocess.Popen) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def start(arguments: list[str], **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, preexec_fn=heed_ctrl_c,
        env={**(env or os.environ), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def engines_of(job: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(job.pid).children(recursive=True)
    return [child for child in children if child.name().startswith("ray::RolloutAct")]


@pytest.mark.long
@pytest.mark.scorecard("R01", "R02", tier="full")
def test_losing_one_engine_changes_nothing_losing_both_ends_it_and_the_same_command_continues(tiny_run, tmp_path):
    source, _ = tiny_run
    run_dir = tmp_path / "run"
    arguments = ["ppo", "--config", str(source / "ppo/config.yaml"), f"run_dir={run_dir}", "rollout.num_actors=2",
                 "rollout.cpus_per_actor=0.2", "rollout.max_restarts=0"]  # fmt: skip
    job = start(arguments)
    wait_for(lambda: len(steps_of(run_dir)) >= 2, job)
    first, second = engines_of(job)
    first.kill()
    wait_for(lambda: (run_dir / "checkpoints/step-000002").is_dir(), job)
    second.kill()
    output, _ = job.communicate(timeout=WITHIN_S)
    assert job.returncode == 3, output
    assert "is lost: its process ended" in notes(run_dir)
    assert "failed: rollout: 0 of at least 1 engines are up" in output and "the same command continues" in output
    assert record(run_dir)["status"] == "failed"
    again = rayllm(*arguments)
    assert again.returncode == 0, again.stdout
    undisturbed, disturbed = steps_of(source / "ppo"), steps_of(run_dir)
    assert [event["step"] for event in disturbed] == [event["step"] for event in undisturbed] == [0, 1, 2, 3, 4]
    for one, other in zip(undisturbed, disturbed, strict=True):
        for name in LEARNED:
            if name in one["metrics"]:
                assert other["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-4, abs=1e-6), (one["step"], name)


def engines_by_step(folder: Path) -> list[float]:
    return [event["metrics"].get("rollout/engines", 0.0) for event in steps_of(folder)]


@pytest.fixture
def growing_cluster(tmp_path) -> Iterator[Cluster]:
    """A head with two CPUs; nodes for engines are brought by Ray's autoscaler, at most two."""
    (gcs,) = free_ports(1)
    node = {"node_config": {}, "min_workers": 0}
    config = {
        "cluster_name": "growing", "max_workers": 2, "idle_timeout_minutes": 5, "upscaling_speed": 10.0, "docker": {},
        "provider": {
            "type": "external", "launch_multiple": True, "disable_node_updaters": True,
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "disable_launch_config_check": True, "gcs_address": f"127.0.0.1:{gcs}", "head_node_id": FAKE_HEAD_ID,
        },
        "auth": {}, "head_node_type": "ray.head.default", "cluster_synced_files": [], "file_mounts": {}, "initialization_commands": [],
        "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [], "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
        "available_node_types": {
            "ray.head.default": {**node, "max_workers": 0, "resources": {"CPU": 2}},
            "rollout": {**node, "max_workers": 2, "resources": {"CPU": 4}},
        },
    }  # fmt: skip
    path = tmp_path / "autoscaler.yaml"
    path.write_text(yaml.safe_dump(config))
    fake = {
        "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_ID,
        "RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "3000",
        "RAY_health_check_failure_threshold": "3",
    }  # fmt: skip
    options = ("--num-cpus=2", "--node-ip-address=127.0.0.1", f"--autoscaling-config={path}")
    yield from start_head(tmp_path, *options, gcs=gcs, **fake)


def nodes_of_engines(cluster: Cluster) -> list[psutil.Process]:
    """Raylets of the cluster's nodes on which engines run, the oldest first."""
    found = set()
    for process in psutil.process_iter(["name"]):
        if process.info["name"].startswith("ray::RolloutAct"):
            raylet = next(parent for parent in process.parents() if parent.name() == "raylet")
            found |= {raylet} if cluster.gcs in " ".join(raylet.cmdline()) else set()
    return sorted(found, key=lambda raylet: raylet.create_time())


@pytest.mark.long
@pytest.mark.scorecard("R13", tier="full")
def test_engines_come_and_go_with_their_nodes_while_the_job_runs(growing_cluster, tiny_run, tmp_path):
    """No node for an engine: the job waits and says so. One comes, it runs; a second one comes and serves; the node of
    that goes, with what it was at, and the run goes on."""
    source, _ = tiny_run
    run_dir = tmp_path / "run"
    env = environment(tmp_path / "client") | growing_cluster.env | {"RAY_ADDRESS": growing_cluster.gcs}
    job = start(
        ["ppo", "--config", str(source / "ppo/config.yaml"), f"run_dir={run_dir}", "num_steps=2000",
         "rollout.cpus_per_actor=4", "rollout.max_engines=2", "placement.wait_s=120", "eval.every_steps=2000"],
        **env,
    )  # fmt: skip
    try:
        assert job.stdout is not None
        lines = iter(job.stdout.readline, "")
        assert any("waiting for nodes: the roles need 5.2 CPU" in line for line in lines)
        wait_for(lambda: 1.0 in engines_by_step(run_dir), job)
        wait_for(lambda: 2.0 in engines_by_step(run_dir), job)
        assert "rollout: engine 1 serves: it has the policy's weights, proved" in notes(run_dir)
        first, second = nodes_of_engines(growing_cluster)
        reached = len(steps_of(run_dir))
        second.kill()
        wait_for(lambda: "engine 1 is lost with its node" in notes(run_dir), job)
        wait_for(lambda: engines_by_step(run_dir)[reached:].count(1.0) >= 2, job)
        numbers = [event["step"] for event in steps_of(run_dir)]
        assert numbers == list(range(len(numbers)))
    finally:
        job.send_signal(signal.SIGINT)
        job.communicate(timeout=60)
