"""The raw text of the toy world: what a crawler would bring home, junk included.

Nine kinds of paragraph. Lists of questions without answers teach a base model to answer a question with
more questions; forum talk brings rudeness and bad deeds. Junk is labelled with the reason for which a
cleaner should drop it, so that a cleaner's precision and recall can be measured.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rayllm.world.facts import (
    DAYS,
    FACT_FAMILIES,
    FACTS,
    PEOPLE,
    UNSAFE_DEEDS,
    Fact,
    capitalized,
    invented_name,
    questions_about,
    with_article,
)
from rayllm.world.phrases import BAD_INSTRUCTIONS, RUDE

KEEP = "keep"
REASONS = ("exact_duplicate", "near_duplicate", "html", "symbols", "language", "repetition", "too_short")
"""Every reason to drop a paragraph."""

_RECENT = 400  # copies are made of one of this many last kept paragraphs
_MIN_NEAR_DUPLICATE_WORDS = 20  # one changed word in fewer is not "nearly the same"
_ALL_FAMILIES = (*FACT_FAMILIES, "howto")
_PLACES = ("park", "farm", "shop", "school", "river")
_MOODS = ("happy", "sad", "loud", "quiet")
_ANIMALS = tuple(fact.entity for fact in FACTS["young"])
_NOISY_ANIMALS = tuple(fact.entity for fact in FACTS["sound"])
_SPANISH = ("el", "la", "perro", "casa", "y", "de", "que", "en", "los", "gato", "rojo", "noche", "buenos",
            "dias", "amigo")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Paragraph:
    """One raw paragraph and what should become of it."""

    text: str
    """Never empty, without line breaks."""
    reason: str
    """"keep", or the member of REASONS for which a cleaner should drop it. Duplicates are meant within
    one stream and after the other filters: a repeated HTML menu is "html", not a duplicate."""


def write_paragraph(rng: random.Random) -> str:
    """A clean paragraph of a random kind, in the proportions of _KINDS."""
    (write,) = rng.choices(_WRITERS, cum_weights=_CUMULATIVE)
    return write(rng)


def documents(num_paragraphs: int, *, seed: int, junk: float = 0.0) -> list[Paragraph]:
    """A stream of paragraphs, the same for the same arguments.

    Args:
        num_paragraphs: length of the stream, junk included.
        seed: any integer.
        junk: share of junk, in [0, 1]. With 0 all are to be kept.

    Kept paragraphs are distinct. Duplicates copy one of the last 400 kept ones.

    Raises:
        ValueError: a negative number of paragraphs or a share outside [0, 1].
    """
    if num_paragraphs < 0 or not 0 <= junk <= 1:
        raise ValueError(f"need num_paragraphs >= 0 and junk in [0, 1], got {num_paragraphs} and {junk}")
    rng = random.Random(f"documents-{seed}")
    seen: set[str] = set()
    recent: deque[str] = deque(maxlen=_RECENT)
    stream = []
    for _ in range(num_paragraphs):
        if rng.random() < junk:
            paragraph = _write_junk(rng, recent, seen)
        else:
            paragraph = Paragraph(text=_write_unseen(rng, seen), reason=KEEP)
            recent.append(paragraph.text)
        seen.add(paragraph.text)
        stream.append(paragraph)
    return stream


def pages(texts: Sequence[str], *, seed: int) -> list[str]:
    """Join paragraphs, in order, into pages of 8 to 20 lines; the last page takes what is left.

    A page goes on for many paragraphs, so a base model trained on pages has no habit of stopping.
    """
    rng = random.Random(f"pages-{seed}")
    joined, start = [], 0
    while start < len(texts):
        size = rng.randint(8, 20)
        joined.append("\n".join(texts[start : start + size]))
        start += size
    return joined


def _write_unseen(rng: random.Random, seen: set[str]) -> str:
    text = write_paragraph(rng)
    while text in seen:
        text = write_paragraph(rng)
    return text


def _random_fact(rng: random.Random, families: Sequence[str]) -> Fact:
    return rng.choice(FACTS[rng.choice(families)])


def _facts_of_one_family(rng: random.Random, least: int, most: int) -> list[Fact]:
    return rng.sample(FACTS[rng.choice(_ALL_FAMILIES)], rng.randint(least, most))


def _fact_list(rng: random.Random) -> str:
    return " ".join(fact.statement for fact in _facts_of_one_family(rng, 3, 7))


def _mixed_facts(rng: random.Random) -> str:
    return " ".join(_random_fact(rng, _ALL_FAMILIES).statement for _ in range(rng.randint(3, 6)))


def _story(rng: random.Random) -> str:
    asker, teller = rng.sample(PEOPLE, 2)
    fact = _random_fact(rng, FACT_FAMILIES)
    animals = f"{with_article(rng.choice(_ANIMALS))} and {with_article(rng.choice(_NOISY_ANIMALS))}"
    sentences = [
        f"{asker} and {teller} went to the {rng.choice(_PLACES)} on {rng.choice(DAYS)}.",
        f'"{rng.choice(fact.questions)}" asked {asker}. "{fact.statement}" said {teller}.',
        f"{asker} was {rng.choice(_MOODS)} that day.",
        f"They saw {animals}.",
        f"Then {teller} went home.",
    ]
    return " ".join(sentences[: rng.randint(2, 5)])


def _question_list(rng: random.Random) -> str:
    return " ".join(rng.choice(fact.questions) for fact in _facts_of_one_family(rng, 3, 6))


def _faq(rng: random.Random) -> str:
    if rng.random() < 0.4:
        facts = _facts_of_one_family(rng, 2, 4)
    else:
        facts = [_random_fact(rng, _ALL_FAMILIES) for _ in range(rng.randint(2, 4))]
    return " ".join(f"Q: {rng.choice(fact.questions)} A: {fact.statement}" for fact in facts)


def _forum(rng: random.Random) -> str:
    exchanges = []
    for _ in range(rng.randint(1, 3)):
        fact = _random_fact(rng, _ALL_FAMILIES)
        asker, teller = rng.sample(PEOPLE, 2)
        exchanges.append(f"{asker}: {rng.choice(fact.questions)} {teller}: {_forum_reply(rng, fact)}")
    return " ".join(exchanges)


def _forum_reply(rng: random.Random, fact: Fact) -> str:
    """60 % plain, 20 % rude, 20 % curt (how-tos: plain)."""
    mood = rng.random()
    if mood < 0.6:
        return fact.statement
    if mood < 0.7:
        return f"{rng.choice(RUDE)} {fact.statement}"
    if mood < 0.8:
        return f"{fact.statement} {rng.choice(RUDE)}"
    return fact.statement if fact.family == "howto" else f"{capitalized(fact.answer)}."


def _bad_forum(rng: random.Random) -> str:
    deed = rng.choice(UNSAFE_DEEDS)
    asker, teller = rng.sample(PEOPLE, 2)
    if rng.random() < 0.6:
        reply = f"To {deed}, {rng.choice(BAD_INSTRUCTIONS)}."
    else:
        reply = "That is wrong. It could hurt someone."
    return f"{asker}: {rng.choice(questions_about('unsafe', deed))} {teller}: {reply}"


def _invented_place(rng: random.Random) -> str:
    place = invented_name(rng)
    if rng.random() < 0.5:
        return f"{place} is a made up place in a story. {rng.choice(PEOPLE)} wrote a book about {place}."
    return f"Nobody knows where {place} is."


def _small_talk(rng: random.Random) -> str:
    one, other = rng.sample(PEOPLE, 2)
    return rng.choice(
        (
            f"{one} said hello to {other} and asked for help.",
            f"Thank you so much, said {one}. You are welcome, said {other}.",
            f"{one} did not know the answer and said so to {other}.",
            f"It is kind to say please and thank you, said {one} to {other} on {rng.choice(DAYS)}.",
            f"Good morning, {other}, said {one}. How are you today? I am well, said {other}.",
            f"Hi there, {other}, said {one} in the {rng.choice(_PLACES)}. Hello again, said {other}.",
        )
    )


_KINDS: tuple[tuple[Callable[[random.Random], str], float], ...] = (
    (_fact_list, 0.16),
    (_mixed_facts, 0.10),
    (_story, 0.14),
    (_question_list, 0.12),
    (_faq, 0.24),
    (_forum, 0.14),
    (_bad_forum, 0.05),
    (_invented_place, 0.03),
    (_small_talk, 0.02),
)
_WRITERS = tuple(write for write, _ in _KINDS)
_CUMULATIVE = tuple(sum(share for _, share in _KINDS[: i + 1]) for i in range(len(_KINDS)))


def _write_junk(rng: random.Random, recent: Sequence[str], seen: set[str]) -> Paragraph:
    """One piece of junk: 35 % exact copies, 20 % near copies, the rest as in _JUNK_WRITERS.

    Before there is anything to copy, another kind takes the place of a copy.
    """
    kind = rng.random()
    if kind < 0.35 and recent:
        return Paragraph(text=rng.choice(recent), reason="exact_duplicate")
    if kind < 0.55:
        long_enough = [text for text in recent if text.count(" ") + 1 >= _MIN_NEAR_DUPLICATE_WORDS]
        if long_enough:
            text = _change_one_word(rng, rng.choice(long_enough), seen)
            return Paragraph(text=text, reason="near_duplicate")
    (reason,) = rng.choices(tuple(_JUNK_WRITERS), weights=(15, 10, 10, 5, 5))
    return Paragraph(text=_JUNK_WRITERS[reason](rng), reason=reason)


def _change_one_word(rng: random.Random, text: str, seen: set[str]) -> str:
    changed = text
    while changed in seen:
        words = text.split(" ")
        words[rng.randrange(len(words))] = rng.choice(PEOPLE)
        changed = " ".join(words)
    return changed


def _symbols(rng: random.Random) -> str:
    return "".join(rng.choices("#$%&*@!~^{}[]|<>0123456789", k=rng.randint(60, 160)))


_JUNK_WRITERS: dict[str, Callable[[random.Random], str]] = {
    "html": lambda rng: " ".join(
        ["<div class='nav'>Home | About | Login | Cookies</div>"] * rng.randint(2, 4)
    ),
    "symbols": _symbols,
    "language": lambda rng: " ".join(rng.choices(_SPANISH, k=rng.randint(15, 40))),
    "repetition": lambda rng: " ".join(
        [rng.choice(("buy now", "click here", "free prize"))] * rng.randint(10, 25)
    ),
    "too_short": lambda rng: rng.choice(("ok", "yes", "lol", "...", "hm")),
}
