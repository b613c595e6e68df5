"""Ticks, downsampling and the way numbers are written in the report."""

from __future__ import annotations

import math

import pytest

from rayllm.report import charts, glossary
from rayllm.report.samples import clean


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (1, 600, [0, 200, 400, 600]),
        (-0.03, 0.04, [-0.04, -0.02, 0, 0.02, 0.04]),
        (0, 0.003, [0, 0.001, 0.002, 0.003]),
        (5, 5, [4.5, 4.75, 5, 5.25, 5.5]),
        (0, 0, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_nice_ticks(low, high, expected):
    assert charts.nice_ticks(low, high) == pytest.approx(expected)


def test_downsample_keeps_means_and_ranges():
    points = [(float(step), float(step % 2)) for step in range(1000)]
    means, ranges = charts.downsample(points, 200)
    assert (
        len(means) == 200 and means[-1] == (999.0, pytest.approx(0.5, abs=0.11)) and ranges[0] == (0.0, 1.0)
    )
    assert charts.downsample(points[:140]) == (points[:140], [])


def test_numbers_as_written():
    assert glossary.written(None, "rate") == glossary.written(math.nan, "score") == "–"
    assert [glossary.duration(s) for s in (0.44, 59.6, 185, 7620)] == [
        "0.4 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 07 min",
    ]
    assert glossary.grouped(-0.001, 2) == "0.00" and glossary.grouped(-12345.6, 1) == "−12\u202f345.6"
    assert [charts.tick_label(v) for v in (1500, 2e6, 0.0003, -0.5, 0)] == ["1.5k", "2M", "3e−4", "−0.5", "0"]
    assert charts.tick_label(0.25, "rate") == "25 %" and glossary.short_number(1.5e-6) == "1.5e−6"
    assert clean("a\x00b\n" + "x" * 800).startswith("a␀b\n") and "more characters" in clean("y" * 800)
