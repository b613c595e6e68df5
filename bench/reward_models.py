"""Reward models on the toy world: what a loss learns from the same labels, and what an ensemble saves PPO from.

    python -m bench.reward_models runs/quickstart runs/reward_models [NAME ...]

Trains reward models with every loss on the quickstart's noisy rankings, then a few on FEW rankings, which PPO can
exploit, each from a pretraining of its own, and runs PPO against one of them and against all; and, where
runs/reward_models/hh.parquet holds human pairs (Anthropic HH), one on these. What is done is not done again; with NAMES
only these runs are done. Writes docs/reward-models.md and its picture from the runs that are there.
"""

from __future__ import annotations

import importlib
import json
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from bench.reward_models_page import write_page
from jobs.reward_model import RewardModelTask, make_examples
from jobs.session import ray_session
from rayllm.config.base import Config, load_config
from rayllm.config.ppo import PPOConfig
from rayllm.config.pretrain import PretrainConfig
from rayllm.config.reward_model import RewardModelConfig
from rayllm.config.sft import SftConfig
from rayllm.data.files import read_rows, write_parquet
from rayllm.data.preferences import read_rankings
from rayllm.models.folders import load_tokenizer
from rayllm.report.reward import REPORT

SEEDS = (0, 1, 2)
PAIRWISE = ("batch_size=24", "num_epochs=2")  # about as many steps as batches of 8 prompts make
LISTWISE = ("batch_size=8", "num_epochs=2.75")  # 60 % of the tokens
LOSSES: dict[str, tuple[str, ...]] = {
    "pairwise": ("loss=pairwise", *PAIRWISE),
    "all-pairs": ("loss=all_pairs", *LISTWISE),
    "plackett-luce": ("loss=plackett_luce", *LISTWISE),
}
"""Name -> settings over those of the quickstart's reward model."""

FEW = 100
"""Rankings that the exploitable reward models learn from."""

MEMBERS = 3
"""Reward models of the ensemble: all learn from these rankings, the first from the quickstart's SFT model, each other
from an SFT model of its own, pretrained with another seed. From one start they would make the same mistakes."""

EXPLOIT = (
    "num_steps=16", "policy.optimizer.learning_rate=2e-4", "policy.optimizer.schedule=constant",
    "algorithm.kl_coef=0.02", "eval.every_steps=2", "eval.num_prompts=200", "checkpoint.every_steps=8",
)  # fmt: skip
"""PPO that goes far: a larger rate and a smaller KL coefficient than the quickstart's."""

POLICIES: dict[str, tuple[int, tuple[str, ...]]] = {
    "ppo-single": (1, ()),
    "ppo-worst": (MEMBERS, ("reward.uncertainty=worst",)),
    "ppo-mean-std": (MEMBERS, ("reward.uncertainty=mean_std", "reward.uncertainty_coef=2")),
}
"""Name -> number of reward models, and settings."""


STARTS = ("pretrain", "sft")
CONFIGS: dict[str, type[Config]] = {
    "pretrain": PretrainConfig, "sft": SftConfig, "reward_model": RewardModelConfig, "ppo": PPOConfig
}  # fmt: skip

HUMAN = "hh"
"""The run on human pairs."""


def names(target: Path) -> list[str]:
    """Every run, in order."""
    losses = [f"{name}-{seed}" for seed in SEEDS for name in LOSSES]
    human = [HUMAN] if (target / "hh.parquet").is_file() else []
    starts = [f"{job}-{seed}" for seed in range(1, MEMBERS) for job in STARTS]
    return [*losses, *starts, *(f"few-{seed}" for seed in range(MEMBERS)), *POLICIES, *human]


def run(name: str, source: Path, target: Path) -> None:
    """Train, unless it is done."""
    loss, _, seed = name.rpartition("-")
    if loss in STARTS:
        job, arguments = loss, [f"seed={seed}"]
        arguments += [f"model={target / f'pretrain-{seed}/model'}"] if job == "sft" else []
    elif name in POLICIES:
        count, settings = POLICIES[name]
        models = ", ".join(str((target / f"few-{seed}/model").absolute()) for seed in range(count))
        job, arguments = "ppo", [f"reward_model=[{models}]", *EXPLOIT, *settings]
    elif name == HUMAN:
        job = "reward_model"
        arguments = [f"rankings={target / 'hh.parquet'}", "heldout_rankings=null", "heldout_fraction=0.3"]
    elif loss == "few":
        job = "reward_model"
        start = source / "sft/model" if seed == "0" else target / f"sft-{seed}/model"
        arguments = [f"seed={seed}", f"model={start}", f"rankings={target / 'few.parquet'}", "num_epochs=6",
                     "workers.num_workers=1"]  # fmt: skip
    else:
        job, arguments = "reward_model", [f"seed={seed}", *LOSSES[loss]]
    if job == "reward_model" and name != HUMAN:
        arguments.append(f"heldout_rankings={target / 'heldout.parquet'}")
    loaded = load_config(CONFIGS[job], source / job / "config.yaml", [f"run_dir={target / name}", *arguments])
    importlib.import_module(f"jobs.{job}").run(loaded, Console(width=120))


def prepare(source: Path, target: Path) -> None:
    """The few rankings, and the held-out ones with the kinds of their prompts as categories."""
    kinds = {row["prompt"][0]["content"]: row["kind"] for row in read_rows(source / "world/prompts_label.parquet", [])}
    heldout = list(read_rows(source / "label/heldout_rankings.parquet", ["prompt"]))
    rows = [{**row, "category": kinds[row["prompt"][0]["content"]]} for row in heldout]
    write_parquet(rows, target / "heldout.parquet")
    write_parquet(list(read_rows(source / "label/rankings.parquet", []))[:FEW], target / "few.parquet")


def trained_tokens(folder: Path) -> int:
    """Tokens that the run's optimizer steps read, padding not counted."""
    config = load_config(RewardModelConfig, folder / "config.yaml").config
    tokenizer = load_tokenizer(config.model)
    rankings = read_rankings(config.rankings, tokenizer, max_length=config.max_length).rankings
    examples = make_examples(rankings, config)
    num_steps = int(len(examples) * config.num_epochs / config.batch_size)
    task = RewardModelTask(config, examples, [], 0, num_steps)
    return sum(task.num_tokens(batch) for step in range(num_steps) for batch in task.micro_batches(step, 0, 1))


def losses(target: Path) -> dict[str, Any]:
    """Loss -> its accuracies by seed, their interval, calibration, tokens and seconds."""
    found: dict[str, Any] = {}
    for name in LOSSES:
        folders = [target / f"{name}-{seed}" for seed in SEEDS if (target / f"{name}-{seed}" / REPORT).is_file()]
        reports = [json.loads((folder / REPORT).read_text()) for folder in folders]
        if reports:
            found[name] = {
                "accuracies": [report["accuracy"]["accuracy"] for report in reports],
                "calibration": float(np.mean([report["calibration"]["error"] for report in reports])),
                "pairs": reports[0]["num_pairs"],
                "prompts": reports[0]["num_prompts"],
                "tokens": trained_tokens(folders[0]),
                "settings": yaml.safe_load((folders[0] / "config.yaml").read_text()),
            }
    return found


def curves(target: Path) -> dict[str, list[dict[str, float]]]:
    """Policy -> for each evaluation its step, KL, gold score, and score by the reward model that all have."""
    found = {}
    for name in POLICIES:
        path = target / name / "events.jsonl"
        events = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        steps = [(event["step"], event["metrics"]) for event in events if "metrics" in event]
        found[name] = [
            {
                "step": step,
                "kl": metrics.get("objective/kl", 0.0),
                "gold": metrics["eval/gold"],
                "proxy": metrics.get("eval/rewards_0", metrics["eval/rewards"]),
                "spread": metrics.get("eval/rewards_spread", 0.0),
            }
            for step, metrics in steps
            if "eval/gold" in metrics
        ]
    return {name: points for name, points in found.items() if len(points) > 1}


def main(arguments: list[str]) -> int:
    """Run and write; 1 if a loss over whole rankings does not reach pairwise at 60 % of its tokens, or the ensemble
    does not keep more of the gold score."""
    source, target = Path(arguments[0]), Path(arguments[1])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops Ray on the way out
    prepare(source, target)
    with ray_session(target / "logs", verbose=False):
        for name in arguments[2:] or names(target):
            run(name, source, target)
    found = [target / f"few-{seed}" / REPORT for seed in range(MEMBERS)]
    few = [json.loads(path.read_text())["accuracy"]["accuracy"] for path in found if path.is_file()]
    human = target / HUMAN / REPORT
    verdict = json.loads(human.read_text())["verdict"]["text"] if human.is_file() else None
    return write_page(losses(target), few, curves(target), few=FEW, human=verdict, out=Path("docs"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
