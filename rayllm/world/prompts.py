"""Prompts of the toy world and their three splits.

``train``: entities that are not held out, in the phrasings 0, 1 and 3.
``new``: the same entities in phrasing 2 ("Tell me ..."), which no training prompt uses. Every prompt of
    this split is in such a phrasing, greetings too; its invented names are in no other split.
``held``: entities that appear in no chat data, in the phrasings of ``train``. It has no greetings: a
    reply to a greeting can only be learned from chat data.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayllm.world.facts import (
    FACT_FAMILIES,
    FACTS,
    HELD_OUT_PHRASING,
    PRIVATE_MATTERS,
    UNSAFE_DEEDS,
    Fact,
    invented_name,
    is_held_out,
    name_split,
    questions_about,
)
from rayllm.world.phrases import GREETINGS

KINDS = {"fact": 0.55, "howto": 0.08, "unknown": 0.17, "unsafe": 0.15, "chat": 0.05}
"""Kind of prompt -> its share. The split "held" has no "chat"; the others take its place."""
SPLITS = ("train", "new", "held")

_INVENTED_SHARE = 0.6  # of the unknown prompts; the others are private questions


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A question to the assistant, with what the judge needs to know about it."""

    kind: str
    """One of KINDS."""
    family: str
    """A family of facts, "howto", "invented", "private", "unsafe" or "chat"."""
    entity: str
    """What is asked about, unique in its family."""
    text: str
    """The prompt as the user types it."""
    answer: str | None = None
    """The shortest right answer; facts and how-tos only."""
    statement: str | None = None
    """The right answer as one full sentence; facts and how-tos only."""

    def to_row(self) -> dict[str, Any]:
        """A JSON-ready row; ``prompt`` is a chat of one user message."""
        return {
            "prompt": [{"role": "user", "content": self.text}],
            "kind": self.kind,
            "family": self.family,
            "entity": self.entity,
            "answer": self.answer,
            "statement": self.statement,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Prompt:
        """The inverse of ``to_row``. A missing or empty answer or statement is None; other keys are ignored.

        Raises:
            ValueError: the row has no single user message, or another required key is missing or unknown.
        """
        messages = row.get("prompt")
        one = isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], Mapping)
        if messages is None or not one or messages[0].get("role") != "user":
            raise ValueError(f"row['prompt'] must be a list of one user message, got {messages!r}")
        missing = [key for key in ("kind", "family", "entity") if not row.get(key)]
        if missing:
            raise ValueError(f"row of prompt {messages[0].get('content')!r} lacks {', '.join(missing)}")
        if row["kind"] not in KINDS:
            raise ValueError(f"row['kind'] is {row['kind']!r}, must be one of {', '.join(KINDS)}")
        return cls(
            kind=row["kind"],
            family=row["family"],
            entity=row["entity"],
            text=messages[0]["content"],
            answer=row.get("answer") or None,
            statement=row.get("statement") or None,
        )


def sample_prompts(num_prompts: int, *, split: str, seed: int) -> list[Prompt]:
    """Independent draws (prompts may repeat) in the proportions of KINDS.

    Raises:
        ValueError: unknown split or a negative number.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, must be one of {', '.join(SPLITS)}")
    if num_prompts < 0:
        raise ValueError(f"num_prompts must not be negative, got {num_prompts}")
    rng = random.Random(f"prompts-{split}-{seed}")
    shares = {kind: share for kind, share in KINDS.items() if split != "held" or kind != "chat"}
    kinds = rng.choices(tuple(shares), weights=tuple(shares.values()), k=num_prompts)
    return [_draw_prompt(rng, kind, split) for kind in kinds]


def _draw_prompt(rng: random.Random, kind: str, split: str) -> Prompt:
    held = split == "held"
    if kind in ("fact", "howto"):
        family = rng.choice(FACT_FAMILIES) if kind == "fact" else "howto"
        fact = rng.choice(_FACT_POOLS[held, family])
        return Prompt(
            kind=kind,
            family=family,
            entity=fact.entity,
            text=_choose_phrasing(rng, fact.questions, split),
            answer=fact.answer,
            statement=fact.statement,
        )
    if kind == "chat":
        entity = rng.choice(tuple(GREETINGS))
        text = _choose_phrasing(rng, GREETINGS[entity], split)
        return Prompt(kind=kind, family="chat", entity=entity, text=text)
    family, entity = _draw_unanswerable(rng, kind, split)
    text = _choose_phrasing(rng, questions_about(family, entity), split)
    return Prompt(kind=kind, family=family, entity=entity, text=text)


def _draw_unanswerable(rng: random.Random, kind: str, split: str) -> tuple[str, str]:
    """Family and entity of an unknown or unsafe prompt."""
    held = split == "held"
    if kind == "unsafe":
        return "unsafe", rng.choice(_ENTITY_POOLS[held, "unsafe"])
    if rng.random() >= _INVENTED_SHARE:
        return "private", rng.choice(_ENTITY_POOLS[held, "private"])
    name = invented_name(rng)
    while name_split(name) != split:
        name = invented_name(rng)
    return "invented", name


def _choose_phrasing(rng: random.Random, phrasings: tuple[str, ...], split: str) -> str:
    if split == "new":
        return phrasings[HELD_OUT_PHRASING]
    return rng.choice([text for i, text in enumerate(phrasings) if i != HELD_OUT_PHRASING])


_FACT_POOLS: dict[tuple[bool, str], tuple[Fact, ...]] = {
    (held, family): tuple(fact for fact in facts if is_held_out(family, fact.entity) == held)
    for held in (False, True)
    for family, facts in FACTS.items()
}
_ENTITY_POOLS: dict[tuple[bool, str], tuple[str, ...]] = {
    (held, family): tuple(entity for entity in entities if is_held_out(family, entity) == held)
    for held in (False, True)
    for family, entities in (("unsafe", UNSAFE_DEEDS), ("private", PRIVATE_MATTERS))
}
