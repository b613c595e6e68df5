"""Labelled steps teach a process reward model, and PPO takes its rewards for single steps: end to end."""

from __future__ import annotations

import json
import random

from tests.jobs.conftest import rayllm
from tests.jobs.test_rl import SMALL, events


def write_steps(path, num: int, seed: int) -> None:
    rng = random.Random(seed)
    rows = []
    for _ in range(num):
        labels = [rng.random() < 0.5 for _ in range(rng.randint(1, 3))]
        steps = [f"It is {'right' if label else 'wrong'}." for label in labels]
        rows.append({"prompt": "What color is snow?", "completions": steps, "labels": labels})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_steps_teach_a_model_that_rewards_steps(tiny_run, tmp_path):
    source, _ = tiny_run
    write_steps(tmp_path / "train.jsonl", 64, 0)
    write_steps(tmp_path / "held.jsonl", 16, 1)
    done = rayllm(
        "process-reward-model", f"run_dir={tmp_path / 'prm'}", f"model={source / 'sft/model'}", "batch_size=16",
        f"steps={tmp_path / 'train.jsonl'}", f"heldout_steps={tmp_path / 'held.jsonl'}", "num_epochs=6",
        "workers.num_workers=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    last = events(tmp_path / "prm")[-1]
    assert last["eval/accuracy"] > 0.9, last
    done = rayllm(
        "ppo", f"run_dir={tmp_path / 'ppo'}", f"model={source / 'sft/model'}", *SMALL,
        f"prompts={source / 'world/prompts_train.parquet'}", "reward.sources.steps.kind=process",
        f"reward.sources.steps.model={tmp_path / 'prm/model'}", "reward.sources.short.kind=verifier",
        "reward.sources.short.verifier=length", "reward.sources.short.max_tokens=8", "critic.warmup_steps=0",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    _, *steps = events(tmp_path / "ppo")
    for metrics in steps:
        assert -3 <= metrics["reward/steps/mean"] <= 3 and metrics["reward/steps/failures"] == 0
        assert abs(metrics["objective/rewards"] - metrics["reward/steps/mean"] - metrics["reward/short/mean"]) < 1e-4
