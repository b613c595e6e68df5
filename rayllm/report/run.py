"""One run folder: what was asked, what happened, how it ended. Everything a person sees is a view of these files.

```
RUN/run.json       settings with their origin, parents, data, status, final metrics, versions (one JSON object)
RUN/config.yaml    the resolved config; `rayllm <job> --config RUN/config.yaml run_dir=...` repeats the run
RUN/events.jsonl   {"t", "step", "metrics"} a line, appended
RUN/model/         the model, in Hugging Face format, with lineage.json
RUN/checkpoints/   to continue from
RUN/logs/          what the libraries had to say
```
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from rayllm.checkpoints import MAX_MISSED
from rayllm.config.base import Loaded
from rayllm.config.common import JobConfig
from rayllm.errors import InputError
from rayllm.lineage import (
    code_version,
    config_inputs,
    content_id,
    deciding_settings,
    fingerprint,
    flush,
    is_model_dir,
    versions,
    write_json,
    write_manifest,
    write_text,
)
from rayllm.storage import StorageError, StoredRun


class Run:
    """A run folder in use. Open it, and unless it is ``done`` already, work inside ``with run:``."""

    def __init__(self, stage: str, loaded: Loaded[Any]) -> None:
        """Open or create the folder.

        Raises:
            InputError: an input is missing, the folder holds another run, or another process is using it.
        """
        config: JobConfig = loaded.config
        self.stage, self.loaded, self.config = stage, loaded, config
        self.dir = config.run_dir
        self.inputs = {key: _existing(key, path) for key, path in config_inputs(config).items()}
        ids = {key: content_id(path) for key, path in self.inputs.items()}
        self.fingerprint = fingerprint(stage, config, ids)
        self._ids = ids
        self._lock: Any = None
        self._stored = None if config.storage_path is None else StoredRun(config.storage_path, self.dir)
        self._missed = 0
        if self._stored is not None:
            self._stored.pull()
        self.moved_aside = ""
        """Which run of other settings, inputs or versions was in the folder, and where it is now."""
        before = self._previous()
        self.done = before is not None and before["status"] == "done"
        self.resuming = before is not None and not self.done
        self.record: dict[str, Any] = before if before is not None else self._new_record()

    @staticmethod
    def is_done(stage: str, loaded: Loaded[Any]) -> bool:
        """Whether the folder holds a finished run of this very kind; changes nothing."""
        record = read_run(loaded.config.run_dir)
        if record is None or record["status"] != "done":
            return False
        inputs = config_inputs(loaded.config)
        if not all(path.exists() for path in inputs.values()):
            return False
        ids = {key: content_id(path) for key, path in inputs.items()}
        return bool(record["fingerprint"] == fingerprint(stage, loaded.config, ids))

    @property
    def model_dir(self) -> Path:
        return self.dir / "model"

    @property
    def checkpoints_dir(self) -> Path:
        return self.dir / "checkpoints"

    @property
    def logs_dir(self) -> Path:
        return self.dir / "logs"

    def __enter__(self) -> Self:
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock = (self.dir / ".lock").open("w")
        except OSError as error:
            raise InputError(f"run_dir: {self.dir} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"run_dir: {self.dir} is in use by another process") from None
        if self._stored is not None and not self.resuming:
            self._stored.clear()
        self._began = time.monotonic()
        self._seconds_before = float(self.record.get("seconds") or 0.0)
        (self.dir / "config.yaml").write_text(yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False))
        self._save(status="running", error=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            stopped = issubclass(kind, KeyboardInterrupt)
            with suppress(OSError):  # perhaps the disk is full, which is why
                self._save(status="stopped" if stopped else "failed", error=None if stopped else str(error)[:4000])
            if self._stored is not None:
                self._try_to_store(self._stored.push)
        self._lock.close()
        (self.dir / ".lock").unlink(missing_ok=True)

    def describe(self, **facts: Any) -> None:
        """Add to run.json: ``data``, ``model``, ``placement`` and the like."""
        self.record.update(facts)
        self._save()

    def add_data(self, key: str, **facts: Any) -> None:
        """Note what was read from the input named by the config key: rows, tokens, dropped by reason."""
        if key in self.inputs:
            path, digest = str(self.inputs[key]), self._ids[key]
        else:  # a list of paths
            items = [name for name in self.inputs if name.startswith(f"{key}.")]
            path = ", ".join(str(self.inputs[name]) for name in items)
            digest = hashlib.sha256("".join(self._ids[name] for name in items).encode()).hexdigest()
        entry = {"name": key, "path": path, "sha256": digest, **facts}
        self.record["data"] = [d for d in self.record["data"] if d["name"] != key] + [entry]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line of metrics."""
        self._append({"t": round(self.seconds, 3), "step": step, "metrics": dict(metrics)})

    def note(self, text: str) -> None:
        """Append one line of text."""
        self._append({"t": round(self.seconds, 3), "kind": "note", "text": text})

    def rewind(
        self, step: int, history: Sequence[tuple[int, Mapping[str, float]]] = ()
    ) -> list[tuple[int, Mapping[str, float]]]:
        """Forget the metrics after ``step`` steps: a resumed run makes them again. Add what is missing of ``history``,
        (step, metrics) in order: an earlier attempt made it, and ended before it was written. Returns what is known."""
        path = self.dir / "events.jsonl"
        if path.is_file():
            lines = [line for line in path.read_text().splitlines() if _complete(line)]
            kept = [line for line in lines if json.loads(line).get("step", step) <= step]
            write_text(path, "".join(line + "\n" for line in kept))
            known = [json.loads(line) for line in kept]
            logged = [(event["step"], event["metrics"]) for event in known if "metrics" in event]
        else:
            logged = []
        for past, metrics in history:
            if (past, dict(metrics)) not in logged:
                self.log(past, metrics)
                logged.append((past, dict(metrics)))
        return logged

    def finish(self, metrics: Mapping[str, float], *, model_parameters: int | None = None) -> None:
        """Write the model's manifest, if the run made a model, and mark the run done."""
        self.record["metrics"] = dict(metrics)
        if self.model_dir.is_dir():
            parents = self.record["parents"]
            model_id = write_manifest(
                self.model_dir,
                stage=self.stage,
                parents=parents,
                data=self.record["data"],
                config=self.config.model_dump(mode="json"),
                metrics=metrics,
            )
            self.record["model"] = {
                "id": model_id, "path": str(self.model_dir), "parameters": model_parameters
            }
        # A run that is done is so after a power cut too. Logs may still be written, and checkpoints are flushed.
        for path in [*self.model_dir.rglob("*"), *self.dir.iterdir(), self.dir]:
            if path.is_file() or path.is_dir():
                flush(path)
        self._save(status="done")
        if self._stored is not None:
            self._stored.push()

    def store_checkpoint(self, step: int, *, keep: int) -> None:
        """Copy a checkpoint, and the metrics up to it, to `storage_path`, where the newest ``keep`` stay; nothing
        without one. While storage is out of reach the run goes on, a few times.

        Raises:
            StorageError: too many copies in a row failed.
        """
        folder = self.checkpoints_dir / f"step-{step:06d}"
        stored = self._stored
        if stored is None:
            return
        held = self.checkpoints_dir / "storing"
        shutil.rmtree(held, ignore_errors=True)
        try:  # the workers go on, and may remove it before all of it is there
            shutil.copytree(folder, held / folder.name, copy_function=_link)
        except OSError:
            if folder.is_dir():
                raise
            return  # a newer one is there already

        def store() -> None:
            stored.push()
            stored.push_checkpoint(held / folder.name, keep=keep)

        self._missed = 0 if self._try_to_store(store) else self._missed + 1
        shutil.rmtree(held)
        if self._missed > MAX_MISSED:
            raise StorageError(f"{self._missed} copies in a row to storage_path={self.config.storage_path} failed")

    def fetch_checkpoint(self) -> list[str]:
        """Get a newer checkpoint from `storage_path`; returns what was refused there."""
        if self._stored is None or not self.resuming:
            return []
        self.checkpoints_dir.mkdir(exist_ok=True)
        return self._stored.pull_checkpoint(self.checkpoints_dir)

    def _try_to_store(self, store: Callable[[], None]) -> bool:
        try:
            store()
        except StorageError as error:
            self.note(f"storage_path: {error}")
            return False
        return True

    @property
    def seconds(self) -> float:
        """Time spent in this run, earlier attempts included."""
        return self._seconds_before + time.monotonic() - self._began

    def _save(self, **changes: Any) -> None:
        self.record.update(changes, seconds=round(self.seconds, 2))
        write_json(self.dir / "run.json", self.record)

    def _append(self, event: dict[str, Any]) -> None:
        with (self.dir / "events.jsonl").open("a") as file:
            file.write(json.dumps(event) + "\n")

    def _previous(self) -> dict[str, Any] | None:
        """The record of an earlier attempt at the very same run, or None for a fresh start."""
        path = self.dir / "run.json"
        if not path.is_file():
            if self.dir.is_dir() and any(self.dir.iterdir()):
                raise InputError(f"run_dir: {self.dir} is not empty and holds no run of rayllm")
            return None
        record = json.loads(path.read_text())
        if record.get("fingerprint") == self.fingerprint:
            return record
        differences = ", ".join(self._differences(record))
        if not self.config.overwrite:
            raise InputError(
                f"run_dir: {self.dir} holds a {record.get('stage')} run with other settings or inputs "
                f"({differences}); use another run_dir, or overwrite=true to move it aside and start over"
            )
        aside = self.dir.with_name(f"{self.dir.name}.old-{datetime.now(UTC):%Y%m%d-%H%M%S}")
        os.replace(self.dir, aside)
        self.moved_aside = f"the run that was here, with other {differences}, to {aside.name}"
        return None

    def _differences(self, record: dict[str, Any]) -> list[str]:
        before = _flatten(record.get("config", {}))
        now = _flatten(deciding_settings(self.config))
        changed = [key for key in now if before.get(key) != now[key]]
        inputs, packages = record.get("inputs", {}), record.get("versions", {})
        changed += [f"content of {key}" for key, value in self._ids.items() if inputs.get(key) != value]
        return changed + [f"version of {name}" for name, value in versions().items() if packages.get(name) != value]

    def _new_record(self) -> dict[str, Any]:
        changes = self.loaded.changes()
        return {
            "stage": self.stage,
            "status": "running",
            "fingerprint": self.fingerprint,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": 0.0,
            "command": shlex.join(sys.argv),
            "config": self.config.model_dump(mode="json"),
            "changed": {
                key: {"value": c.value, "default": c.default, "origin": c.origin} for key, c in changes.items()
            },
            "inputs": self._ids,
            "parents": [
                {"role": key, "id": self._ids[key], "path": str(path)}
                for key, path in self.inputs.items()
                if path.is_dir() and is_model_dir(path)
            ],
            "data": [],
            "metrics": {},
            "model": None,
            "versions": versions(),
            "code": code_version(),
            "hardware": {
                "cpus": os.cpu_count(),
                "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
                "machine": platform.machine(),
                "python": platform.python_version(),
            },
            "error": None,
        }


def read_run(folder: Path) -> dict[str, Any] | None:
    """The record of a run folder, or None."""
    path = folder / "run.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # not on every filesystem
        shutil.copy2(source, target)


def _existing(key: str, path: Path) -> Path:
    if not path.exists():
        raise InputError(f"{key}: nothing at {path}")
    return path


def _complete(line: str) -> bool:
    """A process killed while it wrote leaves half a line."""
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
