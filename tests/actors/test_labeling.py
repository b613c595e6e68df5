"""Chunks through Ray Data: what happens when an actor dies or fails, with actors that need no model."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.group import Role
from actors.labeling import CHUNK, Chunk, Stage, chunks_of, clear_parts, missing, read_part, run_stages


class Doubler:
    """Answers with twice the prompt's number."""

    def __init__(self, folder: Path, trouble: str | None = None) -> None:
        self.folder, self.trouble = folder, trouble

    async def __call__(self, table: pa.Table) -> pa.Table:
        chunk = Chunk.from_table(table)
        if self.trouble == "too much for one":
            (self.folder / f".pid-{os.getpid()}").touch()
            async with asyncio.timeout(60):
                while len(list(self.folder.glob(".pid-*"))) < 2:
                    await asyncio.sleep(0.05)
        if self.trouble == "dies once" and chunk.number == 2 and not (self.folder / ".died").exists():
            (self.folder / ".died").touch()
            os._exit(17)
        if self.trouble == "dies" and chunk.number == 2:
            os._exit(17)
        if self.trouble == "raises" and chunk.number == 2:
            raise ValueError("prompt 130 is too long")
        for row in chunk.rows:
            row["response_ids"] = [[2 * row["prompt_id"]]]
        return chunk.write(self.folder)


def chunks() -> list[Chunk]:
    return chunks_of("prompts", [{"prompt_id": i, "token_ids": [i]} for i in range(4 * CHUNK + 5)])


def run(folder: Path, todo: list[Chunk], trouble: str | None = None, max_actors: int = 1) -> int:
    written = []
    role = Role("rollout", 1, 1, 0)
    stage = Stage(Doubler, role, max_actors, at_once=2, arguments={"folder": folder, "trouble": trouble})
    run_stages(stage, None, to_sample=todo, on_done=written.append)
    return sum(written)


def check(folder: Path) -> None:
    found = [row for chunk in chunks() for row in read_part(chunk, folder)]
    assert [row["response_ids"] for row in found] == [[[2 * i]] for i in range(4 * CHUNK + 5)]


def test_parts_hold_every_row_once_and_only_missing_ones_are_made(local_ray, tmp_path):
    assert run(tmp_path, chunks(), "dies once") == 4 * CHUNK + 5  # and its actor is started again
    check(tmp_path)
    chunks()[1].path(tmp_path).unlink()
    before = chunks()[0].path(tmp_path).stat().st_mtime_ns
    todo = missing(chunks(), tmp_path)
    assert [chunk.number for chunk in todo] == [1] and run(tmp_path, todo) == CHUNK
    check(tmp_path)
    assert chunks()[0].path(tmp_path).stat().st_mtime_ns == before


def test_more_actors_are_started_while_chunks_wait(local_ray, tmp_path):
    assert run(tmp_path, chunks(), "too much for one", max_actors=2) == 4 * CHUNK + 5
    check(tmp_path)


@pytest.mark.parametrize(
    ("trouble", "message"), [("raises", "label: ValueError: prompt 130 is too long"), ("dies", "label: an actor died")]
)
def test_what_goes_wrong_every_time_fails_the_job_and_leaves_the_rest(
    local_ray, tmp_path, monkeypatch, trouble, message
):
    monkeypatch.setattr("actors.labeling.MAX_RESTARTS", 1)
    with pytest.raises(RuntimeError, match=message):
        run(tmp_path, chunks(), trouble)
    left = missing(chunks(), tmp_path)
    assert 2 in [chunk.number for chunk in left] and len(left) < 5
    assert run(tmp_path, left) == sum(len(chunk.rows) for chunk in left)
    check(tmp_path)


def test_what_a_killed_job_was_writing_is_no_part(tmp_path):
    aside = tmp_path / f".{chunks()[0].path(tmp_path).name}.1234"
    aside.write_bytes(b"PAR1 half of")
    assert len(missing(chunks(), tmp_path)) == 5
    clear_parts(tmp_path, unfinished_only=True)
    assert not aside.exists()
    chunks()[4].write(tmp_path)
    assert pq.read_table(chunks()[4].path(tmp_path)).num_rows == 5
    clear_parts(tmp_path, unfinished_only=True)
    assert len(missing(chunks(), tmp_path)) == 4
