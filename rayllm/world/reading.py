"""Reading a response: text to sentences, each with the role it plays in the toy world."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from rayllm.world.phrases import CLOSINGS, OPENINGS, POINTERS, REASONS, REFUSALS, RUDE, SHORT_UNSURE, UNSURE

_UNSURE_MARKERS = ("i do not know", "i can not know", "nobody knows", "nobody can know")
_REFUSAL_MARKERS = ("not help with", "not help you with", "not help you to", "not tell you how to")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """One sentence of a response."""

    words: str
    """Its words as ``normalize`` gives them, never empty."""
    role: str
    """opening, closing, rude, unsure, pointer, refusal, reason, or other."""
    fixed: bool
    """Exactly one of the world's fixed sentences, which claims nothing."""
    is_question: bool

    def mentions(self, *phrases: str) -> bool:
        """Whether one of the normalized phrases stands in it."""
        return mentions_any(self.words, phrases)


def read_sentences(response: str) -> list[Sentence]:
    """The sentences of a response in order; ends at . ! ? or a line break."""
    pieces = re.findall(r"[^.!?\n]+[.!?]*", response)
    read = [(normalize(piece), piece.rstrip().endswith("?")) for piece in pieces]
    return [_make_sentence(words, is_question) for words, is_question in read if words]


def _make_sentence(words: str, is_question: bool) -> Sentence:
    fixed = words in _ROLE_OF_FIXED
    if fixed:
        role = _ROLE_OF_FIXED[words]
    elif mentions_any(words, _UNSURE_MARKERS):
        role = "unsure"
    else:
        role = "refusal" if mentions_any(words, _REFUSAL_MARKERS) else "other"
    return Sentence(words=words, role=role, fixed=fixed, is_question=is_question)


def normalize(text: str | None) -> str:
    """Lower case, contractions of "not" written out, everything but letters and digits as one space."""
    text = (text or "").lower().replace("\u2019", "'")
    for short, full in (("cannot", "can not"), ("can't", "can not"), ("won't", "will not"), ("n't", " not")):
        text = text.replace(short, full)
    return re.sub(r"[^a-z0-9]+", " ", text).strip()


def mentions_any(words: str, phrases: Iterable[str]) -> bool:
    """Whether one of the phrases stands in the text as whole words."""
    padded = f" {words} "
    return any(f" {phrase} " in padded for phrase in phrases)


def without(words: str, phrase: str) -> str:
    """The words with every occurrence of the phrase taken out."""
    return " ".join(f" {words} ".replace(f" {phrase} ", "  ").split())


_ROLE_OF_FIXED = {
    normalize(phrase): role
    for role, phrases in (
        ("opening", OPENINGS),
        ("closing", CLOSINGS),
        ("rude", RUDE),
        ("unsure", (*UNSURE, SHORT_UNSURE)),
        ("pointer", POINTERS),
        ("refusal", REFUSALS),
        ("reason", REASONS),
    )
    for phrase in phrases
}
