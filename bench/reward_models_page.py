"""docs/reward-models.md and its picture, from the runs of bench/reward_models.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rayllm.report.charts import nice_ticks, tick_label

COLORS = {"ppo-single": "#b23a2a", "ppo-mean-std": "#2b5c8f", "ppo-worst": "#4c8a6d"}
LABELS = {
    "ppo-single": "one reward model",
    "ppo-mean-std": "ensemble, mean less 2 deviations",
    "ppo-worst": "ensemble, worst of its scores",
}
LEVELS = 5
"""Reward-model scores at which gold scores are compared."""

Points = list[dict[str, float]]


def write_page(
    losses: dict[str, Any],
    few_accuracies: Sequence[float],
    curves: dict[str, Points],
    *,
    few: int,
    human: str | None,
    out: Path,
) -> int:
    """Write what there is; returns 1 if a promise is not kept, 0 if all that could be checked are."""
    parts = [HEAD]
    kept = []
    if "pairwise" in losses:
        text, good = losses_part(losses)
        parts.append(text)
        kept.append(good)
    if "ppo-single" in curves and len(curves) > 1:
        (out / "overoptimisation.svg").write_text(picture(curves))
        text, good = curves_part(curves, few_accuracies, few=few)
        parts.append(text)
        kept.append(good)
    if human is not None:
        parts.append(HUMAN_PART.format(human))
    (out / "reward-models.md").write_text("\n\n".join([*parts, REPORT_PART]) + "\n")
    return 0 if all(kept) else 1


def losses_part(losses: dict[str, Any]) -> tuple[str, bool]:
    """The table of losses, and whether lists reach pairs at 60 % of their tokens."""
    pairwise = losses["pairwise"]
    rows = [
        "| loss | held-out pair accuracy | calibration error | tokens trained on | of pairwise |",
        "|---|---:|---:|---:|---:|",
    ]
    good = True
    for name, found in losses.items():
        mean, share = np.mean(found["accuracies"]), found["tokens"] / pairwise["tokens"]
        listed = ", ".join(f"{100 * value:.1f}" for value in found["accuracies"])
        rows.append(
            f"| {name} | {100 * mean:.1f} % ({listed}) | {100 * found['calibration']:.1f} % | {found['tokens']:,} | "
            f"{share:.0%} |"
        )
        if name != "pairwise":
            good &= bool(mean >= np.mean(pairwise["accuracies"])) and share <= 0.6
    settings = pairwise["settings"]
    seeds = len(pairwise["accuracies"])
    told = (
        f"The quickstart's noisy rankings (k = 4, equal answers merged), learning rate "
        f"{settings['optimizer']['learning_rate']:g}, {seeds} seed{'s' if seeds > 1 else ''} (in brackets); accuracy "
        f"on {pairwise['pairs']} pairs of {pairwise['prompts']} held-out prompts, labelled without noise. `pairwise` "
        "has each pair as a row of its own and reads a response once for every pair that it is in; the others read it "
        "once."
    )
    short = max(np.mean(pairwise["accuracies"]) - np.mean(found["accuracies"]) for found in losses.values())
    said = "Both losses over whole rankings reach pairwise's accuracy at no more than 60 % of its tokens."
    if not good:
        said = (
            f"At no more than 60 % of its tokens the losses over whole rankings come within {100 * short:.1f} points "
            f"of pairwise, on {seeds} seed{'s' if seeds > 1 else ''}; the standard error of such a difference is about "
            "one point. **That they reach it is not shown.**"
        )
    return "\n\n".join(["## The same labels, three losses", told, "\n".join(rows), said]), good


def at_level(points: Points, level: float) -> dict[str, float]:
    """Gold and KL where the run first reaches a reward-model score, by linear interpolation between evaluations."""
    for before, after in zip(points[:-1], points[1:], strict=True):
        if before["proxy"] <= level <= after["proxy"]:
            share = (level - before["proxy"]) / max(after["proxy"] - before["proxy"], 1e-9)
            return {key: before[key] + share * (after[key] - before[key]) for key in ("gold", "kl")}
    raise ValueError(f"no evaluation reaches {level}")


def curves_part(curves: dict[str, Points], accuracies: Sequence[float], *, few: int) -> tuple[str, bool]:
    """The table of gold scores at equal reward-model scores, and whether an ensemble keeps more of them."""
    start = max(points[0]["proxy"] for points in curves.values())
    end = min(max(point["proxy"] for point in points) for points in curves.values())
    levels = np.linspace(start, end, LEVELS + 1)[1:]
    rows = [
        "| reward-model score | " + " | ".join(LABELS[name] for name in curves) + " |",
        "|---:" * (len(curves) + 1) + "|",
    ]
    golds: dict[str, list[float]] = {name: [] for name in curves}
    for level in levels:
        cells = []
        for name, points in curves.items():
            found = at_level(points, float(level))
            golds[name].append(found["gold"])
            cells.append(f"{found['gold']:.2f} (KL {found['kl']:.1f})")
        rows.append(f"| {level:.2f} | " + " | ".join(cells) + " |")
    ends = [f"{p[-1]['gold']:.2f} at {p[-1]['proxy']:.2f} (KL {p[-1]['kl']:.1f})" for p in curves.values()]
    rows.append("| *end:* gold at score | " + " | ".join(ends) + " |")
    single = golds["ppo-single"]
    better = {
        name: float(np.mean(np.array(found) - np.array(single)))
        for name, found in golds.items()
        if name != "ppo-single"
    }
    listed = ", ".join(f"{100 * value:.0f}" for value in accuracies)
    told = (
        f"{len(accuracies)} reward models learn from the same {few} rankings, the first from the SFT model that PPO "
        "trains, each other from one that was pretrained and fine-tuned with another seed (held-out pair accuracy "
        f"{listed} %): few enough rankings that PPO finds what they get wrong. PPO "
        "runs against the first of them alone, and against all of them with a penalty where they disagree; it is given "
        "a large rate and a small KL coefficient so that it goes far. The reward-model score in the table is that of "
        "the first model in every run, in "
        "deviations of its held-out rewards; gold is the toy world's exact judge, on 200 held-out prompts."
    )
    gains = ", ".join(f"{LABELS[name]} {gain:+.2f}" for name, gain in better.items())
    good = all(gain > 0 for gain in better.values())
    said = f"Gold score at equal reward-model score, mean over the rows, against one reward model: {gains}."
    if not good:
        spreads = [(p[0]["spread"], p[-1]["spread"]) for name, p in curves.items() if name != "ppo-single"]
        listed = ", ".join(f"{first:.2f} to {last:.2f}" for first, last in spreads)
        said += (
            " **Not kept: an ensemble does not keep more of the gold score here.** On the way its members' deviation "
            f"goes from {listed}. Where it falls, they agree on what is wrong: the same start and the same labels make "
            "the same mistake, and no penalty on disagreement can see that (Eisenstein et al. 2023)."
        )
    text = [
        "## Over-optimisation: one reward model, and an ensemble that says where it is unsure",
        told,
        "\n".join(rows),
        said,
        "![Gold score and reward-model score over KL](overoptimisation.svg)",
        "Left and middle: the course of each run over its distance from the SFT model. Right: the one against the "
        "other; the further up at the same place, the less the policy lives off the reward model's mistakes.",
    ]
    return "\n\n".join(text), good


def picture(curves: dict[str, Points]) -> str:
    """Three panels as one SVG: reward-model score over KL, gold over KL, gold over reward-model score."""
    wide, high, gap = 300, 240, 60
    panels = (
        ("KL, nats an answer", "reward-model score", "kl", "proxy"),
        ("KL, nats an answer", "gold score", "kl", "gold"),
        ("reward-model score", "gold score", "proxy", "gold"),
    )
    parts = []
    for number, (across, up, x_key, y_key) in enumerate(panels):
        left = 50 + number * (wide + gap)
        xs, ys = ([p[key] for points in curves.values() for p in points] for key in (x_key, y_key))
        x_ticks, y_ticks = nice_ticks(min(xs), max(xs)), nice_ticks(min(ys), max(ys))
        x, y = _scale(x_ticks, left, left + wide), _scale(y_ticks, 20 + high, 20)
        for tick in y_ticks:
            parts.append(
                f'<line x1="{left}" x2="{left + wide}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#e4e2dc"/>'
            )
            parts.append(f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick_label(tick)}</text>')
        for tick in x_ticks:
            parts.append(f'<text x="{x(tick):.1f}" y="{high + 36}" text-anchor="middle">{tick_label(tick)}</text>')
        parts.append(f'<text x="{left + wide / 2}" y="{high + 54}" text-anchor="middle">{across}</text>')
        parts.append(f'<text x="{left}" y="12" font-weight="600">{up}</text>')
        for name, points in curves.items():
            path = "L".join(f"{x(point[x_key]):.1f},{y(point[y_key]):.1f}" for point in points)
            parts.append(
                f'<path d="M{path}" fill="none" stroke="{COLORS[name]}" stroke-width="2" stroke-linejoin="round"/>'
            )
    for number, name in enumerate(curves):
        at = 50 + number * 260
        parts.append(f'<rect x="{at}" y="{high + 68}" width="18" height="4" fill="{COLORS[name]}"/>')
        parts.append(f'<text x="{at + 24}" y="{high + 74}">{LABELS[name]}</text>')
    width, height = 50 + 3 * wide + 2 * gap + 20, high + 90
    style = 'font-family="system-ui, sans-serif" font-size="12" fill="#5c6168"'
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def _scale(ticks: list[float], start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (end - start)


HEAD = """# Reward models

Written by `bench/reward_models.py` from its runs on the toy world, on CPU:

```sh
.venv/bin/python -m bench.reward_models runs/quickstart runs/reward_models
```"""

HUMAN_PART = """## Real people's pairs

600 harmlessness pairs of Anthropic HH, read as they are (`rankings=hh.parquet`; what is longer than 512 tokens is
dropped and counted), by a model of a million parameters that has never seen a text outside the toy world. The report
says so:

> {}"""

REPORT_PART = """## The report

`rayllm reward-model` writes it into its run folder, `rayllm pipeline` shows it in the whole run's report, and
`rayllm reward-report model=... rankings=...` makes it for any reward model and any file of rankings or pairs.

![The reward model's part of report.html](reward-report.png)"""
