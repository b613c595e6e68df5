"""What this process has done so far, counted where it is done: what a watched actor is judged by (``watched.py``)."""

from __future__ import annotations

from collections import Counter

counters: Counter[str] = Counter()
"""Of this process; an actor has one to itself."""


def count(name: str, amount: int = 1) -> None:
    """This process has done ``amount`` more of something; from any thread."""
    counters[name] += amount
