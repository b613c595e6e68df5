"""Stages on clusters that share nothing but an S3 bucket (moto's server)."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from rayllm.storage import Storage, StorageError, StoredRun
from tests.jobs.conftest import TINY, rayllm
from tests.jobs.test_pipeline import events, record, start, wait_for
from tests.rayllm.test_storage import s3_server


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """Address of an empty bucket; what this process starts finds it too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anyone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    from pyarrow import fs

    for endpoint in s3_server(tmp_path):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        fs.S3FileSystem(endpoint_override=endpoint, allow_bucket_creation=True).create_dir("shared")
        yield "s3://shared"


def stored_steps(address: str) -> list[int]:
    try:
        return StoredRun(address, Path("/nowhere")).steps()
    except StorageError:
        return []


@pytest.mark.long
@pytest.mark.scorecard("R27", "R58", tier="full")
def test_a_stage_takes_its_inputs_from_s3_stops_on_one_cluster_and_ends_on_another(tiny_run, tmp_path, bucket):
    source, _ = tiny_run
    before = tmp_path / "pretrain"
    shutil.copytree(source / "pretrain", before)
    StoredRun(f"{bucket}/pretrain", before).push()
    Storage(bucket).put(source / "world/demonstrations.parquet", "demonstrations.parquet")

    def sft(cluster: str) -> list[str]:
        return ["sft", "--config", str(source / "sft/config.yaml"), f"run_dir={tmp_path / cluster}",
                f"storage_path={bucket}/sft", f"model={bucket}/pretrain/model", "num_epochs=3", "checkpoint.every_steps=3",
                f"data={bucket}/demonstrations.parquet"]  # fmt: skip

    one = start(sft("one"))
    wait_for(lambda: stored_steps(f"{bucket}/sft") or one.poll() is not None, 300)
    one.send_signal(signal.SIGTERM)
    output, _ = one.communicate(timeout=120)
    assert one.returncode == 143, output
    reached = stored_steps(f"{bucket}/sft")[-1]
    assert record(tmp_path / "one")["status"] == "stopped" and reached >= 3
    shutil.rmtree(tmp_path / "one")
    two = rayllm(*sft("two"))
    assert two.returncode == 0 and "resumes in" in two.stdout, two.stdout
    steps = [event["step"] for event in events(tmp_path / "two") if "eval/loss" in event.get("metrics", {})]
    assert steps == sorted(set(steps)) and steps[0] == 0
    three = rayllm(*sft("three"))
    assert three.returncode == 0 and "is done and unchanged" in three.stdout, three.stdout
    model = json.loads((tmp_path / "two/model/lineage.json").read_text())
    assert json.loads((tmp_path / "three/model/lineage.json").read_text())["id"] == model["id"]
    assert os.path.samefile(model["parents"][0]["path"], next((tmp_path / "cache/rayllm").glob("*/model")))


def test_the_stages_of_a_pipeline_meet_on_storage(tmp_path, bucket):
    """Each on a cluster of its own, with a disk of its own."""

    def pipeline(cluster: str, stage: str):
        return rayllm("pipeline", "--config", TINY, f"run_dir={tmp_path / cluster}", f"storage_path={bucket}/run", f"stages=[{stage}]")

    one = pipeline("one", "world")
    assert one.returncode == 0, one.stdout
    two = pipeline("two", "tokenizer")
    assert two.returncode == 0 and (tmp_path / "two/tokenizer/model/tokenizer.json").is_file(), two.stdout
    three = pipeline("three", "world,tokenizer")
    assert three.returncode == 0 and "skipped 2 of 2 stages" in three.stdout, three.stdout
