"""Jobs on clusters that were started without us: submitted with a token, stopped, waiting, under Slurm."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from ray.job_submission import JobSubmissionClient

from tests.conftest import heed_ctrl_c
from tests.jobs.conftest import ROOT, TINY, rayllm

BIN = Path(sys.executable).parent
TOKEN = "7e57" * 16


@dataclass(frozen=True)
class Cluster:
    gcs: str
    dashboard: str
    env: dict[str, str]
    """Of a client that may use it."""

    def ray(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """`ray ... --address`."""
        command = [str(BIN / "ray"), *arguments[:2], "--address", self.dashboard, *arguments[2:]]
        env = {**self.env, **changes}
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=env)


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Ray's fixed default of the agent's port may be taken by any connection of this machine."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def environment(home: Path) -> dict[str, str]:
    """Of a machine of its own: no token, no mode, Ray and Python on the path."""
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    quick = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}  # Ray waits for a stopped node to fall idle, up to 30 s
    return {**kept, **quick, "PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(home), "TMPDIR": "/tmp"}


def start_head(folder: Path, *options: str, gcs: int | None = None, **changes: str) -> Iterator[Cluster]:
    """`ray start --head` with token authentication; ends with all its processes. ``changes`` are of its environment."""
    dashboard, agent, free = free_ports(3)
    gcs = gcs or free
    short = tempfile.mkdtemp(prefix="rt-", dir="/tmp")  # paths of sockets must be short
    env = {**environment(folder / "home"), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    command = [
        str(BIN / "ray"), "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--temp-dir={short}", "--disable-usage-stats",
        *options,
    ]  # fmt: skip
    with (folder / "head.log").open("w") as out:
        head = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**env, "RAY_JOB_STOP_WAIT_TIME_S": "60", **changes}
        )
    cluster = Cluster(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", env)

    def answers() -> bool:
        assert head.poll() is None, (folder / "head.log").read_text()
        try:  # refused until the agent is up
            client = JobSubmissionClient(cluster.dashboard, headers={"Authorization": f"Bearer {TOKEN}"})
            client.submit_job(entrypoint="true")
        except Exception:  # whatever the client raises while nobody listens
            return False
        return True

    try:
        wait_for(answers, 90)
        yield cluster
    finally:
        started = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        head.wait(timeout=60)
        for process in psutil.wait_procs(started, timeout=10)[1]:
            process.kill()
        shutil.rmtree(short, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two CPUs, a dashboard, token authentication."""
    yield from start_head(tmp_path_factory.mktemp("ray"), "--num-cpus=2")


def tokenizer_arguments(tiny_run, run_dir: Path) -> list[str]:
    source, _ = tiny_run
    return ["tokenizer", "--config", str(source / "tokenizer/config.yaml"), f"run_dir={run_dir}"]


def test_a_job_runs_on_a_cluster_and_returns_its_status(cluster, tiny_run, tmp_path):
    arguments = [*tokenizer_arguments(tiny_run, tmp_path / "run"), "--address", cluster.dashboard]
    done = rayllm(*arguments, env=cluster.env)
    assert done.returncode == 0, done.stdout
    assert "✓ tokenizer" in done.stdout  # the job's own log
    assert record(tmp_path / "run")["status"] == "done"
    wrong = rayllm(*arguments, "vocab_size=400", "overwrite=false", env=cluster.env)
    assert wrong.returncode == 2 and "overwrite=true" in " ".join(wrong.stdout.split())
    listed = cluster.ray("job", "list").stdout
    assert "SUCCEEDED" in listed and "FAILED" in listed


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"RAY_AUTH_MODE": "", "RAY_AUTH_TOKEN": TOKEN}, "export RAY_AUTH_MODE=token"),  # Ray does not send it then
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": ""}, "~/.ray/auth_token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, "does not know this token"),
    ],
)
@pytest.mark.scorecard("S07", tier="full")
def test_without_the_token_a_job_is_refused(cluster, tiny_run, tmp_path, changes, advice):
    env = {name: value for name, value in {**cluster.env, **changes}.items() if value}
    done = rayllm(*tokenizer_arguments(tiny_run, tmp_path / "run"), "--address", cluster.dashboard, env=env)
    assert done.returncode == 2 and advice in " ".join(done.stdout.split()), done.stdout
    assert "Traceback" not in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.scorecard("S07", "R62", tier="full")
def test_a_driver_is_refused_without_the_token(cluster, tiny_run, tmp_path):
    source, _ = tiny_run
    env = cluster.env | {"RAY_ADDRESS": cluster.gcs, "RAY_AUTH_TOKEN": "0" * 64}
    done = rayllm("sft", "--config", source / "sft/config.yaml", f"run_dir={tmp_path / 'run'}", env=env)
    assert done.returncode == 2 and "export RAY_AUTH_MODE=token" in " ".join(done.stdout.split()), done.stdout


@pytest.mark.scorecard("S07", tier="full")
def test_the_docs_way_to_a_token(cluster, tmp_path):
    env = environment(tmp_path / "home") | {"RAY_AUTH_MODE": "token"}
    path = tmp_path / "home/.ray/auth_token"
    made = subprocess.run([str(BIN / "ray"), "get-auth-token", "--generate"], capture_output=True, text=True, env=env)
    assert made.returncode == 0 and path.read_text().strip() in made.stdout
    path.chmod(0o600)
    command = [str(BIN / "ray"), "job", "list", "--address", cluster.dashboard]
    assert subprocess.run(command, capture_output=True, env=env).returncode != 0  # it is not the cluster's
    path.write_text(TOKEN)
    assert subprocess.run(command, capture_output=True, env=env).returncode == 0


def test_the_entry_points_work_under_ray_job_submit(cluster, tiny_run, tmp_path):
    source, _ = tiny_run
    done = cluster.ray(
        "job", "submit", "--working-dir", ".", "--runtime-env-json", '{"excludes": [".git", ".venv", "runs"]}', "--",
        "python", "-m", "jobs.label", "--config", str(source / "label/config.yaml"), f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "✓ label" in done.stdout
    expected = pq.read_table(source / "label/rankings.parquet")
    assert pq.read_table(tmp_path / "run/rankings.parquet").equals(expected)


def sizes(source: Path, folder: Path) -> dict[str, list[str]]:
    """The least that a job of each command does; those of the pipeline are submitted there."""
    model, world, label = f"model={source / 'sft/model'}", source / "world", source / "label"
    for name, question in (("train", "What color is snow?"), ("held", "What color is grass?")):
        steps = [{"prompt": question, "completions": ["White."], "labels": [i % 2 == 0]} for i in range(12)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    learner = ["batch_size=4", "num_epochs=0.5", "workers.num_workers=1"]
    prompts = [f"prompts={world / 'prompts_train.parquet'}", "num_prompts=8", "rollout.max_new_tokens=8"]
    return {
        "preference": [model, f"preferences={label / 'rankings.parquet'}", *learner],
        "process-reward-model": [model, f"steps={folder / 'train.jsonl'}", f"heldout_steps={folder / 'held.jsonl'}", *learner],
        "reward-report": [f"model={source / 'reward_model/model'}", f"rankings={label / 'heldout_rankings.parquet'}"],
        "label": ["labeler=reward-model", model, f"reward_model={source / 'reward_model/model'}", *prompts,
                  "rollout.cpus_per_actor=0.5", "reward.cpus_per_actor=0.5"],
        "online-preference": [model, "num_rounds=1", *(f"label.{words}" for words in prompts),
                              *(f"preference.{words}" for words in learner), "preference.heldout_fraction=0.3",
                              f"label.heldout_prompts={world / 'prompts_label.parquet'}",
                              "label.num_heldout_prompts=4", "label.num_prompts=24"],
    }  # fmt: skip


@pytest.mark.parametrize("command", ["preference", "process-reward-model", "reward-report", "label", "online-preference"])
def test_every_job_runs_on_a_cluster(cluster, tiny_run, tmp_path, command):
    arguments = sizes(tiny_run[0], tmp_path)[command]
    done = rayllm(command, f"run_dir={tmp_path / 'run'}", *arguments, "--address", cluster.dashboard, env=cluster.env)
    assert done.returncode == 0, done.stdout
    jobs_done = [record(path.parent)["status"] for path in (tmp_path / "run").rglob("run.json")]
    assert jobs_done == ["done"] * (2 if command == "online-preference" else 1)


def follow(cluster: Cluster, *arguments: str) -> subprocess.Popen:
    """`rayllm ... --address` that goes on."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *arguments, "--address", cluster.dashboard],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env={**cluster.env, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        preexec_fn=heed_ctrl_c,
    )  # fmt: skip


@pytest.mark.scorecard("R63", tier="full")
def test_a_job_that_waits_says_for_what_and_ctrl_c_ends_it(cluster, tiny_run, tmp_path):
    source, _ = tiny_run
    arguments = ["sft", "--config", str(source / "sft/config.yaml"), f"run_dir={tmp_path / 'run'}"]
    client = follow(cluster, *arguments, "workers.gpus_per_worker=1", "placement.wait_s=600")
    assert client.stdout is not None
    lines = iter(client.stdout.readline, "")
    assert any("waiting for nodes: the roles need 2 GPU (workers 2 x 1), the cluster has 0" in line for line in lines)
    client.send_signal(signal.SIGINT)
    client.communicate(timeout=120)
    assert client.returncode == 130
    wait_for(lambda: record(tmp_path / "run")["status"] == "stopped", 60)
    wait_for(lambda: not [job for job in jobs(cluster) if job.status == "RUNNING"], 60)


def test_a_pipeline_is_a_job_a_stage_that_is_tried_again_and_saves_when_it_is_stopped(cluster, tiny_run, tmp_path):
    source, _ = tiny_run
    run_dir = tmp_path / "run"
    for stage in ("world", "tokenizer"):
        shutil.copytree(source / stage, run_dir / stage)
    before = {job.submission_id for job in jobs(cluster)}
    arguments = ["pipeline", "--config", str(TINY), f"run_dir={run_dir}", "stages=[tokenizer,pretrain]"]
    client = follow(cluster, *arguments, "pretrain.num_steps=3000", "pretrain.checkpoint.every_steps=20")

    def saved() -> set[str]:
        assert client.poll() is None, client.communicate()[0]
        return {path.name for path in (run_dir / "pretrain/checkpoints").glob("step-*")}

    wait_for(saved, 300)
    for process in [p for p in psutil.process_iter(["cmdline"]) if "stages=[pretrain]" in (p.info["cmdline"] or [])]:
        process.kill()  # the driver of the second job
    reached = max(saved())
    wait_for(lambda: max(saved()) > reached, 300)
    (running,) = [job for job in jobs(cluster) if job.status == "RUNNING"]
    assert cluster.ray("job", "stop", running.submission_id).returncode == 0
    output, _ = client.communicate(timeout=120)
    assert client.returncode == 143, output
    assert "1/1 tokenizer: unchanged, skipped" in output and "pretrain: attempt 1 of 2 failed" in output
    assert "stopped; the same command continues" in output
    assert record(run_dir / "pretrain")["status"] == "stopped"
    new = [job.status for job in jobs(cluster) if job.submission_id not in before]
    assert sorted(new) == ["FAILED", "STOPPED", "SUCCEEDED"]
    assert "was stopped" in cluster.ray("job", "status", running.submission_id).stdout
    assert "num_steps = 3000" in " ".join(cluster.ray("job", "logs", running.submission_id).stdout.split())


def jobs(cluster: Cluster) -> list:
    return JobSubmissionClient(cluster.dashboard, headers={"Authorization": f"Bearer {TOKEN}"}).list_jobs()


def test_an_address_without_a_cluster_is_one_line(tmp_path):
    done = rayllm("world", f"run_dir={tmp_path / 'run'}", "--address", "http://127.0.0.1:9")
    assert done.returncode == 2 and "did not take the job" in done.stdout


def test_serving_is_not_submitted(tiny_run):
    source, _ = tiny_run
    done = rayllm("serve", f"model={source / 'ppo/model'}", "--address", "http://127.0.0.1:9")
    assert done.returncode == 2 and "docs/cluster.md" in done.stdout


SCONTROL = "#!/bin/sh\necho node0\necho node1\n"
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
[[ $1 == hostname ]] && { echo 127.0.0.1; exit; }
exec "$@"
"""


def test_the_slurm_script_makes_a_cluster_of_its_nodes_and_runs_a_job(tiny_run, tmp_path):
    """Two nodes of one CPU each, both this machine: Slurm's two commands are stood in for, the rest is real."""
    source, _ = tiny_run
    (tmp_path / "bin").mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    job_id = str(os.getpid())
    env = environment(tmp_path / "home") | {
        "SLURM_JOB_ID": job_id, "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_CPUS_PER_TASK": "1", "PYTHONPATH": str(ROOT), "RAY_AUTH_TOKEN": TOKEN,
    }  # fmt: skip
    env["PATH"] = f"{tmp_path / 'bin'}:{env['PATH']}"
    folder = Path(f"/tmp/ray-{job_id}")
    arguments = ["pretrain", "--config", str(source / "pretrain/config.yaml"), f"run_dir={tmp_path / 'run'}", "num_steps=4"]
    try:
        done = subprocess.run(
            [str(ROOT / "cluster/slurm.sh"), *arguments], capture_output=True, text=True, env=env, timeout=300
        )
        logs = "".join(path.read_text() for path in tmp_path.glob("ray-*.log"))
        assert done.returncode == 0, done.stdout + done.stderr + logs
        assert "✓ pretrain" in done.stdout  # its two ranks ask for a CPU each: one node alone has not got them
        assert record(tmp_path / "run")["status"] == "done"
        wait_for(lambda: not processes_of(folder), 60)
    finally:
        for process in processes_of(folder):
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Ray's, whose command lines name their session."""
    return [p for p in psutil.process_iter(["cmdline"]) if f"{folder}/" in " ".join(p.info["cmdline"] or [])]
