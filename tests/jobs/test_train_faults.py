"""A Ray Train job (SFT, two workers) that loses a worker, is stopped, or changes its number of workers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from actors.trainer import fit
from jobs.sft import prepare
from rayllm.checkpoints import Checkpoints
from rayllm.config.base import load_config
from rayllm.config.sft import SftConfig
from rayllm.data.files import write_parquet
from rayllm.report.run import Run

STEPS = 10
NAMES = ["Paris", "Rome", "Oslo", "Cairo", "Lima", "Quito", "Delhi", "Seoul"]


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"What is number {n}?"},
                      {"role": "assistant", "content": f"Number {n} is {NAMES[n % 8]}."}]}
        for n in range(60)
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("data") / "demonstrations.parquet"
    write_parquet(rows, path)
    return path


class Trained:
    """One attempt after another at one SFT run, in its folder."""

    def __init__(self, folder: Path, model: Path, data: Path) -> None:
        self.folder = folder
        self.settings = [
            f"run_dir={folder}", f"model={model}", f"data={data}", "batch_size=4", "heldout_fraction=0.2", "eval_every=1",
            "checkpoint.every_steps=2", "checkpoint.keep=20", "optimizer.learning_rate=1e-3", "workers.cpus_per_worker=0.5",
        ]  # fmt: skip

    def train(self, *overrides: str, stop_at: int | None = None) -> list[str]:
        """Train to the end, or until it is asked to stop because ``stop_at`` steps are done; returns the notes."""
        run = Run("sft", load_config(SftConfig, None, [*self.settings, *overrides]))
        notes, reached = [], [0]

        def on_event(event) -> None:
            notes.extend(event.notes)
            if event.restarted:
                run.rewind(event.step, event.history)
            if event.metrics:
                run.log(event.step, event.metrics)
                reached[0] = event.step

        with run:
            task = prepare(run, run.config)
            task.num_steps = STEPS
            fit(task, run.dir, on_event, stop=lambda: stop_at is not None and reached[0] >= stop_at)
        return notes

    @property
    def curve(self) -> dict[int, float]:
        """Held-out loss after every step; each step stands there once."""
        events = [json.loads(line) for line in (self.folder / "events.jsonl").read_text().splitlines()]
        measured = [event for event in events if "eval/loss" in event.get("metrics", {})]
        steps = [event["step"] for event in measured]
        assert steps == sorted(set(steps)), steps
        return {event["step"]: event["metrics"]["eval/loss"] for event in measured}

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints", keep=20)


@pytest.fixture(scope="module")
def undisturbed(local_ray, tmp_path_factory, tiny_model_dir, demonstrations) -> dict[int, float]:
    trained = Trained(tmp_path_factory.mktemp("undisturbed") / "run", tiny_model_dir, demonstrations)
    assert trained.train("workers.num_workers=2") == []
    assert sorted(trained.curve) == list(range(STEPS + 1)) and trained.curve[STEPS] < trained.curve[0]
    assert trained.checkpoints.steps() == [2, 4, 6, 8, 10]
    return trained.curve


def train_workers() -> list[psutil.Process]:
    """Of this process's Ray, oldest first."""
    children = psutil.Process().children(recursive=True)
    return sorted((p for p in children if "RayTrainWorker" in " ".join(p.cmdline())), key=lambda p: p.create_time())


def kill_worker_after(checkpoint: Path, killed: list[int]) -> None:
    """SIGKILL one of two workers once the checkpoint is there."""
    deadline = time.monotonic() + 120
    while not checkpoint.is_dir() and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = train_workers()
    os.kill(workers[-1].pid, signal.SIGKILL)
    killed.append(len(workers))


def test_a_lost_worker_is_replaced_and_the_curve_is_that_of_the_undisturbed_run(
    undisturbed, tmp_path, tiny_model_dir, demonstrations
):
    trained, killed = Trained(tmp_path / "run", tiny_model_dir, demonstrations), []
    first = tmp_path / "run/checkpoints/step-000002"
    killer = threading.Thread(target=kill_worker_after, args=(first, killed))
    killer.start()
    trained.train("workers.num_workers=2")
    killer.join()
    assert killed == [2]
    assert trained.curve == undisturbed  # equal, not close: float32 on CPU
    assert (tmp_path / "run/model/model.safetensors").is_file()


def test_two_workers_one_and_two_again_learn_the_same(undisturbed, tmp_path, tiny_model_dir, demonstrations):
    trained = Trained(tmp_path / "run", tiny_model_dir, demonstrations)
    trained.train("workers.num_workers=2", "learner.zero_stage=1", stop_at=3)
    at = trained.checkpoints.newest()[0]
    assert max(trained.curve) == at >= 3  # saved where it stopped, whatever checkpoint.every_steps says
    assert not (tmp_path / "run/model").exists()
    trained.train("workers.num_workers=1", "learner.zero_stage=3", stop_at=at + 2)
    newest = trained.checkpoints.newest()[0]
    # A file of another step in the newest: the one before is used, and that is said.
    damaged = tmp_path / f"run/checkpoints/step-{newest:06d}/part-0-0.safetensors"
    shutil.copy(trained.checkpoints.at(at) / "part-0-0.safetensors", damaged)
    notes = trained.train("workers.num_workers=2")
    assert str(damaged) in notes[0] and notes[-1].startswith("continues from")
    curve = trained.curve
    assert sorted(curve) == list(range(STEPS + 1))
    assert curve == pytest.approx(undisturbed, abs=1e-5)
