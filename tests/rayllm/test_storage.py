"""Run folders on shared storage: a folder, and S3 by moto's server."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from rayllm.checkpoints import Checkpoints
from rayllm.config.base import load_config
from rayllm.config.sft import SftConfig
from rayllm.config.tokenizer import TokenizerConfig
from rayllm.errors import InputError
from rayllm.report.run import Run
from rayllm.storage import Storage, StorageError, StoredRun, fetch_inputs
from tests.rayllm.test_checkpoints import flip, save


def s3_server(folder: Path):
    """moto's server, which may be installed anywhere; yields its address."""
    command = shutil.which("moto_server")
    if command is None:
        pytest.skip("no moto_server on the PATH: pip install 'moto[s3,server]' in an environment of its own")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    server = subprocess.Popen(
        [command, "-H", "127.0.0.1", "-p", str(port)], cwd=folder, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, "moto_server did not come up"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    yield from s3_server(tmp_path_factory.mktemp("moto"))


@pytest.fixture(params=["folder", "s3"])
def address(request, tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if request.param == "folder":
        return str(tmp_path / "nfs/project")
    endpoint = request.getfixturevalue("s3")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anyone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    bucket = f"bucket-{abs(hash(str(tmp_path)))}"
    from pyarrow import fs

    fs.S3FileSystem(endpoint_override=endpoint, allow_bucket_creation=True).create_dir(bucket)
    return f"s3://{bucket}/project"


def spoil(storage: Storage, name: str) -> None:
    with storage._fs.open_output_stream(f"{storage._root}/{name}") as stream:
        stream.write(b"?")


def loaded(folder: Path, documents: Path, address: str, *overrides: str):
    settings = [f"run_dir={folder}", f"documents={documents}", f"storage_path={address}/tokenizer", *overrides]
    return load_config(TokenizerConfig, None, settings)


@pytest.fixture
def documents(tmp_path) -> Path:
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "a"}\n')
    return path


def work(run: Run) -> None:
    with run:
        run.log(1, {"loss": 0.5})
        run.model_dir.mkdir()
        (run.model_dir / "config.json").write_text("{}")
        (run.model_dir / "weights").write_bytes(os.urandom(1000))
        run.finish({"loss": 0.5})


def test_a_finished_run_is_done_on_another_cluster_too(tmp_path, documents, address):
    first = Run("tokenizer", loaded(tmp_path / "here", documents, address))
    work(first)
    there = tmp_path / "there"
    again = Run("tokenizer", loaded(there, documents, address))
    assert again.done and again.record["model"]["id"] == first.record["model"]["id"]
    for name in ("model/weights", "events.jsonl", "config.yaml", "model/lineage.json"):
        assert (there / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


@pytest.mark.scorecard("R58")
def test_a_run_continues_on_another_cluster_from_its_newest_whole_checkpoint(tmp_path, documents, address):
    here, there = tmp_path / "here", tmp_path / "there"
    run = Run("tokenizer", loaded(here, documents, address))
    with pytest.raises(ZeroDivisionError), run:
        checkpoints = Checkpoints(run.checkpoints_dir, keep=2)
        for step in (1, 2, 3):
            run.log(step, {"loss": 1 / step})
            save(checkpoints, step)
            run.store_checkpoint(step, keep=2)
        raise ZeroDivisionError
    stored = StoredRun(f"{address}/tokenizer", here)
    assert stored.steps() == [2, 3]
    spoil(stored.storage, "checkpoints/step-000003/policy/part")
    again = Run("tokenizer", loaded(there, documents, address))
    assert again.resuming and again.record["status"] == "failed"
    with again:
        (refused,) = again.fetch_checkpoint()
        assert "step-000003" in refused and "policy/part" in refused
        assert Checkpoints(again.checkpoints_dir, keep=2).newest()[0] == 2
        assert [json.loads(line)["step"] for line in (there / "events.jsonl").read_text().splitlines()] == [1, 2, 3]
    # The first cluster's own copy of 3 is whole, so nothing is fetched; a damaged one is fetched anew.
    back = Run("tokenizer", loaded(here, documents, address))
    assert back.fetch_checkpoint() == [] and Checkpoints(back.checkpoints_dir, keep=2).newest()[0] == 3
    flip(here / "checkpoints/step-000003")
    flip(here / "checkpoints/step-000002")
    assert len(back.fetch_checkpoint()) == 1
    checkpoints = Checkpoints(back.checkpoints_dir, keep=2)
    assert checkpoints.newest()[0] == 2 and "step-000003" in checkpoints.refused[0]


def test_a_checkpoint_that_goes_while_it_is_copied_arrives_whole(tmp_path, documents, address, monkeypatch):
    """Workers go on while the driver copies, and remove their older checkpoints."""
    push = StoredRun.push
    run = Run("tokenizer", loaded(tmp_path / "here", documents, address))

    def push_slowly(stored: StoredRun) -> None:
        push(stored)
        shutil.rmtree(run.checkpoints_dir / "step-000004", ignore_errors=True)

    monkeypatch.setattr(StoredRun, "push", push_slowly)
    with run:
        save(Checkpoints(run.checkpoints_dir, keep=2), 4)
        run.store_checkpoint(4, keep=2)
    assert StoredRun(f"{address}/tokenizer", tmp_path).steps() == [4]
    assert list(run.checkpoints_dir.glob("s*")) == []


def test_a_fresh_start_leaves_nothing_of_the_run_before(tmp_path, documents, address):
    run = Run("tokenizer", loaded(tmp_path / "here", documents, address))
    with run:
        save(Checkpoints(run.checkpoints_dir, keep=2), 7)
        run.store_checkpoint(7, keep=2)
    other = ["vocab_size=300", "overwrite=true"]
    with pytest.raises(InputError, match="other settings or inputs .*vocab_size"):
        Run("tokenizer", loaded(tmp_path / "there", documents, address, "vocab_size=300"))
    with Run("tokenizer", loaded(tmp_path / "there", documents, address, *other)) as again:
        assert not again.resuming and again.fetch_checkpoint() == []
        assert StoredRun(f"{address}/tokenizer", tmp_path).steps() == []


def test_a_folder_of_something_else_is_left_alone(tmp_path, documents, address):
    precious = tmp_path / "thesis.tex"
    precious.write_text("precious")
    storage = Storage(f"{address}/tokenizer")
    storage.put(precious, "thesis.tex")
    run = Run("tokenizer", loaded(tmp_path / "here", documents, address))
    with pytest.raises(InputError, match="is not empty and holds no run"), run:
        pass
    assert storage.names() == {"thesis.tex"}


def test_inputs_come_from_storage_and_are_compared_with_what_was_stored(tmp_path, documents, address):
    if "://" not in address:
        address = f"file://{address}"
    first = Run("tokenizer", loaded(tmp_path / "here", documents, address))
    work(first)
    storage = Storage(f"{address}/tokenizer")
    data = tmp_path / "demonstrations.jsonl"
    data.write_text('{"prompt": "a", "response": "b"}\n')
    Storage(address).put(data, "demonstrations.jsonl")
    settings = [f"run_dir={tmp_path}/sft", f"model={address}/tokenizer/model", f"data={address}/demonstrations.jsonl"]
    config = fetch_inputs(load_config(SftConfig, None, settings)).config
    assert config.model.name == "model" and config.model.is_relative_to(tmp_path / "cache")
    assert (config.model / "weights").read_bytes() == (first.model_dir / "weights").read_bytes()
    assert Path(str(config.data)).read_text() == data.read_text()
    spoil(storage, "model/weights")
    fetch_inputs(load_config(SftConfig, None, settings))  # what is here already is whole
    (config.model / "weights").unlink()
    with pytest.raises(InputError, match="model: .*model/weights is not what was stored"):
        fetch_inputs(load_config(SftConfig, None, settings))
    settings[1] = f"model={address}/nothing/model"
    with pytest.raises(InputError, match="model: .*nothing/model"):
        fetch_inputs(load_config(SftConfig, None, settings))


@pytest.mark.scorecard("R33")
def test_storage_that_is_out_of_reach_stops_a_run_only_after_a_while(tmp_path, documents, monkeypatch):
    address = tmp_path / "nfs"
    run = Run("tokenizer", loaded(tmp_path / "here", documents, str(address)))
    with pytest.raises(StorageError, match=r"4 copies in a row to storage_path=\S+ failed"), run:
        run.store_checkpoint(1, keep=2)  # not there any more: a newer one is
        checkpoints = Checkpoints(run.checkpoints_dir, keep=9)
        save(checkpoints, 1)
        run.store_checkpoint(1, keep=2)
        shutil.rmtree(address)
        address.write_text("no folder")
        for step in (2, 3, 4, 5):
            save(checkpoints, step)
            run.store_checkpoint(step, keep=2)
    notes = (tmp_path / "here/events.jsonl").read_text()
    assert notes.count("storage_path: ") >= 4


def test_a_run_goes_on_from_its_own_checkpoint_while_storage_is_out_of_reach(tmp_path, monkeypatch):
    def out_of_reach(self: Storage, below: str = "") -> set[str]:
        raise StorageError(f"{self.address}: no answer")

    stored = StoredRun(str(tmp_path / "nfs"), tmp_path)
    monkeypatch.setattr(Storage, "names", out_of_reach)
    with pytest.raises(StorageError):
        stored.pull_checkpoint(tmp_path / "checkpoints")
    save(Checkpoints(tmp_path / "checkpoints", keep=2), 1)
    (told,) = stored.pull_checkpoint(tmp_path / "checkpoints")
    assert "nfs" in told


def test_a_wrong_address_is_the_users(tmp_path, documents):
    with pytest.raises(InputError, match="storage_path: nowhere://x/tokenizer"):
        Run("tokenizer", loaded(tmp_path / "here", documents, "nowhere://x"))
