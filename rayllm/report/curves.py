"""A stage's logged metrics, read from its events and drawn as the figures that are asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from markupsafe import Markup

from rayllm.report import charts
from rayllm.report.charts import Panel, Series
from rayllm.report.figures import FigureSpec, PanelSpec


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
        return [replace(panels[0], height=352)]
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
