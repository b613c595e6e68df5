"""The reward model as the labeler, end to end: real engines and scorers on Ray Data, undisturbed and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from actors.labeling import CHUNK
from rayllm.data.labeling import SCHEMAS
from tests.jobs.conftest import ROOT, rayllm

NUM_PROMPTS = 8 * CHUNK
NUM_CHUNKS = 9  # and people's rankings
BOUND = 0.5000001


@pytest.fixture(scope="module")
def arguments(tiny_run, tmp_path_factory) -> list[str]:
    """Of a job with several chunks: the tiny world's prompts many times over."""
    source, _ = tiny_run
    rows = pq.read_table(source / "world/prompts_train.parquet").to_pylist()
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.parquet"
    pq.write_table(pa.Table.from_pylist([rows[i % len(rows)] for i in range(NUM_PROMPTS)]), prompts)
    return [
        "label", "labeler=reward-model", f"model={source / 'sft/model'}", f"prompts={prompts}",
        f"reward_model={source / 'reward_model/model'}", "num_responses=2", f"set_aside_below={BOUND}",
        f"heldout_rankings={source / 'label/heldout_labelers.parquet'}", "best.top_fraction=0.5",
        "rollout.cpus_per_actor=0.5", "reward.cpus_per_actor=0.5", "rollout.max_new_tokens=12",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def labels(arguments, tmp_path_factory) -> tuple[Path, str]:
    """(run folder, output) of an undisturbed job."""
    run_dir = tmp_path_factory.mktemp("labels") / "run"
    done = rayllm(*arguments, f"run_dir={run_dir}")
    assert done.returncode == 0, done.stdout
    return run_dir, done.stdout


def rows(folder: Path, kind: str) -> list[dict]:
    table = pq.read_table(folder / f"{kind}.parquet")
    assert table.schema.equals(SCHEMAS[kind])
    return table.to_pylist()


def test_every_prompt_is_labelled_or_set_aside(labels):
    folder, _ = labels
    metrics = json.loads((folder / "run.json").read_text())["metrics"]
    rankings, people = rows(folder, "rankings"), rows(folder, "for_people")
    assert len(rankings) + len(people) + metrics["rankings/all_answers_equal"] == NUM_PROMPTS
    for row in rankings:
        by_rank = [score for _, score in sorted(zip(row["ranks"], row["scores"], strict=True))]
        assert by_rank == sorted(row["scores"], reverse=True)
        assert len(set(row["responses"])) == len(row["responses"]) == len(row["response_ids"])
    assert all(row["probability"] < BOUND for row in people)
    assert all(row["chosen_reward"] > row["rejected_reward"] for row in rows(folder, "pairs"))


def test_the_best_of_the_best_half_are_kept(labels):
    folder, _ = labels
    metrics = json.loads((folder / "run.json").read_text())["metrics"]
    best = rows(folder, "best")
    assert len(best) + metrics["best/rejected"] + metrics["best/unfinished"] == NUM_PROMPTS
    assert len(best) >= (NUM_PROMPTS - metrics["best/unfinished"]) // 2
    assert all(row["messages"][-1]["role"] == "assistant" for row in best)


def test_scores_are_those_of_plain_transformers(labels, tiny_run):
    folder, source = labels[0], tiny_run[0]
    model = AutoModelForSequenceClassification.from_pretrained(source / "reward_model/model").eval()
    tokenizer = AutoTokenizer.from_pretrained(source / "sft/model")
    for row in rows(folder, "rankings")[:5]:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        for ids, text, score in zip(row["response_ids"], row["responses"], row["scores"], strict=True):
            assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
            with torch.no_grad():
                hidden = model.model(input_ids=torch.tensor([prompt + ids])).last_hidden_state[0, -1]
                raw = float(model.score(hidden))
            assert score == pytest.approx((raw - model.config.reward_mean) / model.config.reward_std, abs=1e-4)


def test_agreement_with_people_is_told_next_to_theirs_with_each_other(labels):
    folder, output = labels
    metrics = json.loads((folder / "run.json").read_text())["metrics"]
    for name in ("reward_model", "people"):
        low, rate, high = (metrics[f"agreement/{name}{end}"] for end in ("_low", "", "_high"))
        assert 0 <= low <= rate <= high <= 1
    assert metrics["agreement/reward_model_pairs"] == 2 * metrics["agreement/people_pairs"] > 0
    told = "may label alone" if metrics["agreement/reward_model"] >= metrics["agreement/people"] else "not label alone"
    assert told in output


def test_the_screen_is_free_of_library_chatter(labels):
    for noise in ("INFO", "WARNING", "Warning", "core_worker", "Traceback", "(pid="):
        assert noise not in labels[1], labels[1]


@pytest.mark.long
def test_a_killed_job_goes_on_and_ends_with_the_same_files(arguments, labels, tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "jobs.cli", *arguments, f"run_dir={run_dir}"]
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
    parts = run_dir / "parts"
    while not list(parts.glob("prompts-*.parquet")):
        assert process.poll() is None, (tmp_path / "output").read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(list(parts.glob("*.parquet"))) < NUM_CHUNKS
    again = rayllm(*arguments, f"run_dir={run_dir}")
    assert again.returncode == 0, again.stdout
    assert "rows are done" in again.stdout
    for kind in SCHEMAS:
        assert pq.read_table(run_dir / f"{kind}.parquet").equals(pq.read_table(labels[0] / f"{kind}.parquet")), kind
    assert not parts.exists()
