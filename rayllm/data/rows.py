"""Rows that cannot be used: named by file, line, field and reason, counted, and bounded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rayllm.errors import InputError

Row = dict[str, Any]

SHOWN = 5
"""Bad rows that are quoted where there are many."""


class Place(NamedTuple):
    """Where a row stands. Text files count lines from 1, others rows from 0."""

    path: Path
    number: int
    unit: Literal["line", "row"]

    def __str__(self) -> str:
        return f"{self.path}:{self.number}" if self.unit == "line" else f"{self.path}: row {self.number}"


class RowError(ValueError):
    """A row is malformed: which field of it, and why."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason


class RowDropped(Exception):
    """A row is well-formed and of no use here, such as one that is too long; its text is the reason."""


@dataclass(frozen=True, slots=True)
class BadRow:
    place: Place
    field: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.field}: {self.reason}"


class BadRows:
    """Collects bad rows and ends the job when they are more than the bound."""

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.found: list[BadRow] = []

    def add(self, place: Place, error: RowError) -> None:
        """Note one more bad row.

        Raises:
            InputError: it is one too many; the text names the first few.
        """
        self.found.append(BadRow(place, error.field, error.reason))
        if len(self.found) <= self.limit:
            return
        if not self.limit:
            raise InputError(str(self.found[0]))
        lines = [str(row) for row in self.found[:SHOWN]]
        more = len(self.found) - len(lines)
        lines += [f"and {more} more"] if more else []
        raise InputError("\n".join([f"more than max_bad_rows={self.limit} bad rows:", *lines]))

    def facts(self) -> dict[str, Any]:
        """For the run record: their number and the first few, if there are any."""
        if not self.found:
            return {}
        return {"bad_rows": len(self.found), "first_bad_rows": [str(row) for row in self.found[:SHOWN]]}
