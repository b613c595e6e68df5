"""Run folders: resume, refuse, skip, lock; fingerprints and manifests."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rayllm.config.base import load_config
from rayllm.config.tokenizer import TokenizerConfig
from rayllm.errors import InputError
from rayllm.lineage import content_id, read_manifest
from rayllm.report.run import Run


@pytest.fixture
def documents(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n')
    return path


def open_run(tmp_path, documents, *overrides):
    keys = [f"run_dir={tmp_path / 'run'}", f"documents={documents}", *overrides]
    return Run("tokenizer", load_config(TokenizerConfig, None, keys))


def finish(run):
    with run:
        run.model_dir.mkdir()
        (run.model_dir / "weights").write_text("w")
        run.finish({"figure": 1.0}, model_parameters=3)


@pytest.mark.scorecard("R47", "R34")
def test_a_finished_run_is_done_until_settings_or_inputs_change(tmp_path, documents):
    finish(open_run(tmp_path, documents))
    assert open_run(tmp_path, documents).done
    with pytest.raises(InputError, match=r"other settings or inputs \(vocab_size\); use another run_dir, or overwrite"):
        open_run(tmp_path, documents, "vocab_size=400")
    documents.write_text('{"text": "b"}\n')
    with pytest.raises(InputError, match="content of documents"):
        open_run(tmp_path, documents)


def test_overwrite_moves_the_old_run_aside(tmp_path, documents):
    finish(open_run(tmp_path, documents))
    run = open_run(tmp_path, documents, "vocab_size=400", "overwrite=true")
    assert not run.done and not run.dir.exists()
    (old,) = tmp_path.glob("run.old-*")
    assert (old / "model/weights").read_text() == "w"
    assert run.moved_aside == f"the run that was here, with other vocab_size, to {old.name}"


def test_the_same_inputs_under_another_name_are_the_same_run(tmp_path, documents):
    finish(open_run(tmp_path, documents))
    moved = documents.rename(tmp_path / "renamed.jsonl")
    assert open_run(tmp_path, moved).done


def test_a_failed_run_resumes_and_says_why_it_failed(tmp_path, documents):
    with pytest.raises(RuntimeError), open_run(tmp_path, documents) as run:
        run.log(1, {"a": 1.0})
        run.log(2, {"a": 2.0})
        raise RuntimeError("out of luck")
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert (record["status"], record["error"]) == ("failed", "out of luck")
    again = open_run(tmp_path, documents)
    assert again.resuming and not again.done
    with again:
        again.rewind(1)
        again.log(2, {"a": 3.0})
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [(e["step"], e["metrics"]["a"]) for e in events] == [(1, 1.0), (2, 3.0)]


def test_a_finished_run_is_on_the_disk_before_it_says_so(tmp_path, documents, monkeypatch):
    synced, sync = [], os.fsync

    def fsync(descriptor):
        record = tmp_path / "run/run.json"
        status = json.loads(record.read_text())["status"] if record.is_file() else None
        synced.append((os.fstat(descriptor).st_ino, status))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    finish(open_run(tmp_path, documents))
    for path in (tmp_path / "run", tmp_path / "run/model", tmp_path / "run/model/weights", tmp_path / "run/model/lineage.json"):
        assert (path.stat().st_ino, "running") in synced, path


def test_a_half_written_event_of_a_killed_run_is_dropped(tmp_path, documents):
    with open_run(tmp_path, documents) as run:
        run.log(1, {"a": 1.0})
        with (run.dir / "events.jsonl").open("a") as file:
            file.write('{"t": 1, "st')
        run.rewind(5)
        run.log(2, {"a": 2.0})
    lines = (tmp_path / "run/events.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_ctrl_c_is_stopped_not_failed(tmp_path, documents):
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path, documents):
        raise KeyboardInterrupt
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "stopped"


@pytest.mark.scorecard("R36")
def test_two_processes_cannot_use_one_folder(tmp_path, documents):
    with open_run(tmp_path, documents), pytest.raises(InputError, match="in use by another process"):
        open_run(tmp_path, documents).__enter__()


def test_a_folder_that_is_no_run_is_left_alone(tmp_path, documents):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        open_run(tmp_path, documents)


@pytest.mark.scorecard("R32")
def test_a_folder_that_cannot_be_written_is_refused_before_anything_starts(tmp_path, documents, seen):
    """A file in its way, and a file system where nobody makes folders, root neither."""
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file/run", Path("/proc/run")):
        run = Run("tokenizer", load_config(TokenizerConfig, None, [f"run_dir={folder}", f"documents={documents}"]))
        with pytest.raises(InputError, match=f"run_dir: {folder} cannot be written: "), run:
            raise AssertionError("entered")
    seen("told with the folder and the system's reason, before Ray starts")


def test_a_missing_input_is_named_by_its_key(tmp_path):
    with pytest.raises(InputError, match="documents: nothing at"):
        open_run(tmp_path, tmp_path / "none.jsonl")


def test_the_manifest_names_parents_data_settings_and_every_file(tmp_path, documents):
    run = open_run(tmp_path, documents)
    run.add_data("documents", rows=1, dropped={})
    finish(run)
    manifest = read_manifest(run.model_dir)
    assert manifest["stage"] == "tokenizer" and manifest["metrics"] == {"figure": 1.0}
    assert manifest["data"][0]["sha256"] == content_id(documents) and manifest["data"][0]["rows"] == 1
    assert list(manifest["files"]) == ["weights"] and manifest["config"]["vocab_size"] == 1024
    assert content_id(run.model_dir) == manifest["id"]


@pytest.mark.scorecard("R59")
def test_a_resumed_run_has_every_metric_once(tmp_path, documents):
    run = open_run(tmp_path, documents)
    with run:
        for step in (1, 2, 3):
            run.log(step, {"loss": 1.0 / step})
        # The checkpoint is of step 4; the driver died before it wrote 4, and 3 belongs to the checkpoint as well.
        run.rewind(4, [(3, {"loss": 1.0 / 3}), (4, {"loss": 0.25})])
        run.rewind(4, [(4, {"loss": 0.25})])
        assert [event["step"] for event in read_events(run)] == [1, 2, 3, 4]
        run.log(5, {"loss": 0.2})
        run.rewind(4)
        assert [event["metrics"]["loss"] for event in read_events(run)] == [1.0, 0.5, 1 / 3, 0.25]


def read_events(run) -> list[dict]:
    return [json.loads(line) for line in (run.dir / "events.jsonl").read_text().splitlines()]
