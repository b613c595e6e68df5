"""A reward model's report as the page shows it: tables of accuracies, a reliability plot, a histogram, sentences."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup, escape

from rayllm.report.charts import BOTTOM, LEFT, RIGHT, TOP, WIDTH, nice_ticks, tick_label
from rayllm.report.glossary import count, number, percent, score
from rayllm.report.samples import clean

HEIGHT = 150

GROUPS = (
    ("by_margin", "by margin of the label"),
    ("by_category", "by category"),
    ("by_labeler", "by labeler"),
    ("by_agreement", "by agreement of labelers"),
)


def reward_view(report: dict[str, Any]) -> dict[str, Any] | None:
    """What the template needs; None without a report."""
    if not report:
        return None
    tables = [("", [{"group": "all pairs", **report["accuracy"]}])]
    tables += [(title, report[key]) for key, title in GROUPS if report[key]]
    tables.append(("by length", report["length"]["accuracy"]))
    if report["ensemble"]:
        tables.append(("by agreement of the heads", report["ensemble"]["by_spread"]))
    return {
        "verdict": report["verdict"],
        "facts": f"{count(report['num_pairs'])} pairs of {count(report['num_responses'])} responses to "
        f"{count(report['num_prompts'])} prompts",
        "tables": [{"title": title, "rows": [_row(row) for row in rows]} for title, rows in tables],
        "sentences": [*_calibration(report), *_length(report["length"]), *_ensemble(report["ensemble"])],
        "reliability": reliability(report["calibration"]),
        "histogram": histogram(report["scores"]),
        "disagreements": [_disagreement(entry) for entry in report["disagreements"]],
    }


def _row(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "group": row["group"],
        "accuracy": percent(number(row["accuracy"])),
        "share": row["accuracy"],
        "interval": f"{100 * row['low']:.0f} to {100 * row['high']:.0f} %",
        "pairs": count(row["pairs"]),
    }


def _calibration(report: dict[str, Any]) -> list[str]:
    found, right = report["calibration"], report["accuracy"]["accuracy"]
    gap = found["confidence"] - right
    told = "about as right as sure"
    if abs(gap) > 0.03:
        told = "too sure of itself" if gap > 0 else "less sure than it could be"
    return [
        f"Calibration: expected error {percent(found['error'])}; it is {percent(found['confidence'])} sure on average "
        f"and {percent(right)} right, so {told}. Loss {found['loss']:.3f} nats a pair (a coin: 0.693)."
    ]


def _length(found: dict[str, Any]) -> list[str]:
    within = number(found["correlation_within_prompts"])
    if within is None or found["labels_prefer_longer"] is None:
        return ["Length: the responses to a prompt are all of one length, or all of one reward."]
    return [
        f"Length: correlation with the reward {score(within)} among the responses to one prompt; the model prefers the "
        f"longer one in {percent(found['model_prefers_longer'])} of the pairs of unequal length, the labels in "
        f"{percent(found['labels_prefer_longer'])}."
    ]


def _ensemble(found: dict[str, Any] | None) -> list[str]:
    if not found:
        return []
    heads = ", ".join(percent(value) for value in found["heads"])
    return [f"Ensemble: its heads by themselves {heads}; they differ by {found['spread']:.2f} deviations on average."]


def _disagreement(entry: dict[str, Any]) -> dict[str, Any]:
    tags = [clean(entry[key], 60) for key in ("category", "labeler") if entry.get(key)]
    answers = zip(("labelers prefer", "the model prefers"), ("better", "worse"), entry["rewards"], strict=True)
    return {
        "prompt": clean(entry["prompt"]),
        "tags": tags,
        "sure": percent(1 - entry["chance"]),
        "answers": [{"who": who, "text": clean(entry[key]), "reward": score(reward)} for who, key, reward in answers],
    }


def reliability(found: dict[str, Any]) -> Markup:
    """How often it is right (up) against how sure it is (across), a dot a bin, its area by the number of pairs."""
    most = max(entry["pairs"] for entry in found["bins"])
    ticks = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    low = min(0.5, *(entry["accuracy"] for entry in found["bins"]))
    levels = [tick for tick in nice_ticks(low, 1.0, 5) if tick <= 1]

    def x(value: float) -> float:
        return LEFT + (value - 0.5) / 0.5 * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (levels[-1] - value) / (levels[-1] - levels[0]) * HEIGHT

    parts = [_level(y(level), tick_label(level, "rate")) for level in levels]
    parts += [_place(x(tick), tick_label(tick, "rate")) for tick in ticks]
    parts.append(f'<path class="line c3" stroke-dasharray="4 4" d="M{x(0.5):.1f},{y(0.5):.1f}L{x(1):.1f},{y(1):.1f}"/>')
    points = [(x(entry["confidence"]), y(entry["accuracy"]), entry["pairs"]) for entry in found["bins"]]
    parts.append(f'<path class="line c0" d="M{"L".join(f"{a:.1f},{b:.1f}" for a, b, _ in points)}"/>')
    parts += [
        f'<circle class="dot c0" cx="{a:.1f}" cy="{b:.1f}" r="{2 + 5 * (pairs / most) ** 0.5:.1f}"/>'
        for a, b, pairs in points
    ]
    told = "; ".join(f"{percent(e['confidence'])} sure, {percent(e['accuracy'])} right" for e in found["bins"])
    return _svg(parts, f"Reliability: {told}.")


def histogram(found: dict[str, Any]) -> Markup:
    """Rewards of the best responses of each prompt and of the others, in deviations."""
    edges = found["edges"]
    levels = nice_ticks(0, max(*found["best"], *found["others"], 1), 3)
    ticks = [tick for tick in nice_ticks(edges[0], edges[-1], 6) if edges[0] <= tick <= edges[-1]]

    def x(value: float) -> float:
        return LEFT + (value - edges[0]) / (edges[-1] - edges[0]) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (1 - value / levels[-1]) * HEIGHT

    parts = [_level(y(level), tick_label(level)) for level in levels]
    parts += [_place(x(tick), tick_label(tick)) for tick in ticks]
    for color, name in enumerate(("best", "others")):
        steps = "".join(
            f"L{x(low):.1f},{y(height):.1f}L{x(high):.1f},{y(height):.1f}"
            for low, high, height in zip(edges[:-1], edges[1:], found[name], strict=True)
        )
        outline = f"M{x(edges[0]):.1f},{y(0):.1f}{steps}L{x(edges[-1]):.1f},{y(0):.1f}Z"
        parts.append(f'<path class="area c{color}" d="{outline}"/>')
    return _svg(parts, "Rewards of the best response of each prompt and of the others.")


def _level(y: float, label: str) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>'
    )


def _place(x: float, label: str) -> str:
    bottom = TOP + HEIGHT
    return (
        f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 3}"/>'
        f'<text class="tick" x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{label}</text>'
    )


def _svg(parts: list[str], described: str) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {TOP + HEIGHT + BOTTOM}" role="img" aria-label="{escape(described)}">'
        f"{''.join(parts)}</svg>"
    )


