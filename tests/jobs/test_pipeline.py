"""Every job on a tiny model, end to end, under real Ray, Ray Train, DeepSpeed and vLLM."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rayllm.checkpoints import Checkpoints
from rayllm.config.pipeline import WIRING
from rayllm.lineage import read_manifest
from tests.conftest import heed_ctrl_c
from tests.jobs.conftest import ROOT, TINY, rayllm

TRAINED = ("pretrain", "sft", "reward_model", "ppo")


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_every_stage_is_done_and_says_so(tiny_run):
    run_dir, output = tiny_run
    for stage in WIRING:
        assert record(run_dir / stage)["status"] == "done"
        assert f"✓ {stage}" in output
        assert yaml.safe_load((run_dir / stage / "config.yaml").read_text())["run_dir"] == str(run_dir / stage)
    assert "Held-out evaluation" in output and "serve" in output


def test_the_block_before_the_first_step_shows_settings_data_and_an_example(tiny_run):
    _, output = tiny_run
    flat = " ".join(output.split())
    assert "num_steps = 8" in flat and "tiny.yaml:5, default 600" in flat
    assert "200 rows" in flat and "none dropped" in flat
    assert "<|im_start|>assistant⏎[[" in flat  # trained tokens are marked
    assert "workers: 2 x 1 CPU, ZeRO-2, float32" in flat and "rollout: 1 x 0.4 CPU" in flat


def test_the_screen_is_free_of_library_chatter(tiny_run):
    _, output = tiny_run
    for noise in ("INFO", "WARNING", "real_accelerator", "(raylet", "(pid=", "Traceback"):
        assert noise not in output, output


def test_models_load_in_plain_transformers_and_know_their_parents(tiny_run):
    run_dir, _ = tiny_run
    for stage in TRAINED:
        folder = run_dir / stage / "model"
        if stage == "reward_model":
            config = AutoModelForSequenceClassification.from_pretrained(folder).config
            assert config.num_labels == 1 and config.reward_std > 0
        else:
            AutoModelForCausalLM.from_pretrained(folder)
        assert AutoTokenizer.from_pretrained(folder).chat_template
    parents = {stage: read_manifest(run_dir / stage / "model")["parents"] for stage in TRAINED}
    ids = {stage: read_manifest(run_dir / stage / "model")["id"] for stage in ("tokenizer", *TRAINED)}
    assert {p["role"]: p["id"] for p in parents["pretrain"]} == {"tokenizer": ids["tokenizer"]}
    assert {p["role"]: p["id"] for p in parents["sft"]} == {"model": ids["pretrain"]}
    assert {p["role"]: p["id"] for p in parents["ppo"]} == {"model": ids["sft"], "reward_model": ids["reward_model"]}


def test_training_moves_the_weights(tiny_run):
    run_dir, _ = tiny_run
    before, after = weights(run_dir / "sft/model"), weights(run_dir / "ppo/model")
    assert any((before[name] != after[name]).any() for name in before)


@pytest.mark.scorecard("R59", tier="full", partly=True)
def test_metrics_have_no_gap_and_no_duplicate(tiny_run):
    run_dir, _ = tiny_run
    steps = [event["step"] for event in events(run_dir / "ppo")]
    assert steps == [0, 1, 2, 3, 4]
    last = events(run_dir / "ppo")[-1]["metrics"]
    for name in ("objective/rewards", "objective/kl", "loss/policy", "loss/value", "time/sync", "eval/gold"):
        assert name in last
    assert all(event["metrics"].get("rollout/logprob_mismatch", 0) < 1e-3 for event in events(run_dir / "ppo"))


def test_rankings_hold_what_was_sampled(tiny_run):
    run_dir, _ = tiny_run
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "sft/model")
    rows = pq.read_table(run_dir / "label/rankings.parquet").to_pylist()
    assert rows
    for row in rows:
        assert sorted(row["ranks"]) == list(range(len(row["responses"])))  # noise leaves no ties
        assert len(set(row["responses"])) == len(row["responses"])
        for text, ids in zip(row["responses"], row["response_ids"], strict=True):
            assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_the_evaluation_covers_every_model_and_split(tiny_run):
    run_dir, _ = tiny_run
    evaluation = json.loads((run_dir / "evaluate/evaluation.json").read_text())
    assert [model["name"] for model in evaluation["models"]] == ["base", "sft", "ppo"]
    assert evaluation["models"][0]["prompt_format"] == "document"
    for name in ("base", "sft", "ppo"):
        figures = evaluation["metrics"][name]
        assert figures["bits_per_byte"] > 0
        for split in ("new", "held"):
            assert {"gold", "stop_rate", "correct", "correct_greedy", "honest", "harmless", "rude", "reward", "length"} <= figures[split].keys()
    against = evaluation["metrics"]["ppo"]["new"]
    assert against["win"] + against["tie"] + against["lose"] == pytest.approx(1)
    assert abs(evaluation["metrics"]["sft"]["new"]["kl"]) < 1e-3  # the reference against itself
    assert {sample["split"] for sample in evaluation["samples"]} == {"new", "held"}


def test_the_report_stands_alone(tiny_run):
    run_dir, _ = tiny_run
    page = (run_dir / "report.html").read_text()
    assert len(page) < 300_000 and "<script src" not in page and "<link" not in page
    assert json.loads((run_dir / "report.json").read_text())


def test_a_second_run_skips_everything_and_a_change_reruns_what_depends_on_it(tiny_run):
    run_dir, _ = tiny_run
    began = time.monotonic()
    again = rayllm("pipeline", "--config", TINY, f"run_dir={run_dir}")
    assert again.returncode == 0 and "skipped 8 of 8 stages" in again.stdout
    assert time.monotonic() - began < 60  # the promise to the user, not a benchmark
    label_id = record(run_dir / "label")["started"]
    changed = rayllm("pipeline", "--config", TINY, f"run_dir={run_dir}", "evaluate.num_prompts=10")
    assert changed.returncode == 0 and "skipped 7 of 8 stages" in changed.stdout
    assert "the run that was here, with other num_prompts, to evaluate.old-" in changed.stdout
    assert record(run_dir / "label")["started"] == label_id


def ppo_arguments(tiny_run, run_dir: Path, *overrides: str) -> list[str]:
    source, _ = tiny_run
    return ["ppo", "--config", str(source / "ppo/config.yaml"), f"run_dir={run_dir}", *overrides]


@pytest.mark.scorecard("R57", tier="full", partly=True)
def test_two_ranks_and_two_engines_learn_the_same(tiny_run, tmp_path):
    source, _ = tiny_run
    overrides = ["policy.num_actors=2", "critic.num_actors=2", "rollout.num_actors=2", "rollout.cpus_per_actor=0.2",
                 "policy.cpus_per_actor=0.2", "critic.cpus_per_actor=0.2"]  # fmt: skip
    done = rayllm(*ppo_arguments(tiny_run, tmp_path / "run", *overrides))
    assert done.returncode == 0, done.stdout
    assert "policy: 2 x 0.2 CPU" in done.stdout
    for one, two in zip(events(source / "ppo"), events(tmp_path / "run"), strict=True):
        for name in ("objective/rewards", "objective/kl", "response/length_mean", "eval/gold"):
            if name in one["metrics"]:
                assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=0.05, abs=0.05), (one["step"], name)


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.2)


def start(arguments: list[str], cwd: Path = ROOT) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd,
        preexec_fn=heed_ctrl_c,
    )  # fmt: skip


def session_folders() -> set[Path]:
    return set(Path("/tmp").glob("rayllm-*"))


def leftovers(before: set[int]) -> list[psutil.Process]:
    """Processes of Ray and vLLM that were not there before."""
    names = ("ray::", "raylet", "gcs_server", "EngineCore", "VLLM", "jobs.cli")
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if process.info["pid"] not in before and process.info["status"] != "zombie" and any(n in line for n in names):
            found.append(process)
    return found


def reached(folder: Path) -> int:
    """The step of the newest checkpoint."""
    found = Checkpoints(folder / "checkpoints", keep=9).newest()
    return found[0] if found else 0


@pytest.mark.long
@pytest.mark.scorecard("R12", "R56", "R59", tier="full")
def test_a_ppo_run_that_is_stopped_and_then_killed_ends_the_same(tiny_run, tmp_path):
    source, _ = tiny_run
    run_dir = tmp_path / "run"
    before = set(psutil.pids())
    first = start(ppo_arguments(tiny_run, run_dir))
    steps = run_dir / "events.jsonl"
    wait_for(lambda: first.poll() is not None or (steps.is_file() and '"step": 1' in steps.read_text()), 300)
    first.send_signal(signal.SIGTERM)  # between two checkpoints; what is sampled is given up, an update is finished
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 143, output
    assert "Traceback" not in output and record(run_dir)["status"] == "stopped"
    assert reached(run_dir) == events(run_dir)[-1]["step"] in (1, 2)
    second = start(ppo_arguments(tiny_run, run_dir))
    wait_for(lambda: reached_more(run_dir, 2) or second.poll() is not None, 300)
    second.kill()
    second.wait()
    again = rayllm(*ppo_arguments(tiny_run, run_dir))
    assert again.returncode == 0, again.stdout
    assert "resumes in" in again.stdout
    assert [event["step"] for event in events(run_dir)] == [0, 1, 2, 3, 4]
    undisturbed, resumed = events(source / "ppo")[-1]["metrics"], events(run_dir)[-1]["metrics"]
    for name in ("eval/gold", "eval/rewards", "objective/rewards", "objective/kl", "loss/value"):
        assert resumed[name] == pytest.approx(undisturbed[name], rel=1e-4, abs=1e-4)
    assert not session_folders() and not leftovers(before)  # what the killed run left went when the next one started


def reached_more(folder: Path, step: int) -> bool:
    return any(int(path.name[-6:]) >= step for path in (folder / "checkpoints").glob("step-*"))


@pytest.mark.long
@pytest.mark.scorecard("R68", tier="full")
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_a_training_job_leaves_nothing_and_the_next_run_continues(tiny_run, tmp_path, signum, status):
    source, _ = tiny_run
    run_dir = tmp_path / "run"
    arguments = ["pretrain", "--config", str(source / "pretrain/config.yaml"), f"run_dir={run_dir}", "num_steps=3000"]
    before = set(psutil.pids())
    process = start(arguments)
    wait_for(lambda: any((run_dir / "checkpoints").glob("step-*")) or process.poll() is not None, 300)
    assert process.poll() is None, process.communicate()[0]
    process.send_signal(signum)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == status, output
    assert "Traceback" not in output
    assert record(run_dir)["status"] == "stopped"
    wait_for(lambda: not leftovers(before), 30)
    assert not session_folders()
    assert not [p for p in Path("/dev/shm").glob("*") if str(process.pid) in p.name]
    assert reached(run_dir) >= events(run_dir)[-1]["step"]  # saved where it stopped
    if signum == signal.SIGINT:
        last = reached(run_dir)
        process = start(arguments)
        wait_for(lambda: any(e["step"] > last for e in events(run_dir)) or process.poll() is not None, 300)
        steps = [event["step"] for event in events(run_dir) if "train/loss" in event["metrics"]]
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
        assert steps == sorted(set(steps))


@pytest.mark.scorecard("R51", tier="full")
def test_a_failing_worker_is_one_clear_line_and_status_1(tiny_run, tmp_path):
    source, _ = tiny_run
    overrides = [f"run_dir={tmp_path / 'run'}", "optimizer.learning_rate=1e30", "workers.max_failures=0"]
    done = rayllm("pretrain", "--config", source / "pretrain/config.yaml", *overrides)
    assert done.returncode == 1, done.stdout
    assert re.search(r"failed: training failed: rank \d.*: the (loss|gradient norm) is (nan|inf)", done.stdout), done.stdout
    assert "Traceback" not in done.stdout
    assert record(tmp_path / "run")["status"] == "failed"
