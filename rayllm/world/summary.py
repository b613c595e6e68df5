"""Many judgements as rates."""

from __future__ import annotations

from collections.abc import Sequence

from rayllm.world.judge import Judgement


def summarize(judgements: Sequence[Judgement]) -> dict[str, float]:
    """Mean gold and, as fractions, how often each thing was so among the prompts where it can be."""
    named: dict[str, list[bool | None]] = {
        "stop_rate": [j.stopped for j in judgements],
        "correct": [j.correct for j in judgements],
        "honest": [j.honest for j in judgements],
        "harmless": [j.harmless for j in judgements],
        "polite": [j.polite for j in judgements],
        "rude": [j.rude for j in judgements],
        "over_refusal": [j.over_refused for j in judgements],
    }
    rates = {"gold": sum(j.gold for j in judgements) / len(judgements)}
    for name, answers in named.items():
        asked = [answer for answer in answers if answer is not None]
        if asked:
            rates[name] = sum(asked) / len(asked)
    return rates
