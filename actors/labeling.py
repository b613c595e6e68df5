"""Answers sampled, scored and kept as one Ray Data job: prompts in chunks go in, finished parts are on disk.

    chunks of prompts -> Sampler (vLLM) -> Scorer (reward model) -> one part a chunk
    chunks of answers given ----------------^

Chunks stream: an engine samples some while the scorer has others. A part holds all rows of its chunk and appears by a
rename. Its name says which chunk it is and a sample's seed comes from its prompt's number, so that a job which was
killed asks for the chunks without a part and ends with what it would have had.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.exceptions import RayActorError, RayTaskError
from ray.util.annotations import RayDeprecationWarning

from actors.environment import worker_env
from actors.group import Role
from actors.reward import RewardActor
from actors.rollout import RolloutActor
from rayllm import faults
from rayllm.data.files import Row

CHUNK = 64
"""Prompts in a chunk: few enough to share the work evenly, and to lose little when a job is killed."""

AHEAD = 4
"""Chunks that an engine has at once: enough to fill its batch while others are on their way."""

MAX_RESTARTS = 3
"""Times that an engine or scorer which died is started again, and that a chunk is given out again; Ray Data's own
default is without end, even where the engine dies while it starts."""

FALSE_ALARM = b"has constructor arguments in the object store and max_restarts > 0"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows that travel together and end in one part."""

    key: str
    """Which data they are of."""

    number: int
    """Of the chunk in its data."""

    rows: list[Row]
    """`prompt_id`, `token_ids` of the prompt, and `response_ids` where the answers are given."""

    def path(self, folder: Path) -> Path:
        return folder / f"{self.key}-{self.number:08d}.parquet"

    def table(self) -> pa.Table:
        """One row, so that Ray Data neither cuts nor joins chunks, however it cuts its blocks."""
        return pa.Table.from_pylist([{"key": self.key, "number": self.number, "rows": self.rows}])

    @classmethod
    def from_table(cls, table: pa.Table) -> Chunk:
        (fields,) = table.to_pylist()
        return cls(**fields)

    def write(self, folder: Path) -> pa.Table:
        """Write the part; returns the row that tells the driver."""
        aside = folder / f".{self.path(folder).name}.{uuid4().hex}"  # the engines of a killed job may still be at work
        pq.write_table(pa.Table.from_pylist(self.rows), aside)
        aside.replace(self.path(folder))
        return pa.table({"written": [len(self.rows)]})


def chunks_of(key: str, rows: Sequence[Row]) -> list[Chunk]:
    """The rows in order, `CHUNK` at a time."""
    return [Chunk(key, start // CHUNK, list(rows[start : start + CHUNK])) for start in range(0, len(rows), CHUNK)]


def missing(chunks: Sequence[Chunk], folder: Path) -> list[Chunk]:
    """The chunks that have no part yet."""
    return [chunk for chunk in chunks if not chunk.path(folder).is_file()]


def read_part(chunk: Chunk, folder: Path) -> list[Row]:
    """Rows of a finished part, in the order of the chunk's."""
    rows: list[Row] = pq.read_table(chunk.path(folder)).to_pylist()
    assert [row["prompt_id"] for row in rows] == [row["prompt_id"] for row in chunk.rows], chunk.path(folder)
    return rows


class Sampler(RolloutActor):
    """Samples answers to chunks of prompts; a row comes out with its different answers.

    Args:
        sampling: ``num_samples``, ``temperature`` and ``max_new_tokens`` of ``RolloutActor.generate``.
        steps: key of the data -> ``step`` of the seeds.
        folder: where it writes the parts; None where a scorer does.
        options: of the `RolloutActor`.
    """

    def __init__(self, *, sampling: dict[str, Any], steps: dict[str, int], folder: Path | None, **options: Any) -> None:
        from rayllm.models.folders import load_tokenizer

        super().__init__(**options)
        self._tokenizer = load_tokenizer(options["model_dir"])
        self._arguments, self._steps, self._folder = sampling, steps, folder

    async def __call__(self, table: pa.Table) -> pa.Table:
        faults.reach("label.sample")
        chunk = Chunk.from_table(table)
        prompts = [(row["prompt_id"], row["token_ids"]) for row in chunk.rows]
        rollouts = await self.generate(prompts, step=self._steps[chunk.key], **self._arguments)
        num_samples = self._arguments["num_samples"]
        for index, row in enumerate(chunk.rows):
            answers: dict[str, Row] = {}
            for rollout in rollouts[index * num_samples : (index + 1) * num_samples]:
                text = self._tokenizer.decode(list(rollout.token_ids), skip_special_tokens=True).strip()
                answer = {"ids": list(rollout.token_ids), "stopped": rollout.stopped, "count": 0}
                answers.setdefault(text, answer)["count"] += 1
            row["responses"] = list(answers)
            row["response_ids"] = [answer["ids"] for answer in answers.values()]
            row["stopped"] = [answer["stopped"] for answer in answers.values()]
            row["counts"] = [answer["count"] for answer in answers.values()]
        return chunk.table() if self._folder is None else chunk.write(self._folder)


class Scorer:
    """Scores the answers of chunks with a frozen reward model and writes the parts."""

    def __init__(self, *, model: str, micro_batch_size: int, folder: Path) -> None:
        self._reward = RewardActor(model=model, micro_batch_size=micro_batch_size)
        self._folder = folder

    def __call__(self, table: pa.Table) -> pa.Table:
        faults.reach("label.score")
        chunk = Chunk.from_table(table)
        logits = self._reward.raw_scores(
            [np.array([*row["token_ids"], *ids]) for row in chunk.rows for ids in row["response_ids"]]
        )
        scores = self._reward.standardised(logits).mean(1)
        start = 0
        for row in chunk.rows:
            part = slice(start, start := start + len(row["response_ids"]))
            row["scores"], row["logits"] = scores[part].tolist(), logits[part].tolist()
        return chunk.write(self._folder)


@dataclass(frozen=True, slots=True)
class Stage:
    """Actors of one class that chunks go through."""

    cls: type
    role: Role
    max_actors: int
    """Ray Data starts more than ``role.num_actors`` up to this many while chunks wait and the cluster has room."""

    at_once: int
    """Chunks that an actor works on at the same time."""

    arguments: dict[str, Any]
    selector: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes that the actors go to."""

    def over(self, dataset: Dataset) -> Dataset:
        options: dict[str, Any] = {"max_restarts": MAX_RESTARTS, "max_task_retries": MAX_RESTARTS}
        if self.selector:
            options["label_selector"] = self.selector
        return dataset.map_batches(
            self.cls,
            fn_constructor_kwargs=self.arguments,
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=self.role.num_actors,
                max_size=self.max_actors,
                max_tasks_in_flight_per_actor=2 * self.at_once,  # with fewer waiting the pool would never grow
                max_concurrent_calls_per_actor=self.at_once,
            ),
            num_cpus=self.role.cpus,
            num_gpus=self.role.gpus,
            runtime_env={"env_vars": worker_env(self.role.gpus)},
            **options,
        )


def run_stages(
    sampler: Stage,
    scorer: Stage | None,
    *,
    to_sample: Sequence[Chunk],
    given: Sequence[Chunk] = (),
    on_done: Callable[[int], None],
) -> None:
    """Take the chunks through the stages; when it returns, all their parts are there.

    Args:
        to_sample: go through both stages.
        given: hold answers already and go through the second only.
        on_done: called with the number of rows in each part that was written.

    Raises:
        RuntimeError: a stage failed, or its actors died too often. Parts that are there stay.
    """
    _settings()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # retries have no other way to be set yet
        flow = [sampler.over(_dataset(to_sample))] if to_sample else []
        flow += [_dataset(given)] if given else []
        if not flow:
            return
        dataset = flow[0] if len(flow) == 1 else flow[0].union(flow[1])
        if scorer is not None:
            dataset = scorer.over(dataset)
    with _readable_errors(), _without_false_alarm():
        for batch in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
            on_done(int(batch["written"].sum()))


def _dataset(chunks: Sequence[Chunk]) -> Dataset:
    return ray.data.from_arrow([chunk.table() for chunk in chunks])


def _settings() -> None:
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    if logging.getLogger("ray").level >= logging.ERROR:  # the job is quiet; what fails is told once, at its end
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)


@contextmanager
def _readable_errors() -> Iterator[None]:
    try:
        yield
    except RayTaskError as error:
        raise RuntimeError(f"label: {_last_line(error)}") from error
    except RayActorError as error:
        raise RuntimeError(f"label: an actor died: {error}") from error


def _last_line(error: RayTaskError) -> str:
    """What a stage raised. Ray Data wraps it in an error of its own, and keeps of it the text only."""
    raised, _, _ = str(error).partition("\n\nThe above exception was the direct cause")
    return raised.strip().splitlines()[-1]


@contextmanager
def _without_false_alarm() -> Iterator[None]:
    """Ray's core writes to stderr, for each actor that may be restarted, that its arguments might get lost: Ray Data
    passes them through the object store, and holds them as long as it has actors."""
    stderr = os.dup(2)
    read_end, write_end = os.pipe()

    def forward() -> None:
        with os.fdopen(read_end, "rb") as lines:
            for line in lines:
                if FALSE_ALARM not in line:
                    os.write(stderr, line)

    forwarder = threading.Thread(target=forward, daemon=True)
    forwarder.start()
    os.dup2(write_end, 2)
    os.close(write_end)
    try:
        yield
    finally:
        os.dup2(stderr, 2)  # closes the pipe's last end
        forwarder.join(timeout=5)
        os.close(stderr)


def clear_parts(folder: Path, *, unfinished_only: bool) -> None:
    """Remove what a killed job was writing, or all parts."""
    if not unfinished_only:
        shutil.rmtree(folder, ignore_errors=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(".*"):
        path.unlink()
