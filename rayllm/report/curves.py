"""Which logged metrics become which chart, and reading them from a stage's events."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rayllm.report import charts
from rayllm.report.charts import Panel, Series
from rayllm.report.glossary import Unit


@dataclass(frozen=True, slots=True)
class PanelSpec:
    """One pair of axes: ``lines`` are (metric, label) and those that were never logged are left out."""

    title: str
    lines: tuple[tuple[str, str], ...]
    meaning: str
    unit: Unit = "number"
    stacked: bool = False


@dataclass(frozen=True, slots=True)
class FigureSpec:
    """Panels under one heading and above one x-axis."""

    stage: str
    title: str
    panels: tuple[PanelSpec, ...]


LOSS = PanelSpec(
    "loss", (("train/loss", "training"), ("eval/loss", "held out")), "Mean loss per token, in nats."
)
BITS = PanelSpec(
    "bits per byte", (("eval/bits_per_byte", "held out"),), "Bits needed to predict one byte of unseen text."
)
PHASES = ("rollout", "score", "update", "sync")

FIGURES: tuple[FigureSpec, ...] = (
    FigureSpec("pretrain", "Pretraining", (LOSS, BITS)),
    FigureSpec("sft", "Supervised fine-tuning", (LOSS, BITS)),
    FigureSpec(
        "reward_model",
        "Reward model",
        (
            PanelSpec(
                "loss",
                (("train/loss", "training"), ("eval/loss", "held out")),
                "Mean negative log-likelihood of the labelled order, in nats.",
            ),
            PanelSpec(
                "pair accuracy",
                (("train/accuracy", "training"), ("eval/accuracy", "held out")),
                "Share of pairs where the preferred answer gets the higher score; 50 % is chance.",
                "rate",
            ),
        ),
    ),
    FigureSpec(
        "preference",
        "Preference optimisation",
        (
            PanelSpec(
                "loss",
                (("train/loss", "training"), ("eval/loss", "held out")),
                "Mean preference loss over prompts; its scale depends on the kind of loss.",
            ),
            PanelSpec(
                "accuracy",
                (("train/accuracy", "training"), ("eval/accuracy", "held out")),
                "Share of pairs where the preferred answer has the higher implicit reward; with KTO, share of answers "
                "on the right side of the reference point.",
                "rate",
            ),
            PanelSpec(
                "drift on the data's answers",
                (("train/kl", "training"), ("eval/kl", "held out")),
                "Mean log-probability under the reference minus that under the model, nats an answer: the KL from "
                "reference to model where the reference wrote the answers.",
            ),
        ),
    ),
    FigureSpec(
        "ppo",
        "PPO: is it better?",
        (
            PanelSpec(
                "reward",
                (("objective/rewards", "rollouts"), ("eval/reward", "held out")),
                "What PPO maximises; it should rise together with gold, or it is being exploited.",
            ),
            PanelSpec(
                "gold score",
                (("eval/gold", "held out"), ("objective/gold", "rollouts")),
                "Score by the judge that training never sees.",
            ),
            PanelSpec(
                "KL from the start",
                (("objective/kl", "nats per answer"),),
                "How far the policy moved from where it started; a healthy run stays below about 10.",
            ),
        ),
    ),
    FigureSpec(
        "ppo",
        "PPO: how does it answer?",
        (
            PanelSpec(
                "answer length",
                (("response/length_mean", "tokens"),),
                "Mean tokens of an answer in the rollouts.",
            ),
            PanelSpec(
                "stop rate",
                (("response/stop_rate", "rollouts"), ("eval/stop_rate", "held out")),
                "Share of answers that end by themselves.",
                "rate",
            ),
            PanelSpec(
                "entropy",
                (("objective/entropy", "nats per token"),),
                "Spread of the next-token distribution; a collapse means that the answers became all alike.",
            ),
        ),
    ),
    FigureSpec(
        "ppo",
        "PPO: where does a step's time go?",
        (
            PanelSpec(
                "seconds per step",
                tuple((f"time/{phase}", phase) for phase in PHASES),
                "Seconds of each phase, stacked; the rest of the step is not shown.",
                "seconds",
                True,
            ),
        ),
    ),
)


def _optimizer(**labels: str) -> tuple[PanelSpec, PanelSpec]:
    """Panels of the models whose metrics begin with these names, with their labels."""
    return (
        PanelSpec(
            "learning rate",
            tuple((f"{name}/lr", label) for name, label in labels.items()),
            "Step size of the optimizer.",
        ),
        PanelSpec(
            "gradient norm",
            tuple((f"{name}/grad_norm", label) for name, label in labels.items()),
            "Norm of the gradient before clipping.",
        ),
    )


_OPTIMIZER = (
    *_optimizer(train=""),
    PanelSpec(
        "tokens per second", (("perf/tokens_per_second", ""),), "Training tokens processed per second."
    ),
)

MORE_FIGURES: tuple[FigureSpec, ...] = (
    FigureSpec("pretrain", "Pretraining", _OPTIMIZER),
    FigureSpec("sft", "Supervised fine-tuning", _OPTIMIZER),
    FigureSpec(
        "reward_model",
        "Reward model",
        (
            PanelSpec(
                "margin",
                (("eval/margin", "held out"), ("train/margin", "training")),
                "Mean score of the preferred answer minus the other.",
            ),
            *_OPTIMIZER,
        ),
    ),
    FigureSpec(
        "ppo",
        "PPO: policy update",
        (
            PanelSpec(
                "policy loss", (("loss/policy", ""),), "Clipped surrogate loss; it hovers around zero."
            ),
            PanelSpec(
                "clip fraction",
                (("policy/clipfrac", ""),),
                "Share of tokens whose probability ratio was clipped; above 30 % the step is too large.",
                "rate",
            ),
            PanelSpec(
                "KL of one update",
                (("policy/approx_kl", ""),),
                "How far the policy moved within one step, in nats per token.",
            ),
        ),
    ),
    FigureSpec(
        "preference",
        "Preference optimisation",
        (
            PanelSpec(
                "implicit rewards",
                (("eval/chosen_rewards", "chosen"), ("eval/rejected_rewards", "rejected")),
                "Beta times the log-ratio of model to reference on held-out answers; both may fall, as long as the "
                "chosen ones fall less.",
            ),
            PanelSpec(
                "margin",
                (("eval/margin", "held out"), ("train/margin", "training")),
                "Mean implicit reward of the preferred answer minus the other.",
            ),
            PanelSpec(
                "reference point",
                (("train/reference_point", "training"),),
                "KTO only: estimated KL to the reference, at least 0, that rewards are compared with.",
            ),
            *_OPTIMIZER,
        ),
    ),
    FigureSpec(
        "ppo",
        "PPO: critic",
        (
            PanelSpec("value loss", (("loss/value", ""),), "Squared error of the critic."),
            PanelSpec(
                "explained variance",
                (("value/explained_variance", ""),),
                "Share of the variance of the returns that the critic predicts; below 0 it is harmful.",
            ),
        ),
    ),
    FigureSpec(
        "ppo",
        "PPO: machinery",
        (
            PanelSpec(
                "rollout mismatch",
                (("rollout/logprob_mismatch", ""),),
                "Mean difference of log-probabilities between the sampler and the trainer under the same weights; "
                "should be near 0.",
            ),
            PanelSpec(
                "age of the responses",
                (("off_policy/lag", "mean"), ("off_policy/lag_max", "oldest")),
                "Policy updates between sampling a token and training on it; bounded by max_policy_lag.",
            ),
            *_optimizer(policy="policy", critic="critic"),
            PanelSpec("seconds per step", (("time/step", ""),), "Sampling, scoring, update and sync."),
        ),
    ),
)


def series(events: Sequence[dict[str, Any]], name: str) -> tuple[tuple[tuple[float, float], ...], int]:
    """The (step, value) pairs of one metric, and how many logged values were NaN or infinite.

    A step that was logged twice (a resumed run goes over it again) keeps its last value.
    """
    values: dict[float, float] = {}
    not_finite = 0
    for event in events:
        metrics, step = event.get("metrics"), event.get("step")
        value = metrics.get(name) if isinstance(metrics, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not isinstance(step, int | float):
            continue
        if math.isfinite(value):
            values[float(step)] = float(value)
        else:
            not_finite += 1
    return tuple(sorted(values.items())), not_finite


def build(specs: Sequence[FigureSpec], events: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Figures for the template, sharing their x-axis within a stage; what was never logged is left out."""
    found = [
        (spec, [panel for panel in (_panel(p, events.get(spec.stage, [])) for p in spec.panels) if panel])
        for spec in specs
    ]
    figures = []
    for spec, panels in found:
        if not panels:
            continue
        x_domain = charts.domain([p for other, ps in found if other.stage == spec.stage for p in ps])
        heights = _fit(panels)
        figures.append(
            {
                "stage": spec.stage,
                "title": spec.title,
                "panels": [
                    _for_template(panel, x_domain, last=index == len(panels) - 1)
                    for index, panel in enumerate(heights)
                ],
            }
        )
    return figures


def _fit(panels: list[Panel]) -> list[Panel]:
    """A stacked panel that stands alone is as tall as three panels, so that a row of figures lines up."""
    if len(panels) == 1 and panels[0].stacked:
        return [
            Panel(
                title=p.title,
                series=p.series,
                unit=p.unit,
                meaning=p.meaning,
                stacked=True,
                height=352,
                not_finite=p.not_finite,
            )
            for p in panels
        ]
    return panels


def _panel(spec: PanelSpec, events: list[dict[str, Any]]) -> Panel | None:
    lines, bad = [], 0
    for index, (name, label) in enumerate(spec.lines):
        points, not_finite = series(events, name)
        color = index if spec.stacked else int(label == "held out")
        bad += not_finite
        if points:
            lines.append(Series(label=label or spec.title, points=points, color=color))
    if not lines:
        return None
    return Panel(
        title=spec.title,
        series=tuple(lines),
        unit=spec.unit,
        meaning=spec.meaning,
        stacked=spec.stacked,
        not_finite=bad,
    )


def _for_template(panel: Panel, x_domain: tuple[float, float], *, last: bool) -> dict[str, Any]:
    svg: Markup = charts.draw(panel, x_domain, show_steps=last)
    legend = [
        {
            "label": line.label if line.label != panel.title else "",
            "color": line.color,
            "value": charts.readout(line.points[-1][1], panel.unit),
        }
        for line in panel.series
    ]
    return {
        "title": panel.title,
        "meaning": panel.meaning,
        "svg": svg,
        "legend": legend,
        "not_finite": panel.not_finite,
    }
