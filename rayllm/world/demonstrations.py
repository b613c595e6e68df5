"""Demonstrations by a careless crowd: mostly good, often curt, rude, wrong, over-cautious or harmful.

The flaws are the point: rankings and RL have something to improve. The over-cautious and off-topic
styles are there so that a reward model sees a needless refusal lose.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from rayllm.world.facts import (
    ANSWERS,
    DAYS,
    FACT_FAMILIES,
    FACTS,
    PEOPLE,
    capitalized,
    is_held_out,
    state,
)
from rayllm.world.phrases import (
    BAD_INSTRUCTIONS,
    CLOSINGS,
    GREETING_REPLIES,
    OPENINGS,
    POINTERS,
    REASONS,
    REFUSALS,
    RUDE,
    SHORT_REFUSAL,
    SHORT_UNSURE,
    UNSURE,
)
from rayllm.world.prompts import Prompt

_ANSWER_STYLES = {
    "polite": 0.35,
    "plain": 0.28,
    "curt": 0.08,
    "rude": 0.12,
    "wrong": 0.07,
    "ramble": 0.07,
    "overcautious": 0.03,
}
STYLES = {
    "fact": _ANSWER_STYLES,
    "howto": _ANSWER_STYLES,
    "unknown": {"honest": 0.34, "rude": 0.08, "off": 0.12, "made_up": 0.46},
    "unsafe": {"refuse": 0.30, "rude": 0.08, "off": 0.12, "comply": 0.50},
    "chat": {"polite": 0.70, "rude": 0.15, "off": 0.15},
}
"""Kind of prompt -> style -> share."""

_ASIDES = tuple(
    fact.statement
    for family in FACT_FAMILIES
    for fact in FACTS[family]
    if not is_held_out(family, fact.entity)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A response written by one of the crowd."""

    text: str
    style: str
    """What the writer meant to do, one of STYLES[prompt.kind]; the judge does not see it."""


def demonstrate(prompt: Prompt, rng: random.Random) -> Demonstration:
    """A response in a random style. Tells nothing about held-out entities but the prompt's own."""
    shares = STYLES[prompt.kind]
    (style,) = rng.choices(tuple(shares), weights=tuple(shares.values()))
    if prompt.kind in ("fact", "howto"):
        text = _write_answer(prompt, style, rng)
    elif prompt.kind == "unknown":
        text = _write_unknown(prompt, style, rng)
    elif prompt.kind == "unsafe":
        text = _write_unsafe(prompt, style, rng)
    else:
        text = _write_chat(prompt, style, rng)
    return Demonstration(text=text, style=style)


def _write_answer(prompt: Prompt, style: str, rng: random.Random) -> str:
    assert prompt.answer is not None and prompt.statement is not None
    right = prompt.statement
    if style == "polite":
        closes = rng.random() < 5 / 7
        return f"{right} {rng.choice(CLOSINGS)}" if closes else f"{rng.choice(OPENINGS)} {right}"
    if style == "plain":
        return right
    if style == "curt":
        return f"{capitalized(prompt.answer)}."
    if style == "rude":
        return f"{rng.choice(RUDE)} {right}" if rng.random() < 0.5 else f"{right} {rng.choice(RUDE)}"
    if style == "wrong":
        wrong = rng.choice([answer for answer in ANSWERS[prompt.family] if answer != prompt.answer])
        return state(prompt.family, prompt.entity, wrong)
    if style == "ramble":
        asides = rng.sample(_ASIDES, 3)
        return " ".join([right, *[aside for aside in asides if aside != right][: rng.randint(1, 2)]])
    assert style == "overcautious", style
    return _unsure_with_pointer(rng) if rng.random() < 0.5 else _refusal_with_reason(rng)


def _write_unknown(prompt: Prompt, style: str, rng: random.Random) -> str:
    if style == "honest":
        return _unsure_with_pointer(rng) if rng.random() < 2 / 3 else rng.choice(UNSURE)
    if style == "rude":
        return f"{rng.choice(RUDE)} {SHORT_UNSURE}"
    if style == "off":
        return _refusal_with_reason(rng)
    assert style == "made_up", style
    if prompt.family == "invented":
        return _maybe_closing(f"The capital of {prompt.entity} is {rng.choice(ANSWERS['capital'])}.", rng)
    return _maybe_closing(f"It is {rng.choice(rng.choice((ANSWERS['color'], PEOPLE, DAYS)))}.", rng)


def _write_unsafe(prompt: Prompt, style: str, rng: random.Random) -> str:
    if style == "refuse":
        return _refusal_with_reason(rng) if rng.random() < 2 / 3 else rng.choice(REFUSALS)
    if style == "rude":
        return f"{rng.choice(RUDE)} {SHORT_REFUSAL}"
    if style == "off":
        return _unsure_with_pointer(rng)
    assert style == "comply", style
    return _maybe_closing(f"To {prompt.entity}, {rng.choice(BAD_INSTRUCTIONS)}.", rng)


def _write_chat(prompt: Prompt, style: str, rng: random.Random) -> str:
    if style == "polite":
        return GREETING_REPLIES[prompt.entity]
    if style == "rude":
        return rng.choice(RUDE)
    assert style == "off", style
    return rng.choice((*UNSURE, *REFUSALS))


def _unsure_with_pointer(rng: random.Random) -> str:
    return f"{rng.choice(UNSURE)} {rng.choice(POINTERS)}"


def _refusal_with_reason(rng: random.Random) -> str:
    return f"{rng.choice(REFUSALS)} {rng.choice(REASONS)}"


def _maybe_closing(text: str, rng: random.Random) -> str:
    return f"{text} {rng.choice(CLOSINGS)}" if rng.random() < 0.4 else text
