"""What each metric is called, what it means, which direction is better, and how numbers are written.

The sentences appear as hover text in the report, so each is one plain sentence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

Unit = Literal["rate", "score", "bits", "nats", "tokens", "seconds", "number"]

DASH = "–"
THIN = "\u202f"  # narrow no-break space: groups thousands, keeps a unit with its number


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of the evaluation; ``better`` is +1 (more is better), -1 (less is better) or 0 (neither)."""

    label: str
    meaning: str
    unit: Unit
    better: int


EVALUATION: dict[str, Metric] = {
    "bits_per_byte": Metric(
        "bits per byte",
        "Bits needed to predict one byte of unseen text; does not depend on the tokenizer.",
        "bits",
        -1,
    ),
    "stop_rate": Metric(
        "stops", "Share of answers that end with the end-of-answer token before the length limit.", "rate", +1
    ),
    "correct": Metric("correct", "Share of sampled answers to factual questions that are right.", "rate", +1),
    "correct_greedy": Metric(
        "correct, greedy", "The same with the most likely token at each step instead of sampling.", "rate", +1
    ),
    "honest": Metric(
        "honest",
        "Share of questions nobody can answer where the model says that it does not know.",
        "rate",
        +1,
    ),
    "harmless": Metric("harmless", "Share of harmful requests that the model declines.", "rate", +1),
    "polite": Metric("polite", "Share of answers with a polite phrase.", "rate", +1),
    "rude": Metric("rude", "Share of answers with a rude phrase.", "rate", -1),
    "over_refusal": Metric(
        "over-refusal", "Share of harmless, answerable prompts that the model declines anyway.", "rate", -1
    ),
    "gold": Metric(
        "gold score",
        "Mean score by the judge that training never sees; the honest measure of quality.",
        "score",
        +1,
    ),
    "reward": Metric(
        "reward model",
        "Mean score by the reward model, which PPO maximises; compare its rise with that of gold.",
        "score",
        0,
    ),
    "win_rate": Metric(
        "win rate",
        "Share of prompts where this model beats its parent by gold score; a tie counts half.",
        "rate",
        +1,
    ),
    "kl": Metric(
        "KL",
        "How far the model moved from its parent: nats summed over an answer, mean over answers.",
        "nats",
        0,
    ),
    "length": Metric(
        "length", "Mean number of tokens in an answer; judges tend to prefer long ones.", "tokens", 0
    ),
}

ROWS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("text", ("bits_per_byte",)),
    ("answers", ("stop_rate", "correct", "correct_greedy")),
    ("conduct", ("honest", "harmless", "polite", "rude", "over_refusal")),
    ("preference", ("gold", "reward", "win_rate")),
    ("drift", ("kl", "length")),
)

UNIT_NAMES: dict[Unit, str] = {
    "nats": "nats per answer",
    "tokens": "tokens",
    "bits": "",
    "score": "",
    "rate": "",
    "seconds": "s",
    "number": "",
}


def number(value: Any) -> float | None:
    """``value`` as a finite float, else None; a bool is not a number here."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def grouped(value: float, decimals: int = 0) -> str:
    """A number with thin spaces between thousands and a true minus sign; zero never has a sign."""
    text = f"{value:,.{decimals}f}".replace(",", THIN)
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("-")
    return text.replace("-", "−")


def percent(value: float | None, decimals: int = 1) -> str:
    return DASH if value is None else f"{grouped(100 * value, decimals)} %"


def score(value: float | None) -> str:
    return DASH if value is None else grouped(value, 2)


def written(value: Any, unit: Unit) -> str:
    """A value as the tables show it; anything that is not a finite number is an en dash."""
    value = number(value)
    if value is None:
        return DASH
    if unit == "rate":
        return percent(value)
    return grouped(value, {"bits": 3, "tokens": 1}.get(unit, 2))


def short_number(value: float) -> str:
    """At most four significant digits: ``0.0003``, ``1.5e−6``, ``12.35``, ``12 350``."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return grouped(value)
    text = f"{value:.4g}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", "−")


def count(value: Any) -> str:
    """A count: 812, 12 350, 1.25 M, 3.4 G."""
    value = number(value)
    if value is None:
        return DASH
    for size, suffix in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{grouped(value / size, 2)} {suffix}"
    return grouped(value)


def duration(seconds: Any) -> str:
    """``0.4 s``, ``12 s``, ``3 min 05 s``, ``2 h 07 min``."""
    value = number(seconds)
    if value is None:
        return DASH
    if value < 9.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def date(text: Any) -> str:
    """An ISO time as ``12 November 2026, 09:30 UTC``; text that is no time is returned as it is."""
    try:
        moment = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return str(text) if text else DASH
    zone = f" {moment.tzname()}" if moment.tzinfo else ""
    return f"{moment.day} {moment:%B %Y, %H:%M}{zone}"


def short_id(identifier: Any) -> str:
    """The first 12 characters of a content id, without an algorithm prefix such as ``sha256:``."""
    return str(identifier).rsplit(":", 1)[-1][:12] if identifier else DASH


def model_name(name: str) -> str:
    """``base`` stays; short names of methods are written in capitals (``sft`` as ``SFT``)."""
    return name.upper() if name.isalpha() and len(name) <= 4 and name != "base" else name
