"""`rayllm online-preference`, and with it `rayllm preference`, end to end on the tiny model."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
from transformers import AutoModelForCausalLM

from jobs.evaluate import parents_of
from rayllm.lineage import read_manifest
from rayllm.report.html import write_report
from tests.jobs.conftest import rayllm


def test_each_round_learns_from_its_own_models_answers(tiny_run, tmp_path):
    source, _ = tiny_run
    world = source / "world"
    arguments = [
        "online-preference", f"run_dir={tmp_path}", f"model={source / 'sft/model'}", "num_rounds=2",
        f"label.prompts={world / 'prompts_train.parquet'}", f"label.heldout_prompts={world / 'prompts_label.parquet'}",
        "label.num_prompts=24", "label.num_heldout_prompts=6", "label.num_responses=3",
        "label.rollout.max_new_tokens=12", "preference.batch_size=4", "preference.heldout_fraction=0.3", "preference.optimizer.learning_rate=1e-3",
        "preference.workers.num_workers=2", "preference.learner.zero_stage=2",
    ]  # fmt: skip
    done = rayllm(*arguments)
    assert done.returncode == 0, done.stdout
    ids = [read_manifest(source / "sft/model")["id"]]
    for number in (1, 2):
        folder = tmp_path / f"round-{number}"
        manifest = read_manifest(folder / "preference/model")
        assert [p["id"] for p in manifest["parents"] if p["role"] == "model"] == [ids[-1]]
        assert json.loads((folder / "label/run.json").read_text())["inputs"]["model"] == ids[-1]
        (data,) = manifest["data"]
        assert data["name"] == "preferences" and data["heldout_rows"] > 0
        ids.append(manifest["id"])
        start, *_, last = [json.loads(line)["metrics"] for line in (folder / "preference/events.jsonl").open()]
        assert abs(start["eval/kl"]) < 1e-4 and abs(start["eval/loss"] - 0.6931) < 1e-3
        assert {"eval/accuracy", "eval/margin", "eval/chosen_rewards", "eval/rejected_rewards"} <= last.keys()
        AutoModelForCausalLM.from_pretrained(folder / "preference/model")
    first, second = (pq.read_table(tmp_path / f"round-{n}/label/rankings.parquet").to_pylist() for n in (1, 2))
    assert [row["responses"] for row in first] != [row["responses"] for row in second]
    models = {name: source / name / "model" for name in ("pretrain", "sft", "ppo")}
    models |= {"second": tmp_path / "round-2/preference/model", "first": tmp_path / "round-1/preference/model"}
    found = {"pretrain": None, "sft": "pretrain", "ppo": "sft", "second": "first", "first": "sft"}
    assert parents_of(models) == found  # by lineage, whatever the order
    page, _ = write_report(tmp_path / "round-1")
    assert "Preference optimisation" in page.read_text() and "drift on the data" in page.read_text()
    again = rayllm(*arguments)
    assert again.returncode == 0 and again.stdout.count("unchanged, skipped") == 4
