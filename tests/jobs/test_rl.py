"""The RL job beyond PPO: other estimators and sources of rewards, end to end on the tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.jobs.conftest import dies_behind_its_last_checkpoint, rayllm

SMALL = (
    "num_steps=2", "prompts_per_step=8", "rollout.max_new_tokens=12", "policy.cpus_per_actor=0.4",
    "reward.cpus_per_actor=0.2", "reference.cpus_per_actor=0.2", "critic.cpus_per_actor=0.4",
    "rollout.cpus_per_actor=0.4", "eval.num_prompts=8", "checkpoint.every_steps=1", "algorithm.num_minibatches=2",
)  # fmt: skip


def events(folder: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [line["metrics"] for line in lines if "metrics" in line]


def test_grpo_with_all_that_it_can_have(tiny_run, tmp_path):
    source, _ = tiny_run
    world = source / "world"
    done = rayllm(
        "ppo", f"run_dir={tmp_path}", f"model={source / 'sft/model'}", f"prompts={world / 'prompts_train.parquet'}",
        *SMALL, "samples_per_prompt=3", "reward.source=gold", "algorithm.advantage=grpo", "algorithm.kl_in=loss",
        "algorithm.kl_estimator=k3", "algorithm.kl_target=0.5", "algorithm.off_policy=token",
        "reward.normalize=running", "shaping.resample_rounds=1", "algorithm.entropy_coef=0.001",
        f"ptx.documents={world / 'documents.parquet'}", f"eval.documents={world / 'heldout_documents.parquet'}",
        "reference.update_every=1", "reference.ema=0.5", "max_policy_lag=1", "rollout.cut_tail=true",
        "rollout.weight_transfer=broadcast",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    start, *steps = events(tmp_path)
    assert start["eval/bits_per_byte"] > 0 and len(steps) == 2
    for metrics in steps:
        assert metrics["loss/ptx"] > 0 and metrics["objective/kl_coef"] > 0
        assert "loss/value" not in metrics
        assert metrics.get("rollout/logprob_mismatch", 0) <= metrics.get("rollout/logprob_mismatch_max", 0) < 1e-3
        assert 0 <= metrics.get("rollout/logprob_mismatch_kl", 0) < 1e-5
    assert steps[0]["off_policy/lag_max"] == 0 and "rollout/logprob_mismatch" in steps[0]
    assert steps[1]["off_policy/lag_max"] == 1 and steps[1]["off_policy/difference"] > 0
    assert not (tmp_path / "critic").exists()
    assert (tmp_path / "checkpoints/step-000002/reference/model.safetensors").is_file()


def test_remax_and_a_run_that_dies_behind_its_last_checkpoint_has_the_same_figures(tiny_run, tmp_path):
    source, _ = tiny_run
    command = (
        "ppo", f"run_dir={tmp_path}", f"model={source / 'sft/model'}", *SMALL, "reward.source=gold",
        f"prompts={source / 'world/prompts_train.parquet'}", f"eval.prompts={source / 'world/prompts_held.parquet'}",
        "algorithm.advantage=remax", "shaping.clip=null",
    )  # fmt: skip
    done = rayllm(*command)
    assert done.returncode == 0, done.stdout
    start, *steps = events(tmp_path)
    assert len(steps) == 2 and all(metrics["policy/grad_norm"] > 0 for metrics in steps)
    before = dies_behind_its_last_checkpoint(tmp_path)
    assert before["metrics"]["objective/rewards"] == steps[-1]["objective/rewards"]
    done = rayllm(*command)
    assert done.returncode == 0, done.stdout
    after = json.loads((tmp_path / "run.json").read_text())
    assert after["metrics"] == before["metrics"] and after["model"]["id"] == before["model"]["id"]
    assert events(tmp_path) == [start, *steps]


@pytest.mark.parametrize("advantage", ["gae", "remax"])
def test_an_environment_teaches_without_a_file_of_prompts(tiny_run, tmp_path, advantage):
    source, _ = tiny_run
    done = rayllm(
        "ppo", f"run_dir={tmp_path}", f"model={source / 'sft/model'}", *SMALL, "reward.source=environment",
        "environment.name=guess_number", "environment.max_turns=2", f"algorithm.advantage={advantage}",
        "rollout.weight_transfer=ipc", "placement.mode=colocated",
    )  # fmt: skip
    if advantage == "remax":
        assert done.returncode == 2 and "environment" in done.stdout
        return
    assert done.returncode == 0, done.stdout
    assert len(events(tmp_path)) == 3 and (tmp_path / "critic/model.safetensors").is_file()


@pytest.mark.scorecard("R50", tier="full")
def test_several_sources_score_one_run_and_one_that_fails_takes_none_with_it(tiny_run, tmp_path):
    source, _ = tiny_run
    rewards = "tests.actors.reward_functions"
    done = rayllm(
        "ppo", f"run_dir={tmp_path}", f"model={source / 'sft/model'}", *SMALL, "samples_per_prompt=3", "num_steps=3",
        f"prompts={source / 'world/prompts_train.parquet'}", f"eval.prompts={source / 'world/prompts_held.parquet'}",
        f"reward_model={source / 'reward_model/model'}", "algorithm.advantage=grpo", "shaping.resample_rounds=1",
        "max_policy_lag=1", "reward.cpus_per_actor=0.1", "reward.sources.helpful.kind=model",
        "reward.sources.helpful.normalize=running", "reward.sources.short.kind=verifier",
        "reward.sources.short.verifier=length", "reward.sources.short.max_tokens=8", "reward.sources.short.weight=0.5",
        "reward.sources.flaky.kind=function", f"reward.sources.flaky.function={rewards}:nan_for_every_third",
        "reward.sources.flaky.on_failure=drop", "reward.sources.hangs.kind=function", "reward.sources.hangs.timeout_s=1",
        f"reward.sources.hangs.function={rewards}:sleeps", "reward.sources.hangs.on_failure=zero",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    start, *steps = events(tmp_path)
    assert len(steps) == 3 and {"eval/reward/helpful/mean", "eval/rewards"} <= start.keys()
    for metrics in steps:
        assert metrics["reward/helpful/std"] > 0 and metrics["reward/helpful/failures"] == 0
        assert 0 <= metrics["reward/short/mean"] <= 1
        assert metrics["reward/flaky/failures"] >= 8 and metrics["reward/flaky/mean"] == 1
        assert metrics["reward/hangs/failures"] >= 24 and metrics["reward/hangs/mean"] == 0
        assert metrics["policy/grad_norm"] > 0 and metrics["policy/skipped_steps"] == 0
    notes = (tmp_path / "events.jsonl").read_text()
    assert "reward source hangs (function=tests.actors.reward_functions:sleeps) did not answer within timeout_s=1" in notes
    assert "reward source flaky (function=tests.actors.reward_functions:nan_for_every_third) returned nan" in notes


@pytest.mark.scorecard("R21", tier="full")
def test_a_source_that_is_down_stops_the_run_with_its_message(tiny_run, tmp_path):
    source, _ = tiny_run
    done = rayllm(
        "ppo", f"run_dir={tmp_path}", f"model={source / 'sft/model'}", *SMALL, "reward.source=function",
        f"prompts={source / 'world/prompts_train.parquet'}", "reward.function=tests.actors.reward_functions:raises",
        "reward.on_failure=drop",
    )  # fmt: skip
    assert done.returncode == 1
    assert "no response of the step is left to learn from: reward source function" in done.stdout.replace("\n", " ")
