"""Alarms of an RL run: each bound by hand, from both sides; NaN is out of every bound; silence where all is well."""

from __future__ import annotations

import math

import pytest

from rayllm.algorithms.alarms import alarms

FINE = {
    "objective/kl": 1.5, "response/length_mean": 15.0, "policy/approx_kl": 0.01, "policy/ratio_max": 3.0,
    "objective/entropy": 0.5,
}  # fmt: skip


@pytest.mark.scorecard("R54")
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"objective/kl": 31.0}, "drift from the reference: 2.07 nats a token, over 2"),
        ({"objective/kl": math.nan}, "drift from the reference: nan"),
        ({"objective/kl": -0.001}, "by k3: -0.001 nats; below 0 it is of other tokens"),
        ({"policy/approx_kl": 0.6}, "this step moved the policy 0.6 nats a token, over 0.5"),
        ({"policy/ratio_max": 1001.0}, "probability ratio of new to old policy: 1e+03, over 1000"),
        ({"policy/ratio_max": math.inf}, "probability ratio of new to old policy: inf"),
        ({"objective/entropy": 0.0009}, "entropy: 0.0009 nats a token, below 0.001"),
    ],
)
def test_what_is_out_of_bounds_is_told_alone(change, text):
    (found,) = alarms({**FINE, **change}, kl_estimator="k3")
    assert text in found


@pytest.mark.scorecard("R54")
def test_at_the_bounds_and_without_metrics_there_is_silence():
    at = {"objective/kl": 30.0, "policy/approx_kl": 0.5, "policy/ratio_max": 1000.0, "objective/entropy": 0.001}
    assert alarms({**FINE, **at}, kl_estimator="k3") == []
    assert alarms({**FINE, "objective/kl": -0.001}, kl_estimator="k1") == []  # k1 is a difference, and may be
    assert alarms({}, kl_estimator="k3") == []
