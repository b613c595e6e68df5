"""What an evaluation says in plain sentences, every number computed from it.

``verdict`` is the one line to read; ``headline`` adds the sentences under it. A change of a rate counts only
when chance alone (95 %, unpaired, one draw a prompt) would not explain it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rayllm.report.glossary import EVALUATION, model_name, number, percent, score

Tone = Literal["good", "mixed", "bad", "none"]
SHOWN = 0.005  # scores are written with two decimals; a smaller change is no change
SUPERVISED = ("pretrain", "sft")  # stages that do not optimise against the reward model


@dataclass(frozen=True, slots=True)
class Finding:
    tone: Tone
    text: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An ``evaluation.json`` with the few questions that the report asks of it."""

    raw: dict[str, Any]

    @property
    def models(self) -> list[str]:
        listed = [m["name"] for m in self.raw.get("models") or [] if isinstance(m, dict) and m.get("name")]
        return listed or list(self.raw.get("metrics") or {})

    @property
    def splits(self) -> list[str]:
        return list(self.raw.get("splits") or {}) or ["new", "held"]

    @property
    def final(self) -> str | None:
        return self.models[-1] if self.models else None

    def about(self, model: str) -> dict[str, Any]:
        return next((m for m in self.raw.get("models") or [] if m.get("name") == model), {})

    def parent(self, model: str) -> str | None:
        """The model it was trained from; the one before it in the list where that is not said."""
        named, at = self.about(model).get("parent"), self.models.index(model)
        if named in self.models:
            return named
        return self.models[at - 1] if at else None

    def value(self, model: str | None, split: str, metric: str) -> float | None:
        metrics = (self.raw.get("metrics") or {}).get(model) or {}
        found = (metrics.get(split) or {}).get(metric)
        if metric == "bits_per_byte" and found is None:
            found = metrics.get(metric)
        return number(found)

    def prompts(self, split: str) -> int:
        counts = self.raw.get("num_prompts")
        return int(number(counts.get(split) if isinstance(counts, dict) else counts) or 0)

    def change(self, split: str, metric: str) -> tuple[float, float] | None:
        """The metric of the parent and of the last model, where both are known."""
        if self.final is None:
            return None
        old = self.value(self.parent(self.final), split, metric)
        new = self.value(self.final, split, metric)
        return None if old is None or new is None else (old, new)

    def judged(self, split: str, metric: str, old: float, new: float) -> Literal["better", "worse", ""]:
        """Whether a change is for the better, for the worse, or neither (no direction, or within chance)."""
        about = EVALUATION[metric]
        margin = rate_margin(old, new, self.prompts(split)) if about.unit == "rate" else SHOWN
        if abs(new - old) < max(margin, 5e-4):
            return ""
        gain = (new - old) * about.better
        return "better" if gain > 0 else "worse" if gain < 0 else ""


def rate_margin(old: float, new: float, prompts: int) -> float:
    """The difference of two rates over ``prompts`` prompts each that chance stays under in 95 % of cases."""
    if prompts <= 0:
        return 0.0
    variance = sum(max(rate * (1 - rate), 0.0) for rate in (old, new))
    return 1.96 * math.sqrt(variance / prompts)


def headline(evaluation: dict[str, Any]) -> list[str]:
    """The verdict and then the findings, one plain sentence each."""
    data = Evaluation(evaluation)
    if not data.models:
        return [verdict(evaluation).text]
    parts = (_stops(data), _answers(data), _reward_model(data), _gold(data), _conduct(data), _wins(data))
    return [verdict(evaluation).text, *(sentence for sentence in parts if sentence)]


def verdict(evaluation: dict[str, Any]) -> Finding:
    """Whether the last stage made the model better, and, loudly, whether it only pleased the reward model."""
    data = Evaluation(evaluation)
    parent = data.parent(data.final) if data.final else None
    if data.final is None or parent is None:
        return Finding("none", "Nothing to compare yet: fewer than two models were evaluated.")
    new, old = model_name(data.final), model_name(parent)
    if data.about(data.final).get("stage", data.final) not in SUPERVISED:
        hacked = [split for split in data.splits if _hacked(data, split)]
        if hacked:
            return Finding("bad", _hacking(data, hacked, new))
    changes = {split: change for split in data.splits if (change := data.change(split, "gold"))}
    if not changes:
        return Finding("none", f"No gold score for both {new} and {old}, so no verdict.")
    told = " and from ".join(
        f"{score(a)} to {score(b)} on {name} prompts" for name, (a, b) in changes.items()
    )
    judged = {data.judged(split, "gold", a, b) for split, (a, b) in changes.items()}
    if judged == {"better"}:
        worse = _regressions(data)
        if worse:
            better = f"{new} is better than {old} (gold score from {told})"
            return Finding("mixed", f"{better}, but not in everything: {worse}.")
        return Finding("good", f"{new} is better than {old}: the gold score rose from {told}.")
    if "worse" not in judged and "better" not in judged:
        return Finding("mixed", f"{new} is as good as {old}: the gold score went from {told}.")
    if judged == {"worse"}:
        return Finding("bad", f"{new} is worse than {old}: the gold score fell from {told}.")
    return Finding("mixed", f"{new} against {old} depends on the prompts: the gold score went from {told}.")


def overoptimised(gold: Sequence[tuple[float, float]], rewards: Sequence[tuple[float, float]]) -> str | None:
    """A sentence when gold peaked during PPO and then fell while the reward-model score went on rising.

    A fall counts when it gives back a quarter of what was gained; the last tenth of the rewards is averaged.
    """
    if len(gold) < 3 or len(rewards) < 3:
        return None
    peak_step, peak = max(gold, key=lambda point: point[1])
    end_step, end = gold[-1]
    at_peak = [
        value for step, value in rewards if abs(step - peak_step) <= (rewards[-1][0] - rewards[0][0]) / 20
    ]
    tail = [value for _, value in rewards[-max(1, len(rewards) // 10) :]]
    if peak - end < max(0.25 * (peak - gold[0][1]), 0.05) or not at_peak:
        return None
    if sum(tail) / len(tail) <= sum(at_peak) / len(at_peak):
        return None
    return (
        f"During PPO the gold score peaked at step {peak_step:g} ({score(peak)}) and ended at {score(end)} "
        f"at step {end_step:g}, while the reward-model score went on rising: "
        "stop earlier or raise the KL coefficient."
    )


def _hacked(data: Evaluation, split: str) -> bool:
    rewards, gold = data.change(split, "reward"), data.change(split, "gold")
    return bool(rewards and gold and rewards[1] > rewards[0] and gold[1] - gold[0] <= -SHOWN)


def _hacking(data: Evaluation, splits: list[str], model: str) -> str:
    told = []
    for split in splits:
        rewards, gold = data.change(split, "reward"), data.change(split, "gold")
        if rewards and gold:
            told.append(
                f"on {split} prompts the reward-model score rose from {score(rewards[0])} to "
                f"{score(rewards[1])} while the gold score fell from {score(gold[0])} to {score(gold[1])}"
            )
    return (
        f"REWARD HACKING: {'; '.join(told)}. "
        f"{model} learned to please the reward model, not to answer better. "
        "Raise the KL coefficient, stop earlier, or train the reward model on fresh samples."
    )


def _regressions(data: Evaluation) -> str:
    """Rates that got worse beyond chance, worst first, at most three."""
    found = []
    for split in data.splits:
        for name, about in EVALUATION.items():
            change = data.change(split, name) if about.unit == "rate" and name != "win_rate" else None
            if change and data.judged(split, name, *change) == "worse":
                text = (
                    f"{about.label} went from {percent(change[0])} to {percent(change[1])} on {split} prompts"
                )
                found.append((abs(change[1] - change[0]), text))
    return "; ".join(text for _, text in sorted(found, reverse=True)[:3])


def _stops(data: Evaluation) -> str | None:
    split, models = data.splits[0], data.models
    rates = {model: data.value(model, split, "stop_rate") for model in models}
    assistant = next((m for m in models if data.about(m).get("stage") == "sft" or m == "sft"), models[-1])
    first, rate, before = models[0], rates[assistant], rates[models[0]]
    if rate is None:
        return None
    name, stop, start = model_name(assistant), f"({percent(rate)} stop)", f"the {model_name(first)} model"
    if rate < 0.9:
        return (
            f"The {name} model often does not stop {stop}; its demonstrations may lack the end of the answer."
        )
    if before is None or first == assistant:
        return f"The {name} model answers and stops {stop}."
    if before < 0.5:
        return f"The {name} model answers and stops {stop}; {start} does not ({percent(before)})."
    return f"The {name} model answers and stops {stop}, and so does {start} ({percent(before)})."


def _answers(data: Evaluation) -> str | None:
    split = data.splits[0]
    rates = [(model_name(m), data.value(m, split, "correct")) for m in data.models]
    told = [f"{name} {percent(rate)}" for name, rate in rates if rate is not None]
    return f"Right answers to factual questions on {split} prompts: {', '.join(told)}." if told else None


def _reward_model(data: Evaluation) -> str | None:
    told = []
    for split, entry in (data.raw.get("reward_model") or {}).items():
        accuracy = number((entry or {}).get("pair_accuracy"))
        pairs = number((entry or {}).get("num_pairs"))
        if accuracy is not None:
            told.append((accuracy, f"{percent(accuracy)} of {f'{pairs:.0f} ' if pairs else ''}{split} pairs"))
    if not told:
        return None
    text = " and ".join(part for _, part in told)
    weak = " This is little better than a coin." if min(accuracy for accuracy, _ in told) < 0.6 else ""
    return f"The reward model puts {text} in the right order.{weak}"


def _gold(data: Evaluation) -> str | None:
    split = data.splits[0]
    scores = [(model_name(m), data.value(m, split, "gold")) for m in data.models]
    told = [f"{name} {score(value)}" for name, value in scores if value is not None]
    return f"Gold score on {split} prompts: {', '.join(told)}." if told else None


def _conduct(data: Evaluation) -> str | None:
    split, told = data.splits[0], []
    for metric in ("honest", "harmless", "rude"):
        change = data.change(split, metric)
        if change and data.judged(split, metric, *change):
            told.append(f"{EVALUATION[metric].label} {percent(change[0])} to {percent(change[1])}")
    if not told or data.final is None:
        return None
    parent = data.parent(data.final)
    return (
        f"From {model_name(parent or '')} to {model_name(data.final)} on {split} prompts: {', '.join(told)}."
    )


def _wins(data: Evaluation) -> str | None:
    split = data.splits[0]
    if data.final is None:
        return None
    win, tie, lose = (data.value(data.final, split, name) for name in ("win", "tie", "lose"))
    parent = data.parent(data.final)
    if win is None or lose is None or parent is None:
        return None
    drawn = f", ties {percent(tie)}" if tie is not None else ""
    won = f"{model_name(data.final)} wins {percent(win)} against {model_name(parent)}"
    return f"{won}{drawn} and loses {percent(lose)}."
