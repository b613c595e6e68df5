"""What a step's metrics say when an RL run goes wrong, in words."""

from __future__ import annotations

from collections.abc import Mapping

KL_PER_TOKEN = 2.0
"""Nats a token of drift from the reference; runs that work stay below a tenth of it."""

APPROX_KL = 0.5
"""Nats a token that one step moves the policy; early stopping elsewhere begins at 0.02."""

RATIO = 1e3
"""Largest probability ratio of new to old policy: clipping bounds its gradient, not what led there."""

ENTROPY = 1e-3
"""Nats a token: the policy says one thing only, and nothing is left to compare."""

ROUNDING = 1e-4
"""Nats by which k3, at least 0 by its definition, may seem negative."""


def alarms(metrics: Mapping[str, float], *, kl_estimator: str) -> list[str]:
    """One line for everything that is out of bounds; metrics that are not there say nothing.

    Args:
        metrics: of one step.
        kl_estimator: of `objective/kl`.
    """
    found = []
    kl, length = metrics.get("objective/kl"), metrics.get("response/length_mean")
    if kl is not None and length and not kl / length <= KL_PER_TOKEN:
        found.append(f"drift from the reference: {kl / length:.3g} nats a token, over {KL_PER_TOKEN:g}")
    if kl is not None and kl_estimator == "k3" and kl < -ROUNDING:
        found.append(f"drift from the reference by k3: {kl:.3g} nats; below 0 it is of other tokens")
    if not metrics.get("policy/approx_kl", 0.0) <= APPROX_KL:
        found.append(f"this step moved the policy {metrics['policy/approx_kl']:.3g} nats a token, over {APPROX_KL:g}")
    if not metrics.get("policy/ratio_max", 0.0) <= RATIO:
        found.append(f"probability ratio of new to old policy: {metrics['policy/ratio_max']:.3g}, over {RATIO:g}")
    if not metrics.get("objective/entropy", 1.0) >= ENTROPY:
        found.append(f"entropy: {metrics['objective/entropy']:.3g} nats a token, below {ENTROPY:g}")
    return found
