"""Small line and area charts as inline SVG: ticks, paths, and the data that the hover script reads.

A chart is drawn at 360 units wide so that its text is readable at that width in pixels; wide pages put
several side by side. Every path carries its values in ``data-x`` and ``data-y`` (display strings), so the
script prints true values and never reads them back from pixels. Nothing depends on the script: without it,
the latest value stands beside each title.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from rayllm.report.glossary import Unit, short_number

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 360, 42, 10, 7, 20
MAX_POINTS = 140  # of a line; 2 pixels each, and a long run stays a small page
DOTS_UP_TO = 12  # series this short show their points

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line. ``points`` are finite (step, value) pairs, steps ascending and distinct."""

    label: str
    points: tuple[Point, ...]
    color: int = 0  # index into the page's palette


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One pair of axes; ``stacked`` draws areas on top of each other instead of lines."""

    title: str
    series: tuple[Series, ...]
    unit: Unit = "number"
    meaning: str = ""
    stacked: bool = False
    height: int = 104
    not_finite: int = 0  # logged values that were NaN or infinite, hence not drawn


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps steps and values to SVG coordinates."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    height: int

    def x(self, step: float) -> float:
        span = self.x_high - self.x_low
        share = (step - self.x_low) / span if span else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return TOP + (1 - share) * self.height


def nice_ticks(low: float, high: float, intervals: int = 4) -> list[float]:
    """Round values enclosing [low, high]; steps are 1, 2, 2.5 or 5 times a power of ten."""
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-12):
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / intervals
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    digits = 2 - math.floor(math.log10(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, digits) for index in range(first, last + 1)]


def tick_label(value: float, unit: Unit = "number") -> str:
    """A tick as short text: ``25 %``, ``1.5k``, ``2M``, ``3e−4``, ``0.25``."""
    if unit == "rate":
        return f"{short_number(round(100 * value, 6))} %"
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}".replace("-", "−")
    if 0 < abs(value) < 0.001:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")
    return f"{value:.6g}".replace("-", "−")


def downsample(
    points: Sequence[Point], limit: int = MAX_POINTS
) -> tuple[list[Point], list[tuple[float, float]]]:
    """At most ``limit`` points: means of equal runs of points, each at the last step of its run.

    Returns:
        The points, and the (lowest, highest) value of each run; no ranges when nothing was merged.
    """
    if len(points) <= limit:
        return list(points), []
    means, ranges = [], []
    for index in range(limit):
        run = points[index * len(points) // limit : (index + 1) * len(points) // limit]
        values = [value for _, value in run]
        means.append((run[-1][0], math.fsum(values) / len(values)))
        ranges.append((min(values), max(values)))
    return means, ranges


def stack(series: Sequence[Series]) -> list[list[Point]]:
    """Upper edge of each area: running sums over the steps of all series, a missing value counting zero."""
    steps = sorted({step for line in series for step, _ in line.points})
    total = dict.fromkeys(steps, 0.0)
    edges = []
    for line in series:
        for step, value in line.points:
            total[step] += value
        edges.append([(step, total[step]) for step in steps])
    return edges


def domain(panels: Sequence[Panel]) -> tuple[float, float]:
    """The first and last step of all panels, which then share one x-axis."""
    steps = [step for panel in panels for line in panel.series for step, _ in line.points]
    return min(steps), max(steps)


def draw(panel: Panel, x_domain: tuple[float, float], *, show_steps: bool) -> Markup:
    """The panel as one ``<svg>``. ``show_steps`` adds the labels of the x-axis below it."""
    drawn = [downsample(line.points) for line in panel.series]
    edges = stack([_thinned(line, points) for line, (points, _) in zip(panel.series, drawn, strict=True)])
    ticks = _value_ticks(panel, edges)
    scale = Scale(*x_domain, ticks[0], ticks[-1], panel.height)
    parts = [_grid(scale, ticks, panel.unit), _steps(scale, labels=show_steps)]
    if panel.stacked:
        parts += _areas(panel, scale, edges)
    else:
        for line, (points, ranges) in zip(panel.series, drawn, strict=True):
            parts.append(_line(line, points, ranges, scale, panel.unit))
    bottom = TOP + panel.height
    parts.append(f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{bottom}"/>')
    height = bottom + (BOTTOM if show_steps else 4)
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(describe(panel))}" '
        f'data-left="{LEFT}" data-right="{WIDTH - RIGHT}" '
        f'data-low="{_plain(x_domain[0])}" data-high="{_plain(x_domain[1])}">'
        f"{''.join(parts)}</svg>"
    )


def describe(panel: Panel) -> str:
    """The chart in words, for people who do not see it."""
    sentences = []
    for line in panel.series:
        (first, start), (last, end) = line.points[0], line.points[-1]
        sentences.append(
            f"{line.label} from {readout(start, panel.unit)} at step {_plain(first)} "
            f"to {readout(end, panel.unit)} at step {_plain(last)}"
        )
    return f"{panel.title}: {'; '.join(sentences)}."


def readout(value: float, unit: Unit) -> str:
    """A value as printed beside a chart's title."""
    if unit == "rate":
        return f"{100 * value:.1f} %".replace("-", "−")
    if not 0.01 <= abs(value) < 1000:
        return short_number(value)
    text = f"{value:.2f}" if unit == "seconds" else f"{value:#.4g}".rstrip(".")
    return text.replace("-", "−")


def _value_ticks(panel: Panel, edges: list[list[Point]]) -> list[float]:
    if panel.stacked:
        return nice_ticks(0.0, max(max(value for _, value in edges[-1]), 1e-9), 3)
    values = [value for line in panel.series for _, value in line.points]
    ticks = nice_ticks(min(values), max(values), 3)
    if panel.unit == "rate" and min(values) >= 0 and max(values) <= 1:
        ticks = [tick for tick in ticks if 0 <= tick <= 1]
    return ticks


def _grid(scale: Scale, ticks: list[float], unit: Unit) -> str:
    parts = []
    for tick in ticks:
        y = scale.y(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">'
            f"{tick_label(tick, unit)}</text>"
        )
    return "".join(parts)


def _steps(scale: Scale, *, labels: bool) -> str:
    if scale.x_high > scale.x_low:
        ticks = [
            t
            for t in nice_ticks(scale.x_low, scale.x_high)
            if scale.x_low <= t <= scale.x_high and t % 1 == 0
        ]
    else:
        ticks = [scale.x_low]
    bottom, parts = TOP + scale.height, []
    for tick in ticks:
        x = scale.x(tick)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 3}"/>')
        if labels:
            anchor = "end" if x > WIDTH - RIGHT - 10 else "middle"
            edge = WIDTH - RIGHT + 4 if anchor == "end" else x
            parts.append(
                f'<text class="tick" x="{edge:.1f}" y="{bottom + 15}" text-anchor="{anchor}">'
                f"{tick_label(tick)}</text>"
            )
    return "".join(parts)


def _line(
    line: Series, points: list[Point], ranges: list[tuple[float, float]], scale: Scale, unit: Unit
) -> str:
    parts = []
    if ranges:
        upper = [(step, high) for (step, _), (_, high) in zip(points, ranges, strict=True)]
        lower = [(step, low) for (step, _), (low, _) in zip(points, ranges, strict=True)]
        parts.append(f'<path class="band c{line.color}" d="{_path(upper, scale)}{_back(lower, scale)}Z"/>')
    parts.append(f'<path class="line c{line.color}" d="{_path(points, scale)}"{_data(points, unit)}/>')
    if len(points) <= DOTS_UP_TO:
        parts += [
            f'<circle class="dot c{line.color}" cx="{scale.x(step):.1f}" cy="{scale.y(value):.1f}" r="2.2"/>'
            for step, value in points
        ]
    return "".join(parts)


def _areas(panel: Panel, scale: Scale, edges: list[list[Point]]) -> list[str]:
    parts = []
    floor = [(step, 0.0) for step, _ in edges[0]]
    for line, edge in zip(panel.series, edges, strict=True):
        own = [(step, top - low) for (step, top), (_, low) in zip(edge, floor, strict=True)]
        path = f"{_path(edge, scale)}{_back(floor, scale)}Z"
        parts.append(f'<path class="area c{line.color}" d="{path}"{_data(own, panel.unit)}/>')
        floor = edge
    return parts


def _thinned(line: Series, points: list[Point]) -> Series:
    return Series(label=line.label, points=tuple(points), color=line.color)


def _path(points: Sequence[Point], scale: Scale) -> str:
    return "M" + "L".join(f"{scale.x(step):.1f},{scale.y(value):.1f}" for step, value in points)


def _back(points: Sequence[Point], scale: Scale) -> str:
    return "L" + _path(list(reversed(points)), scale)[1:]


def _data(points: Sequence[Point], unit: Unit) -> str:
    steps = " ".join(_plain(step) for step, _ in points)
    values = "|".join(readout(value, unit) for _, value in points)
    return f' data-x="{steps}" data-y="{values}"'


def _plain(step: float) -> str:
    return f"{step:.12g}"
