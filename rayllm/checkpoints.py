"""Folders to continue from: complete or not there, and read only when every byte is the one that was written.

```
checkpoints/latest               the name of the newest
checkpoints/step-000010/         renamed from partial-000010 once all of it is on the disk and was read back
    manifest.json                the step; size and sha256 of every other file
    state.json                   the job's own state
    policy/part-0-0.safetensors  what a rank wrote (`rayllm.models.pieces`)
checkpoints/refused-000020/      found damaged at a start; goes with the next save
checkpoints/storing/             what is being copied to `storage_path`
```
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

from rayllm.lineage import flush, sha256_file

MANIFEST, STATE, LATEST = "manifest.json", "state.json", "latest"
FORMAT = 1
MAX_MISSED = 3
"""Saves in a row that may fail, for want of disk space or because storage is out of reach, before the run stops."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the text names the file."""


class FileRecord(TypedDict):
    bytes: int
    sha256: str


Files = dict[str, FileRecord]
"""Absolute path -> what was written there."""


def write_file(path: Path, content: bytes) -> Files:
    """Write, flush to the disk, and read back from it.

    Raises:
        OSError: no room, or what the disk gives back is not what it was given.
    """
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        reason = f"{error.strerror}: {_gib(len(content))} to write, free are {_gib(free)}"
        raise OSError(error.errno, reason, str(path)) from None
    record: FileRecord = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    found = _record_on_disk(path)
    if found != record:
        raise OSError(errno.EIO, f"read back {found['bytes']} other bytes than the {len(content)} written", str(path))
    return {str(path): record}


def read_state(folder: Path) -> dict[str, Any]:
    """The job's state in a checkpoint."""
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state


def check(folder: Path, *, content: bool = True) -> None:
    """Compare a checkpoint's files with its manifest.

    Args:
        folder: the checkpoint.
        content: compare the digests too, not only the sizes.

    Raises:
        CheckpointError: a file is missing, of another size or of another content, or there is no manifest.
    """
    files = read_manifest(folder)
    for name, record in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {MANIFEST} lists it")
        if path.stat().st_size != record["bytes"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, {record['bytes']} were written")
    if not content:
        return
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter's lock alone
        digests = pool.map(sha256_file, [folder / name for name in files])
        for (name, record), digest in zip(files.items(), digests, strict=True):
            if digest != record["sha256"]:
                raise CheckpointError(
                    f"{folder / name} is not what was written: its sha256 is {digest[:12]}..., "
                    f"{MANIFEST} has {record['sha256'][:12]}..."
                )


def read_manifest(folder: Path) -> Files:
    """Name below ``folder`` -> what was written there. Raises CheckpointError."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        files: Files = manifest["files"]
        found = (manifest["format"], manifest["step"], STATE in files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    expected = (FORMAT, step_of(folder), True)
    if found != expected:
        raise CheckpointError(f"{path} says (format, step, has a state) = {found}, expected {expected}")
    return files


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name.rpartition("-")[2])


class Checkpoints:
    """The checkpoints in one folder.

    One process at a time writes: it calls `prepare`, whoever has a part fills the partial folder, then it calls
    `commit`; `failed` instead when something went wrong. What was there before stays until the new one is safe.
    """

    def __init__(self, folder: Path, *, keep: int, max_gib: float | None = None) -> None:
        self.folder, self.keep, self.max_gib = folder, keep, max_gib
        self.refused: list[str] = []
        """What `newest` passed over, and why."""
        self.missed = 0
        """Saves in a row that failed."""

    def steps(self) -> list[int]:
        """Of the complete checkpoints, oldest first."""
        return sorted(step_of(path) for path in self.folder.glob("step-*"))

    def at(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def partial(self, step: int) -> Path:
        """Where the parts of the checkpoint of ``step`` are written."""
        return self.folder / f"partial-{step:06d}"

    def newest(self) -> tuple[int, Path] | None:
        """(step, folder) of the newest checkpoint whose files are all as they were written; None if there is none.

        Raises:
            CheckpointError: there are checkpoints, and each of them is damaged.
        """
        self.refused = []
        steps = self.steps()
        last = self._latest()
        if last is not None and last not in steps:
            self.refused.append(f"{self.at(last)} is gone; {self.folder / LATEST} names it")
        for step in reversed(steps):
            try:
                check(self.at(step))
            except CheckpointError as error:
                self.refused.append(str(error))
                aside = self.folder / f"refused-{step:06d}"
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(self.at(step), aside)
            else:
                return step, self.at(step)
        if self.refused:
            raise CheckpointError(
                "no checkpoint can be used: " + "; ".join(self.refused) + "; bring the files back, or start over with "
                "overwrite=true"
            )
        return None

    def prepare(self, step: int, num_bytes: int) -> Path:
        """An empty folder for the parts, with room for ``num_bytes``.

        Raises:
            OSError: no room, even without all older checkpoints but the newest.
        """
        partial = self.partial(step)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        missing = self.require_room(num_bytes)
        for old in self.steps()[:-1]:
            if missing > 0:
                missing -= folder_bytes(self.at(old))
                shutil.rmtree(self.at(old))
        return partial

    def require_room(self, num_bytes: int) -> int:
        """Bytes of older checkpoints that must go before ``num_bytes`` more can be written; 0 or less: none.

        Raises:
            OSError: no room, even without all of them but the newest.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        needed = num_bytes + num_bytes // 50 + 2**20
        free = shutil.disk_usage(self.folder).free
        if free + sum(folder_bytes(self.at(step)) for step in self.steps()[:-1]) < needed:
            raise OSError(errno.ENOSPC, f"a checkpoint needs {_gib(needed)}, free are {_gib(free)}", str(self.folder))
        return needed - free

    def commit(self, step: int, files: Mapping[str, FileRecord], state: Mapping[str, Any]) -> Path:
        """Make the partial folder the newest checkpoint; then old ones go.

        Args:
            step: that was given to `prepare`.
            files: what `write_file` told of the parts. Files in the folder that are not among them are hashed here.
            state: JSON, for `read_state`.

        Raises:
            OSError: the disk is full, or gives back something else than it was given.
        """
        partial, final = self.partial(step), self.at(step)
        records = dict(files) | write_file(partial / STATE, json.dumps(dict(state)).encode())
        for path in sorted(p for p in partial.rglob("*") if p.is_file()):
            if str(path) not in records:
                records[str(path)] = _record_on_disk(path)
        manifest = {
            "format": FORMAT, "step": step,
            "files": {str(Path(name).relative_to(partial)): record for name, record in sorted(records.items())},
        }  # fmt: skip
        write_file(partial / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        for folder in [partial, *(p for p in partial.rglob("*") if p.is_dir())]:
            flush(folder)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        flush(self.folder)
        check(final, content=False)  # every part was read back by its writer; here: all of them arrived
        self._point_to(final)
        self.missed = 0
        self._remove_old()
        return final

    def failed(self, step: int, problem: str) -> str:
        """Give up a save; the run goes on without it. Returns what to tell.

        Raises:
            RuntimeError: more than `MAX_MISSED` in a row.
        """
        shutil.rmtree(self.partial(step), ignore_errors=True)
        self.missed += 1
        told = f"no checkpoint of step {step}: {problem}"
        if self.missed > MAX_MISSED:
            raise RuntimeError(f"{told}; {self.missed} saves in a row failed")
        return told

    def _latest(self) -> int | None:
        try:
            return step_of(Path((self.folder / LATEST).read_text().strip()))
        except (OSError, ValueError):  # only says which was the newest; whether it is there decides
            return None

    def _point_to(self, final: Path) -> None:
        aside = self.folder / (LATEST + ".partial")
        write_file(aside, final.name.encode())
        os.replace(aside, self.folder / LATEST)
        flush(self.folder)

    def _remove_old(self) -> None:
        """All but the newest ``keep``, and of these the oldest that do not fit into ``max_gib``; the newest stays."""
        old = self.steps()[: -self.keep]
        kept = self.steps()[-self.keep :]
        if self.max_gib is not None:
            sizes = {step: folder_bytes(self.at(step)) for step in kept}
            while len(kept) > 1 and sum(sizes[step] for step in kept) > self.max_gib * 2**30:
                old.append(kept.pop(0))
        leftovers = [*self.folder.glob("partial-*"), *self.folder.glob("refused-*")]
        for folder in [*map(self.at, old), *leftovers]:
            shutil.rmtree(folder)


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _record_on_disk(path: Path) -> FileRecord:
    """Flush a file, and hash what the disk has of it, not what memory remembers."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"
