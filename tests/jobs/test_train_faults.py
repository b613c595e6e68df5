"""A Ray Train job (SFT, two workers) that loses a worker, is stopped, or changes its number of workers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.trainer import fit
from jobs.sft import prepare
from rayllm import faults
from rayllm.checkpoints import Checkpoints
from rayllm.config.base import load_config
from rayllm.config.sft import SftConfig
from rayllm.data.files import write_parquet
from rayllm.faults import Fault, flip_bytes, plan, struck
from rayllm.report.run import Run

STEPS = 16
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


@pytest.mark.long
@pytest.mark.scorecard("R07", "R29", "R57", tier="full")
def test_a_lost_worker_a_damaged_checkpoint_and_fewer_workers_leave_the_curve_as_it_was(
    local_ray, tmp_path, tiny_model_dir, demonstrations, monkeypatch
):
    undisturbed = Trained(tmp_path / "undisturbed", tiny_model_dir, demonstrations)
    assert undisturbed.train("workers.num_workers=2") == []
    expected = undisturbed.curve
    assert sorted(expected) == list(range(STEPS + 1)) and expected[STEPS] < expected[0]
    assert undisturbed.checkpoints.steps() == list(range(2, STEPS + 1, 2))

    trained = Trained(tmp_path / "run", tiny_model_dir, demonstrations)
    plan(tmp_path / "faults", [Fault("trainer.step", "kill", passes=4, rank=1)])  # the checkpoint of 2 is there
    monkeypatch.setattr(faults, "_planned", faults._Planned(tmp_path / "faults"))
    trained.train("workers.num_workers=2", stop_at=5)
    assert [fell.rank for fell in struck(tmp_path / "faults")] == [1]
    at = trained.checkpoints.newest()[0]
    assert max(trained.curve) == at >= 5  # saved where it stopped, whatever checkpoint.every_steps says
    assert trained.curve == {step: loss for step, loss in expected.items() if step <= at}  # equal, not close
    assert not (tmp_path / "run/model").exists()

    # Other bytes in a file of the newest checkpoint: the one before is used, and that is said.
    damaged = flip_bytes(trained.checkpoints.at(at) / "part-0-0.safetensors")
    notes = trained.train("workers.num_workers=1", "learner.zero_stage=3")
    assert f"{damaged} is not what was written" in notes[0] and notes[-1].startswith("continues from")
    assert sorted(trained.curve) == list(range(STEPS + 1))
    assert trained.curve == pytest.approx(expected, abs=1e-5)
    assert (tmp_path / "run/model/model.safetensors").is_file()
