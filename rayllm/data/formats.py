"""The formats that people have, told by a row's columns; what each becomes is in conversions.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from rayllm.data import conversions as to
from rayllm.data.messages import is_hh
from rayllm.data.rows import Row, RowError

SchemaName = Literal["conversation", "ranking", "feedback", "steps", "prompt"]


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write a row of a schema."""

    name: str
    columns: tuple[str, ...]
    """All of them must hold a value; "a|b" is one of two."""

    convert: Callable[[Row], Row]
    fits: Callable[[Row], bool] = lambda row: True
    """What tells it from another format with the same columns."""

    def missing(self, row: Row) -> list[str]:
        """Columns that the row lacks."""
        return [c for c in self.columns if all(row.get(name) is None for name in c.split("|"))]


def detect(row: Row, schema: SchemaName, *, near: Format | None = None) -> Format:
    """The format of a row: the first of the schema whose columns it holds.

    Raises:
        RowError: none; it names the column that is missing from ``near``, or from the nearest.
    """
    formats = FORMATS[schema]
    for candidate in formats:
        if not candidate.missing(row) and candidate.fits(row):
            return candidate
    held = ", ".join(sorted(name for name, value in row.items() if value is not None)) or "nothing"
    nearest = near or max(formats, key=lambda f: (len(f.columns) - len(f.missing(row)), -len(f.missing(row))))
    if near is None and len(nearest.missing(row)) == len(nearest.columns):
        known = "; ".join(dict.fromkeys(", ".join(f.columns) for f in formats))
        raise RowError("columns", f"no format is known by {held}; a {schema} row needs one of: {known}")
    lacking, *others = (nearest.missing(row) or nearest.columns)[0].split("|")
    either = "".join(f", and no {other!r}" for other in others)
    raise RowError(lacking, f"missing{either}; the row holds {held} (read as {nearest.name})")


_RANKINGS = (
    Format("rankings", ("prompt", "responses", "ranks"), to.responses_ranking),
    Format("scored responses", ("prompt", "responses", "scores"), to.responses_ranking),
    Format("preference pairs", ("prompt", "chosen", "rejected"), to.explicit_pair),
    Format("Anthropic HH", ("chosen", "rejected"), to.hh_pair, fits=lambda row: is_hh(row["chosen"])),
    Format("preference pairs, implicit prompt", ("chosen", "rejected"), to.implicit_pair),
    Format("scored completions", ("prompt|instruction", "completions"), to.completions_ranking),
)

FORMATS: dict[SchemaName, tuple[Format, ...]] = {
    "conversation": (
        Format("OpenAI messages", ("messages",), to.openai_conversation),
        Format("ShareGPT", ("conversations",), to.sharegpt_conversation),
        Format("prompt and completion", ("prompt", "completion|response"), to.prompt_and_completion),
        Format("Alpaca", ("instruction", "output"), to.alpaca_conversation),
        Format("question and answer", ("question", "answer"), to.question_and_answer),
    ),
    "ranking": _RANKINGS,
    "feedback": (
        Format("unpaired feedback", ("prompt", "completion|response", "label"), to.unpaired_feedback),
        *(replace(f, convert=partial(to.ranking_feedback, f.convert)) for f in _RANKINGS),
    ),
    "steps": (Format("labelled steps", ("prompt", "completions", "labels"), to.labelled_steps),),
    "prompt": (
        Format("prompts", ("prompt",), to.plain_prompt),
        Format("OpenAI messages", ("messages",), to.messages_prompt),
        Format("GSM8K", ("question", "answer"), to.gsm8k_prompt),
    ),
}
"""Schema -> its formats; where a row has the columns of several, the first is meant."""
