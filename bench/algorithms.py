"""RL algorithms on the toy world, from one SFT model, with the gold judge as the reward.

    python -m bench.algorithms runs/quickstart runs/algorithms [NAME ...]

Runs the presets of jobs/configs/ at toy size (60 steps of 64 responses), PPO-ptx and PPO of adapters; what is
done is not done again. Prints a Markdown table: gold score on held-out prompts, the part of the way from the SFT model
to the best possible score, drift, bits per byte, time.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

from rayllm.data.files import read_rows
from rayllm.world.demonstrations import demonstrate
from rayllm.world.judge import judge
from rayllm.world.prompts import Prompt

TOY = (
    "num_steps=60", "reward.source=gold", "rollout.temperature=0.7", "rollout.max_new_tokens=48",
    "policy.optimizer.learning_rate=2e-4", "policy.optimizer.warmup_steps=0", "critic.optimizer.learning_rate=5e-4",
    "critic.optimizer.warmup_steps=0", "policy.cpus_per_actor=0.4", "critic.cpus_per_actor=0.4",
    "reference.cpus_per_actor=0.2", "reward.cpus_per_actor=0.2", "rollout.cpus_per_actor=0.4", "eval.judge=gold",
    "eval.num_prompts=400", "eval.every_steps=20", "algorithm.num_minibatches=2",
)  # fmt: skip
CRITIC = ("prompts_per_step=64", "samples_per_prompt=1", "reward.normalize=running")
GROUPS = ("prompts_per_step=16", "samples_per_prompt=4")
RUNS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "ppo": ("ppo-trl", (*CRITIC, "critic.warmup_steps=2")),
    "ppo-ptx": ("ppo-trl", (*CRITIC, "critic.warmup_steps=2", "ptx.coef=1", "ptx.documents={world}/documents.parquet")),
    "ppo-lora": ("ppo-trl", (*CRITIC, "critic.warmup_steps=2", "policy.learner.lora.rank=4",
                             "policy.optimizer.learning_rate=5e-4")),
    "grpo": ("grpo", GROUPS),
    "rloo": ("rloo", GROUPS),
    "reinforce++": ("reinforce++", CRITIC),
    "dapo": ("dapo", (*GROUPS, "shaping.overlong_buffer=8", "shaping.resample_rounds=1")),
    "gspo": ("gspo", GROUPS),
}  # fmt: skip
"""Name -> preset, and settings over it."""


def run(name: str, source: Path, folder: Path, *more: str) -> list[dict[str, float]]:
    """Train, unless it is done; returns the metrics of every step.

    Args:
        name: in `RUNS`.
        source: what ``make quickstart`` wrote.
        folder: of the run.
        more: settings over all others.
    """
    preset, settings = RUNS[name]
    world = source / "world"
    arguments = [
        f"run_dir={folder}", f"model={source / 'sft/model'}", f"critic.model={source / 'reward_model/model'}",
        f"prompts={world / 'prompts_train.parquet'}", f"eval.prompts={world / 'prompts_new.parquet'}",
        f"eval.documents={world / 'heldout_documents.parquet'}", *TOY,
        *(setting.format(world=world) for setting in settings), *more,
    ]  # fmt: skip
    command = [sys.executable, "-m", "jobs.ppo", "--config", f"jobs/configs/{preset}.yaml", *arguments]
    subprocess.run(command, check=True)
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [json.loads(line)["metrics"] | {"t": json.loads(line)["t"]} for line in lines]


def best_possible(prompts: Path, num_prompts: int) -> float:
    """Mean over the prompts of the best score among 200 answers that the crowd could have written."""
    rng = random.Random(0)
    best = []
    for row in list(read_rows(prompts, ["prompt"]))[:num_prompts]:
        prompt = Prompt.from_row(row)
        best.append(max(judge(prompt, demonstrate(prompt, rng).text, stopped=True).gold for _ in range(200)))
    return sum(best) / len(best)


def main(arguments: list[str]) -> int:
    """Run and print; 1 if an algorithm stays below half of the way."""
    source, target = Path(arguments[0]), Path(arguments[1])
    best = best_possible(source / "world/prompts_new.parquet", 400)
    rows = ["| algorithm | gold score | of the way to the best | KL, nats | bits per byte | seconds a step |",
            "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    short = 0
    for name in arguments[2:] or RUNS:
        events = run(name, source, target / name)
        start, end = events[0], events[-1]
        way = (end["eval/gold"] - start["eval/gold"]) / (best - start["eval/gold"])
        short += way < 0.5
        seconds = sum(event["time/step"] for event in events[1:]) / (len(events) - 1)
        kl = f"{end['objective/kl']:.2f}" if "objective/kl" in end else "–"
        rows.append(
            f"| {name} | {start['eval/gold']:.2f} to {end['eval/gold']:.2f} | {way:.0%} | {kl} | "
            f"{start['eval/bits_per_byte']:.4f} to {end['eval/bits_per_byte']:.4f} | {seconds:.2f} |"
        )
    print("\n".join([*rows, "", f"The best possible gold score on these prompts is {best:.2f}."]))
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
