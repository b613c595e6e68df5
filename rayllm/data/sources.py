"""From the sources of a job to its examples: read, converted, counted; split by prompt; mixed by weight."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rayllm.config.data import WeightedPath, sources_of
from rayllm.data.files import check_data_file, data_files, iter_rows
from rayllm.data.formats import Format, SchemaName, detect
from rayllm.data.rows import BadRows, Row, RowDropped, RowError

T = TypeVar("T")

Paths = Path | tuple[WeightedPath, ...]

PROMPT_TRAINED = "of a prompt to train on"
"""Why a held-out row is dropped."""


@dataclass
class Origins:
    """Where the kept rows came from, aligned to them; how they are split and mixed."""

    weights: tuple[float, ...] = (1.0,)
    """Of each source."""

    sources: list[int] = field(default_factory=list)
    """Index of each row's source."""

    prompts: list[str] = field(default_factory=list)
    """Text of each row's first user turn, by which rows are split."""

    facts: dict[str, Any] = field(default_factory=dict)
    """What was read as what, for the run record."""

    def split(self, fraction: float, *, seed: int) -> tuple[list[int], list[int]]:
        """(rows to train on, rows held out): about ``fraction`` of the prompts; training rows by their weights."""
        held = [is_held_out(prompt, fraction) for prompt in self.prompts]
        rows = range(len(held))
        return self.mix([row for row in rows if not held[row]], seed=seed), [row for row in rows if held[row]]

    def mix(self, rows: Collection[int], *, seed: int) -> list[int]:
        """``rows`` as often as the weight of their source says.

        Weight 2.5 is every row of the source twice and a half of them, drawn with the seed, once more. The order is
        that of the sources, each source's rows in theirs.
        """
        chosen: list[int] = []
        for source, weight in enumerate(self.weights):
            mine = [row for row in rows if self.sources[row] == source]
            whole = math.floor(weight)
            rest = np.random.default_rng((seed, source)).permutation(len(mine))[: round((weight - whole) * len(mine))]
            chosen += mine * whole + [mine[index] for index in sorted(rest.tolist())]
        return chosen

    def spread(self, groups: Sequence[Sequence[Any]]) -> Origins:
        """Where each row became a group of examples: the same, aligned to the examples."""
        return self.of([row for row, group in enumerate(groups) for _ in group])

    def of(self, rows: Sequence[int]) -> Origins:
        """Of these rows alone."""
        return Origins(self.weights, kept(self.sources, rows), kept(self.prompts, rows), self.facts)

    def apart_from(self, train: Origins, dropped: Mapping[str, int]) -> tuple[list[int], dict[str, int]]:
        """Rows of prompts that do not stand in ``train``, and ``dropped`` with the others counted."""
        known = set(train.prompts)
        rows = [row for row, prompt in enumerate(self.prompts) if prompt not in known]
        gone = len(self.prompts) - len(rows)
        return rows, {**dropped, PROMPT_TRAINED: gone} if gone else dict(dropped)


def is_held_out(prompt: str, fraction: float) -> bool:
    """Whether a prompt belongs to the held-out part: a function of its text alone, in every file and every job."""
    digest = hashlib.sha256(prompt.encode()).digest()  # a CRC puts prompts that differ in a digit all on one side
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def check_sources(paths: Paths, *, key: str) -> None:
    """Raise InputError unless every source can be opened."""
    for source in sources_of(paths):
        check_data_file(source.path, key=key)


def shown_paths(paths: Paths) -> str:
    """The sources, for a message."""
    return ", ".join(str(source.path) for source in sources_of(paths))


class Reader:
    """Reads rows of one schema from a job's sources; afterwards it knows what it read, dropped and refused.

    Args:
        paths: one path, or several with weights.
        schema: what a row becomes.
        max_bad_rows: bad rows that are passed over; one more ends the job.
    """

    def __init__(self, paths: Paths, schema: SchemaName, *, max_bad_rows: int = 0) -> None:
        self.sources = sources_of(paths)
        self.schema = schema
        self.bad = BadRows(max_bad_rows)
        self.dropped: Counter[str] = Counter()
        """Reason -> rows left out."""
        self.read: list[dict[str, Any]] = []

    def rows(self, make: Callable[[Row], T]) -> Iterator[tuple[int, T]]:
        """(index of the source, what ``make`` made of the converted row) of every usable row.

        ``make`` may raise RowError and RowDropped as a conversion may.

        Raises:
            InputError: more bad rows than the bound, or a file that cannot be read.
        """
        for index, source in enumerate(self.sources):
            self.read.append({"path": str(source.path), "format": "", "rows": 0, "weight": source.weight})
            for file in data_files(source.path):
                found: Format | None = None
                for place, row in iter_rows(file):
                    self.read[index]["rows"] += 1
                    try:
                        if isinstance(row, RowError):
                            raise row
                        if found is None:
                            found = detect(row, self.schema)
                            self._note_format(index, found)
                        self._check_format(row, found)
                        made = make(found.convert(row))
                    except RowError as error:
                        self.bad.add(place, error)
                    except RowDropped as reason:
                        self.dropped[str(reason)] += 1
                    else:
                        yield index, made

    def collect(self, make: Callable[[Row], tuple[T, str]]) -> tuple[list[T], Origins]:
        """All rows at once; ``make`` gives an example and the text of its prompt."""
        origins = Origins(tuple(source.weight for source in self.sources))
        items: list[T] = []
        for source, (item, prompt) in self.rows(make):
            items.append(item)
            origins.sources.append(source)
            origins.prompts.append(prompt)
        origins.facts.update(self.facts())
        return items, origins

    def facts(self) -> dict[str, Any]:
        """For the run record: formats, rows read, sources where there are several, bad rows."""
        formats = dict.fromkeys(entry["format"] for entry in self.read if entry["format"])
        facts: dict[str, Any] = {"format": " and ".join(formats), "read": sum(entry["rows"] for entry in self.read)}
        if len(self.read) > 1:
            facts["sources"] = self.read
        return facts | self.bad.facts()

    def _check_format(self, row: Row, expected: Format) -> None:
        """One file holds one format: that of its first row which has one."""
        if expected.missing(row) or not expected.fits(row):
            other = detect(row, self.schema, near=expected)
            raise RowError("columns", f"this row reads as {other.name}, those before it as {expected.name}")

    def _note_format(self, source: int, found: Format) -> None:
        names = list(filter(None, self.read[source]["format"].split(" and ")))
        self.read[source]["format"] = " and ".join(dict.fromkeys([*names, found.name]))


def kept(items: Sequence[T], rows: Sequence[int]) -> list[T]:
    """The items of these rows."""
    return [items[row] for row in rows]
