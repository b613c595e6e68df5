"""Preference optimisation on the toy world: every kind of `rayllm preference` against PPO, from one SFT model.

    python -m bench.preferences runs/quickstart runs/preferences [NAME ...]

All learn from the quickstart's noisy rankings: the preference losses directly, best-of-n, rejection sampling and PPO by
its reward model. With NAMEs only these run; best-of-n goes with rejection-sampling. What is done is not done again.
Prints a Markdown table on held-out prompts in phrasings that no training data has; exits with 1 if DPO stays below
PROMISED, a part of PPO's gain in gold score.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.fleet import generate, start_rollout_fleet
from actors.group import ActorGroup, Role, collect
from actors.reward import RewardActor
from actors.rollout import RolloutActor
from jobs.evaluate import compare
from jobs.judging import judge_rollouts, response_text
from jobs.session import ray_session
from rayllm.config.label import RolloutConfig
from rayllm.data.files import write_parquet
from rayllm.data.prompts import PromptData, read_prompts
from rayllm.data.rollout import Rollout, collate
from rayllm.lineage import write_json
from rayllm.models.folders import load_tokenizer
from rayllm.report.run import read_run
from rayllm.world.summary import summarize

TOY = "jobs/configs/preference-quickstart.yaml"
FAST = ("batch_size=32", "optimizer.learning_rate=5e-4")
TWICE = ("num_epochs=2", "sft_coef=1", *FAST)
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dpo": ("preference", ()),
    "dpo-plain": ("preference", ("sft_coef=0", "num_epochs=1", "pairs=all", "beta=0.1", *FAST)),  # the paper's
    "ipo": ("preference", ("kind=ipo", *TWICE)),
    "kto": ("preference", ("kind=kto", "sft_coef=0", "num_epochs=2")),
    "orpo": ("preference", ("kind=orpo", "beta=0.5", *TWICE)),
    "simpo": ("preference", ("kind=simpo", "beta=2", "target_margin=0.5", *TWICE)),
    "rejection-sampling": ("sft", ("batch_size=32", "num_epochs=1", "eval_every=100", "learner.zero_stage=0",
                                   "workers.num_workers=2", "optimizer.learning_rate=5e-4")),
}  # fmt: skip
"""Name -> job, and settings over the toy preset."""

NUM_BEST = 16
"""Answers among which the reward model chooses in best-of-n."""

NUM_REJECTION, NUM_REJECTION_PROMPTS = 8, 2000
"""Answers and prompts of rejection sampling; the rankings hold 4 answers to 2000 prompts."""

NUM_PROMPTS = 400
PROMISED = 0.6
"""Part of PPO's gain that DPO reaches."""


class Sampler:
    """The SFT model's answers with the reward model's scores."""

    def __init__(self, source: Path) -> None:
        self.config = RolloutConfig()
        self.tokenizer = load_tokenizer(source / "sft/model")
        model = (source / "sft/model").absolute()
        self._rollout = start_rollout_fleet(self.config, model, seed=0)
        self._rollout.sync(RolloutActor.load, str(model))
        self._reward = ActorGroup(
            Role("reward", 1, 0.5, 0), RewardActor,
            lambda rank: {"model": str((source / "reward_model/model").absolute()), "micro_batch_size": 64},
        )  # fmt: skip

    def prompts(self, path: Path, limit: int) -> PromptData:
        return read_prompts(path, self.tokenizer, max_prompt_tokens=256, limit=limit)

    def sample(self, prompts: PromptData, num_samples: int) -> tuple[list[list[Rollout]], list[list[float]]]:
        """For each prompt its rollouts and their rewards."""
        rollouts = generate(
            self._rollout, list(enumerate(prompts.token_ids)), num_samples=num_samples,
            temperature=self.config.temperature, max_new_tokens=self.config.max_new_tokens,
        )  # fmt: skip
        parts = [rollouts[i : i + 512] for i in range(0, len(rollouts), 512)]
        batches = [collate(part, pad_token_id=self.tokenizer.pad_token_id) for part in parts]
        scored = collect(self._reward.map(RewardActor.rewards, batches), "reward")
        rewards = [value for part in scored for value in part.tolist()]
        starts = range(0, len(rollouts), num_samples)
        return [rollouts[i : i + num_samples] for i in starts], [rewards[i : i + num_samples] for i in starts]

    def stop(self) -> None:
        self._rollout.stop()
        self._reward.stop()


def best(rollouts: Sequence[Rollout], rewards: Sequence[float]) -> Rollout:
    """The one with the highest reward."""
    return rollouts[rewards.index(max(rewards))]


def best_of_n(sampler: Sampler, source: Path) -> dict[str, Any]:
    """What the table says of the best of `NUM_BEST` answers; one answer more is the SFT model's own to compare with."""
    data = sampler.prompts(source / "world/prompts_new.parquet", NUM_PROMPTS)
    rollouts, rewards = sampler.sample(data, NUM_BEST + 1)
    chosen = [best(answers[:-1], scores[:-1]) for answers, scores in zip(rollouts, rewards, strict=True)]
    judged = judge_rollouts(data.rows, chosen, sampler.tokenizer)
    single = judge_rollouts(data.rows, [answers[-1] for answers in rollouts], sampler.tokenizer)
    return summarize(judged) | compare(judged, single)


def rejection_data(sampler: Sampler, source: Path, path: Path) -> None:
    """Demonstrations for SFT: to each prompt the answer with the highest reward."""
    data = sampler.prompts(source / "world/prompts_train.parquet", NUM_REJECTION_PROMPTS)
    rollouts, rewards = sampler.sample(data, NUM_REJECTION)
    chosen = [best(answers, scores) for answers, scores in zip(rollouts, rewards, strict=True)]
    rows = [{"prompt": data.messages(r.prompt_id), "response": response_text(sampler.tokenizer, r)} for r in chosen]
    write_parquet([row for row in rows if row["response"]], path)


def sample_all(source: Path, target: Path) -> float:
    """Best-of-n's figures and rejection sampling's data, unless they are there; returns the data's seconds."""
    figures, data = target / "best-of-n.json", target / "rejection.parquet"
    if not (figures.is_file() and data.is_file()):
        target.mkdir(parents=True, exist_ok=True)
        with ray_session(None):
            sampler = Sampler(source)
            content = best_of_n(sampler, source)
            began = time.monotonic()
            rejection_data(sampler, source, data)
            content["rejection_seconds"] = time.monotonic() - began
            sampler.stop()
        write_json(figures, content)
    return float(json.loads(figures.read_text())["rejection_seconds"])


def train(name: str, source: Path, target: Path, *, seed: int) -> float:
    """Run the method's job, unless it is done; returns its seconds."""
    job, settings = RUNS[name]
    arguments = [f"run_dir={target / name}", "overwrite=true", f"model={source / 'sft/model'}", f"seed={seed}"]
    if job == "preference":
        label = source / "label"
        arguments += [f"preferences={label / 'rankings.parquet'}",
                      f"heldout_preferences={label / 'heldout_rankings.parquet'}"]  # fmt: skip
        arguments = ["--config", TOY, *arguments]
    else:
        arguments += [f"data={target / 'rejection.parquet'}"]
    subprocess.run([sys.executable, "-m", f"jobs.{job}", *arguments, *settings], check=True)
    return seconds(target / name)


def seconds(run_dir: Path) -> float:
    """That a finished run took."""
    record = read_run(run_dir)
    assert record is not None
    return float(record["seconds"])


def evaluate(names: Sequence[str], source: Path, target: Path) -> dict[str, Any]:
    """Metrics of every model on the same prompts; each is compared with the SFT model, from which all come."""
    models = {"sft": source / "sft/model", "ppo": source / "ppo/model"}
    models |= {name: target / name / "model" for name in names}
    world = source / "world"
    arguments = [
        f"run_dir={target / 'evaluate'}", "overwrite=true", f"reward_model={source / 'reward_model/model'}",
        f"heldout_documents={world / 'heldout_documents.parquet'}", f"prompts.new={world / 'prompts_new.parquet'}",
        f"num_prompts={NUM_PROMPTS}", "rollout.cpus_per_actor=0.8",
        *(f"models.{name}={path}" for name, path in models.items()),
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "jobs.evaluate", *arguments], check=True)
    found: dict[str, Any] = json.loads((target / "evaluate/evaluation.json").read_text())["metrics"]
    return {name: figures["new"] | {"bits_per_byte": figures["bits_per_byte"]} for name, figures in found.items()}


def row(name: str, figures: dict[str, Any], gain: float | None, took: float | None) -> str:
    """A line of the table."""
    win = "–" if name == "sft" else f"{figures['win_rate']:.1%}"
    kl = f"{figures['kl']:.2f}" if "kl" in figures else f"below {bound(NUM_BEST):.2f}"
    return (
        f"| {name} | {figures['gold']:.2f} | {'–' if gain is None else f'{gain:.0%}'} | {win} | "
        f"{figures['correct']:.1%} | {figures['honest']:.1%} | {figures['harmless']:.1%} | {kl} | "
        f"{figures['bits_per_byte']:.4f} | {'–' if took is None else f'{took:.0f}'} |"
    )


def bound(n: int) -> float:
    """Upper bound on best-of-n's KL, in nats an answer (Beirami et al. 2024, https://arxiv.org/abs/2401.01879)."""
    return math.log(n) - (n - 1) / n


def main(arguments: list[str]) -> int:
    """Run and print; 1 if DPO gains less than it should."""
    source, target = Path(arguments[0]).absolute(), Path(arguments[1]).absolute()
    given = dict(word.split("=") for word in arguments[2:] if "=" in word)
    names = [word for word in arguments[2:] if "=" not in word] or list(RUNS)
    sampled = "rejection-sampling" in names
    rejection = sample_all(source, target) if sampled else 0.0
    took = {name: train(name, source, target, seed=int(given.get("seed", 0))) for name in names}
    figures = evaluate(names, source, target)
    if sampled:
        figures["best-of-n"] = json.loads((target / "best-of-n.json").read_text())
        figures["best-of-n"]["bits_per_byte"] = figures["sft"]["bits_per_byte"]
    reward_model = seconds(source / "reward_model")
    took["ppo"] = reward_model + seconds(source / "ppo")
    if sampled:
        took["rejection-sampling"] += reward_model + rejection
    start, reached = figures["sft"]["gold"], figures["ppo"]["gold"] - figures["sft"]["gold"]
    gains = {name: (found["gold"] - start) / reached for name, found in figures.items()}
    columns = ["", "gold score", "of PPO's gain", "preferred to SFT", "correct", "honest", "harmless", "KL, nats",
               "bits per byte", "seconds"]  # fmt: skip
    table = [f"| {' | '.join(columns)} |", f"|---{'|---:' * (len(columns) - 1)}|"]
    for name in ("sft", *(["best-of-n"] if sampled else []), *names, "ppo"):
        table.append(row(name, figures[name], None if name == "sft" else gains[name], took.get(name)))
    print("\n".join(table))
    return 1 if "dpo" in names and gains["dpo"] < PROMISED else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
