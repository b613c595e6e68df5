"""Rows from Parquet and JSONL files, with errors that name file and line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayllm.errors import InputError

Row = dict[str, Any]


def check_data_file(path: Path, *, key: str) -> None:
    """Raise InputError unless ``path`` is a Parquet or JSONL file that can be opened."""
    if not path.is_file():
        raise InputError(f"{key}: no file at {path}")
    if path.suffix not in (".parquet", ".jsonl"):
        raise InputError(f"{key}: {path} must end in .parquet or .jsonl")
    if path.suffix == ".parquet":
        _open_parquet(path)


def read_rows(
    path: Path, required: Sequence[str], *, check: Callable[[Row], str | None] | None = None
) -> Iterator[Row]:
    """Yield the file's rows one by one.

    Args:
        path: Parquet or JSONL.
        required: columns that every row must hold, none of them null.
        check: returns what is wrong with a row, or None.

    Raises:
        InputError: unreadable file or bad row, with its line (JSONL, from 1) or row (Parquet, from 0).
    """
    for where, row in _parquet_rows(path, required) if path.suffix == ".parquet" else _jsonl_rows(path):
        for column in required:
            if row.get(column) is None:
                raise InputError(f"{where}: {column!r} is missing; the row holds {sorted(row)}")
        problem = check(row) if check is not None else None
        if problem:
            raise InputError(f"{where}: {problem}")
        yield row


def write_parquet(rows: Sequence[Row], path: Path) -> None:
    """Write ``rows`` aside and rename, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    pq.write_table(pa.Table.from_pylist(list(rows)), partial)
    partial.replace(path)


def count_rows(path: Path) -> int:
    """Rows of a data file."""
    if path.suffix == ".parquet":
        return _open_parquet(path).metadata.num_rows
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None


def _parquet_rows(path: Path, required: Sequence[str]) -> Iterator[tuple[str, Row]]:
    file = _open_parquet(path)
    names = file.schema_arrow.names
    for column in required:
        if column not in names:
            raise InputError(f"{path}: no column {column!r}; it has {', '.join(names)}")
    number = 0
    for batch in file.iter_batches():
        for row in batch.to_pylist():
            yield f"{path}: row {number}", row
            number += 1


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise InputError(f"{where}: not valid JSON: {error}") from None
            if not isinstance(row, dict):
                raise InputError(f"{where}: expected an object with columns, got a {type(row).__name__}")
            yield where, row
