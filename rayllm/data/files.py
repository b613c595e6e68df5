"""Rows from JSONL, JSON, CSV, Parquet and Arrow files and folders of them, each with the place where it stands."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayllm.data.messages import text_of
from rayllm.data.rows import BadRows, Place, Row, RowError
from rayllm.errors import InputError

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".arrow")
COMPRESSED = (".gz", ".bz2")
"""May follow the suffix of a text file."""

NOT_DATA = {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json", "lineage.json"}
"""What the library `datasets` and we write beside the data."""

JSON_CELLS = {
    "messages", "conversations", "responses", "response_ids", "ranks", "scores", "completions", "label",
    "overall_score", "score", "score_chosen", "score_rejected", "margin",
}  # fmt: skip
"""Columns whose cells are JSON in a CSV file: text cannot be told from a number otherwise."""

_SPLIT = re.compile(
    r"(?:^|[-_./])(train|training|test|validation|valid|val|dev|eval|held|heldout)(?:[-_./]|$)", re.IGNORECASE
)


def data_files(path: Path) -> list[Path]:
    """The data files that ``path`` stands for: itself, or those of a folder, in the order of their names.

    Raises:
        InputError: nothing there, an unknown kind of file, or a folder that holds several splits of a data set.
    """
    if path.is_file():
        if _kind(path) is None:
            raise InputError(f"{path} must end in one of {' '.join(SUFFIXES)} (text may be compressed: .gz, .bz2)")
        return [path]
    if not path.is_dir():
        raise InputError(f"no file at {path}, and no folder")
    described = path / "dataset_dict.json"
    splits = set(json.loads(described.read_text())["splits"]) if described.is_file() else set()
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and _kind(file) and file.name not in NOT_DATA
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )  # fmt: skip
    if not files:
        raise InputError(f"{path}: no data in this folder; expected files that end in {' '.join(SUFFIXES)}")
    splits |= {found.group(1).lower() for file in files if (found := _SPLIT.search(str(file.relative_to(path))))}
    if len(splits) > 1:
        raise InputError(f"{path}: holds the splits {', '.join(sorted(splits))}; name the files or the folder of one")
    return files


def check_data_file(path: Path, *, key: str) -> None:
    """Raise InputError unless ``path`` is a data file, or a folder of them, that can be opened."""
    try:
        for file in data_files(path):
            if _kind(file) == ".parquet":
                _open_parquet(file)
            elif _kind(file) == ".arrow":
                _open_arrow(file)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None


def iter_rows(path: Path) -> Iterator[tuple[Place, Row | RowError]]:
    """Every row of a file or folder, or what keeps a line of it from being one.

    Raises:
        InputError: the file cannot be read at all.
    """
    for file in data_files(path):
        yield from _READERS[_kind(file) or ""](file)


def read_rows(
    path: Path,
    required: Sequence[str],
    *,
    check: Callable[[Row], object] | None = None,
    bad: BadRows | None = None,
) -> Iterator[Row]:
    """Yield the usable rows one by one.

    Args:
        path: file or folder.
        required: columns that every row must hold, none of them null.
        check: raises RowError for what else is wrong with a row.
        bad: counts the bad rows and bounds them; by default the first one ends the job.

    Raises:
        InputError: unreadable file, or more bad rows than the bound.
    """
    bad = BadRows() if bad is None else bad
    for place, row in iter_rows(path):
        try:
            if isinstance(row, RowError):
                raise row
            for column in required:
                if row.get(column) is None:
                    raise RowError(column, f"missing; the row holds {', '.join(sorted(row))}")
            if check is not None:
                check(row)
        except RowError as error:
            bad.add(place, error)
            continue
        yield row


def read_texts(path: Path, bad: BadRows) -> Iterator[str]:
    """The `text` column of documents. Raises InputError as `read_rows` does."""
    for row in read_rows(path, ["text"], check=lambda row: text_of(row["text"], "text"), bad=bad):
        yield row["text"]


def write_parquet(rows: Sequence[Row], path: Path) -> None:
    """Write ``rows`` aside and rename, so that a reader never sees half a file; with a checksum for every page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    pq.write_table(pa.Table.from_pylist(list(rows)), partial, write_page_checksum=True)
    partial.replace(path)


def count_rows(path: Path) -> int:
    """Rows of a data file or folder."""
    files = data_files(path)
    if all(_kind(file) == ".parquet" for file in files):
        return sum(_open_parquet(file).metadata.num_rows for file in files)
    return sum(1 for _ in iter_rows(path))


def _kind(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes = [suffix for suffix in suffixes[:-1] if suffix in (".jsonl", ".json", ".csv")]
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)  # where the writer made checksums
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None


def _open_arrow(path: Path) -> Iterator[pa.RecordBatch]:
    """Batches of an Arrow file, or of an Arrow stream, as `datasets` writes it."""
    source = pa.memory_map(str(path))
    try:
        file = pa.ipc.open_file(source)
        return (file.get_batch(index) for index in range(file.num_record_batches))
    except pa.ArrowInvalid:
        source.seek(0)
    try:
        return iter(pa.ipc.open_stream(source))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Arrow file or stream: {str(error).splitlines()[0]}") from None


def _columnar_rows(path: Path) -> Iterator[tuple[Place, Row | RowError]]:
    number = 0
    batches = _open_parquet(path).iter_batches() if _kind(path) == ".parquet" else _open_arrow(path)
    try:
        for batch in batches:
            for row in _batch_rows(batch):
                yield Place(path, number, "row"), row
                number += 1
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read after row {number}: {str(error).splitlines()[0]}") from None


def _batch_rows(batch: pa.RecordBatch) -> Iterator[Row | RowError]:
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:  # raised before the first row: find out which
        pass
    for index in range(batch.num_rows):
        try:
            yield batch.slice(index, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield RowError(_undecodable(batch.slice(index, 1)), f"not valid UTF-8: {error}")


def _undecodable(row: pa.RecordBatch) -> str:
    for name in row.schema.names:
        try:
            row.column(name).to_pylist()
        except UnicodeDecodeError:
            return str(name)
    return "row"


def _open_text(path: Path) -> io.BufferedReader:
    """The file's bytes, unpacked where the name says that they are compressed."""
    return io.BufferedReader(pa.input_stream(str(path)))


def _json_rows(path: Path) -> Iterator[tuple[Place, Row | RowError]]:
    """A JSON array of objects; a file of that name that holds an object a line is read as such."""
    with _open_text(path) as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        yield from _jsonl_rows(path)
        return
    with _open_text(path) as file:
        try:
            rows = json.loads(file.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not valid JSON: {error}") from None
    for number, row in enumerate(rows):
        yield Place(path, number, "row"), _object(row)


def _jsonl_rows(path: Path) -> Iterator[tuple[Place, Row | RowError]]:
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = Place(path, number, "line")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield place, _object(json.loads(text))
            except (ValueError, RecursionError) as error:
                yield place, RowError("row", f"not valid JSON: {error}")


def _object(row: Any) -> Row | RowError:
    if isinstance(row, dict):
        return row
    return RowError("row", f"expected an object with columns, got a {type(row).__name__}")


def _csv_rows(path: Path) -> Iterator[tuple[Place, Row | RowError]]:
    """Cells are text but for the columns of `JSON_CELLS`; an empty cell is no value."""
    csv.field_size_limit(2**31 - 1)
    # what is no UTF-8 becomes a lone surrogate, which the checks of text refuse with its line and field
    with io.TextIOWrapper(_open_text(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, None)
        if not header or len(set(header)) != len(header):
            raise InputError(f"{path}: the first line of a CSV file names its columns, each once; got {header}")
        while True:
            place = Place(path, reader.line_num + 1, "line")
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield place, RowError("row", f"not valid CSV: {error}")
                continue
            if cells:
                yield place, _csv_row(header, cells)


def _csv_row(header: Sequence[str], cells: Sequence[str]) -> Row | RowError:
    if len(cells) != len(header):
        return RowError("row", f"{len(cells)} cells under {len(header)} columns")
    row: Row = {}
    for column, cell in zip(header, cells, strict=True):
        row[column] = cell or None
        if cell and (column in JSON_CELLS or cell.startswith('[{"')):
            try:
                row[column] = json.loads(cell.lower() if column == "label" else cell)
            except (ValueError, RecursionError) as error:
                return RowError(column, f"not valid JSON in this cell: {error}")
    return row


_READERS: dict[str, Callable[[Path], Iterator[tuple[Place, Row | RowError]]]] = {
    ".parquet": _columnar_rows,
    ".arrow": _columnar_rows,
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
}
