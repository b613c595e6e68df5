"""Run folders on storage that several clusters share: a folder (NFS), ``s3://``, ``gs://`` and what else pyarrow knows.

```
STORAGE/stored.json               size and sha256 of the files of the run, checkpoints apart
STORAGE/run.json, model/, ...     the run folder without its logs
STORAGE/checkpoints/step-000010/  as in `rayllm.checkpoints`; its manifest.json comes last
```

What goes up is read back, what comes down is compared with its manifest. Credentials and endpoints are those of the
filesystem: ``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL`` and their like.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TypeVar

from rayllm.checkpoints import MANIFEST, CheckpointError, FileRecord, Files, check, read_manifest, step_of
from rayllm.config.base import Config, Loaded, as_uri, is_remote
from rayllm.errors import InputError
from rayllm.lineage import config_inputs, replace_inputs, sha256_file, write_json

STORED = "stored.json"
CHUNK = 2**22
_APART = ("checkpoints/", "logs/")
_MADE_AGAIN = (".partial", ".npy")
"""Encoded text and the like: a run that continues makes it from its inputs."""

ConfigT = TypeVar("ConfigT", bound=Config)


class StorageError(RuntimeError):
    """Storage is out of reach, or holds something else than was put there; the text names the file."""


class Storage:
    """One folder there."""

    def __init__(self, address: str, *, key: str = "storage_path") -> None:
        """
        Args:
            address: a URI or a local path.
            key: the setting that it comes from, for messages.

        Raises:
            InputError: no filesystem of that name, or it does not let us in.
        """
        from pyarrow import ArrowInvalid, fs

        self.address = address.rstrip("/")
        try:
            if "://" in address:
                # Small files of S3 in one request instead of three.
                options = "?allow_delayed_open=true" if address.startswith("s3://") else ""
                self._fs, self._root = fs.FileSystem.from_uri(self.address + options)
            else:
                self._fs, self._root = fs.LocalFileSystem(), str(Path(address).expanduser().absolute())
        except (ArrowInvalid, OSError) as error:
            raise InputError(f"{key}: {address}: {_first_line(error)}") from None

    def names(self, below: str = "") -> set[str]:
        """Of all files below a folder, relative to the storage's; none where a file stands in its place."""
        from pyarrow import fs

        if below and self.has(below):
            return set()
        try:
            selector = fs.FileSelector(f"{self._root}/{below}".rstrip("/"), recursive=True, allow_not_found=True)
            found = self._fs.get_file_info(selector)
        except OSError as error:
            raise StorageError(f"{self.address}: {_first_line(error)}") from None
        return {info.path[len(self._root) :].lstrip("/") for info in found if info.is_file}

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        try:
            return bool(self._fs.get_file_info(f"{self._root}/{name}").is_file)
        except OSError as error:
            raise StorageError(f"{self.address}: {_first_line(error)}") from None

    def read(self, name: str) -> bytes:
        try:
            with self._fs.open_input_stream(f"{self._root}/{name}") as stream:
                return bytes(stream.readall())
        except OSError as error:
            raise StorageError(f"{self.address}/{name}: {_first_line(error)}") from None

    def put(self, path: Path, name: str) -> FileRecord:
        """Copy a file there, and read it back. Raises StorageError."""
        target = f"{self._root}/{name}"
        written, sent = hashlib.sha256(), 0
        try:
            self._fs.create_dir(os.path.dirname(target), recursive=True)
            with path.open("rb") as source, self._fs.open_output_stream(target) as stream:
                while chunk := source.read(CHUNK):
                    written.update(chunk)
                    sent += len(chunk)
                    stream.write(chunk)
            found, size = self._digest(target)
        except OSError as error:
            raise StorageError(f"{self.address}/{name}: {_first_line(error)}") from None
        record: FileRecord = {"bytes": sent, "sha256": written.hexdigest()}
        if {"bytes": size, "sha256": found} != record:
            raise StorageError(f"{self.address}/{name}: {size} bytes were read back that are not the {sent} sent")
        return record

    def get(self, name: str, path: Path, record: FileRecord | None = None) -> None:
        """Copy a file from there. Raises StorageError, also if it is not what ``record`` says."""
        partial = path.with_name(path.name + ".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._fs.open_input_stream(f"{self._root}/{name}") as stream, partial.open("wb") as target:
                while chunk := stream.read(CHUNK):
                    target.write(chunk)
        except OSError as error:
            raise StorageError(f"{self.address}/{name}: {_first_line(error)}") from None
        if record is not None and sha256_file(partial) != record["sha256"]:
            partial.unlink()
            raise StorageError(f"{self.address}/{name} is not what was stored: its sha256 is another than {STORED} has")
        partial.replace(path)

    def remove(self, folder: str) -> None:
        self._fs.delete_dir(f"{self._root}/{folder}".rstrip("/"))

    def _digest(self, target: str) -> tuple[str, int]:
        digest, size = hashlib.sha256(), 0
        with self._fs.open_input_stream(target) as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
        return digest.hexdigest(), size


class StoredRun:
    """The copy of one run folder."""

    def __init__(self, address: str, folder: Path) -> None:
        self.storage, self.folder = Storage(address), folder
        self._sent: dict[str, tuple[int, int]] = {}
        """Name -> (modification time, size) of what is there already."""

    def files(self) -> Files:
        """What is there, checkpoints apart; empty if nothing is."""
        if not self.storage.has(STORED):
            return {}
        files: Files = json.loads(self.storage.read(STORED))["files"]
        return files

    def push(self) -> None:
        """Bring there what is new or changed in the run folder; the list of files comes last."""
        files = self.files()
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            name = path.relative_to(self.folder).as_posix()
            if name.startswith((*_APART, ".")) or name.endswith(_MADE_AGAIN) or name == STORED:
                continue
            stamp = (path.stat().st_mtime_ns, path.stat().st_size)
            if self._sent.get(name) == stamp:
                continue
            if name not in files or sha256_file(path) != files[name]["sha256"]:
                files[name] = self.storage.put(path, name)
            self._sent[name] = stamp
        gone = [name for name in files if not (self.folder / name).is_file()]
        listing = self.folder / STORED
        write_json(listing, {"files": {name: record for name, record in files.items() if name not in gone}})
        self.storage.put(listing, STORED)
        listing.unlink()

    def pull(self) -> None:
        """Bring the run folder up to what is there, checkpoints apart, if that is of more work than what is here."""
        files = self.files()
        if not files or json.loads(self.storage.read("run.json"))["seconds"] <= self._seconds_here():
            return
        for name, record in files.items():
            path = self.folder / name
            if not path.is_file() or sha256_file(path) != record["sha256"]:
                self.storage.get(name, path, record)

    def clear(self) -> None:
        """Remove an earlier run.

        Raises:
            InputError: there are files of something else.
        """
        names = self.storage.names()
        if names and STORED not in names and not any(name.startswith("checkpoints/step-") for name in names):
            raise InputError(f"storage_path: {self.storage.address} is not empty and holds no run of rayllm")
        if names:
            self.storage.remove("")

    def _seconds_here(self) -> float:
        path = self.folder / "run.json"
        return float(json.loads(path.read_text())["seconds"]) if path.is_file() else -1.0

    def push_checkpoint(self, folder: Path, *, keep: int) -> None:
        """Bring a complete checkpoint there; its manifest comes last, and then the older ones go."""
        files = read_manifest(folder)
        base = f"checkpoints/{folder.name}"
        for name, record in files.items():
            if self.storage.put(folder / name, f"{base}/{name}") != record:
                raise StorageError(f"{folder / name} is not what was written")
        self.storage.put(folder / MANIFEST, f"{base}/{MANIFEST}")
        newest = sorted(step for step in self.steps() if step <= step_of(folder))[-keep:]
        names = {name.split("/")[1] for name in self.storage.names("checkpoints")}
        for name in names - {f"step-{step:06d}" for step in newest}:
            self.storage.remove(f"checkpoints/{name}")

    def steps(self) -> list[int]:
        """Of the complete checkpoints there, oldest first."""
        names = self.storage.names("checkpoints")
        return sorted(step_of(Path(name).parent) for name in names if name.endswith(f"/{MANIFEST}"))

    def pull_checkpoint(self, checkpoints: Path) -> list[str]:
        """Bring the newest whole checkpoint from there, unless one as new is here. Returns what was refused.

        Raises:
            StorageError: storage is out of reach, and no checkpoint is here.
        """
        whole = max((step_of(path) for path in checkpoints.glob("step-*") if _is_whole(path)), default=-1)
        try:
            steps = self.steps()
        except StorageError as error:
            if whole < 0:
                raise
            return [str(error)]
        refused = []
        for step in reversed([step for step in steps if step > whole]):
            name = f"step-{step:06d}"
            base, partial = f"checkpoints/{name}", checkpoints / f"partial-{step:06d}" / name
            try:
                self.storage.get(f"{base}/{MANIFEST}", partial / MANIFEST)
                for file in read_manifest(partial):
                    self.storage.get(f"{base}/{file}", partial / file)
                check(partial)
            except (CheckpointError, StorageError) as error:
                refused.append(f"{self.storage.address}/{base}: {error}")
                continue
            shutil.rmtree(checkpoints / name, ignore_errors=True)
            os.replace(partial, checkpoints / name)
            break
        for left in checkpoints.glob("partial-*"):
            shutil.rmtree(left)
        return refused


def _is_whole(folder: Path) -> bool:
    try:
        check(folder)
    except CheckpointError:
        return False
    return True


def fetch_inputs(loaded: Loaded[ConfigT]) -> Loaded[ConfigT]:
    """The same config with every input on storage (``s3://`` and the like) replaced by a local copy.

    The copies lie below ``XDG_CACHE_HOME`` or ``~/.cache``. A run's files are compared with its ``stored.json``.

    Raises:
        InputError: something cannot be had; names the key.
    """
    remote = {key: path for key, path in config_inputs(loaded.config).items() if is_remote(path)}
    return replace_inputs(loaded, {key: fetch(as_uri(path), key=key) for key, path in remote.items()})


def fetch(address: str, *, key: str) -> Path:
    """The local copy of one file or folder. Raises InputError."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rayllm"
    target = cache / hashlib.sha256(address.encode()).hexdigest()[:16] / address.rsplit("/", 1)[1]
    try:
        storage, records = _run_around(address, key=key)
        inside = address[len(storage.address) + 1 :]
        below = [name for name in records or storage.names(inside) if name.startswith(f"{inside}/")]
        for name in below or [inside]:
            path, record = target / name[len(inside) + 1 :] if below else target, records.get(name)
            if record is None or not path.is_file() or sha256_file(path) != record["sha256"]:
                storage.get(name, path, record)
    except StorageError as error:
        raise InputError(f"{key}: {error}") from None
    return target


def _run_around(address: str, *, key: str) -> tuple[Storage, Files]:
    """The stored run that a path is part of, at most three folders above it, and its files; else the folder that the
    path is in, and none."""
    above = address.rsplit("/", 1)[0]
    here = Storage(above, key=key)
    for _ in range(3):
        storage = Storage(above, key=key)
        if storage.has(STORED):
            return storage, json.loads(storage.read(STORED))["files"]
        above = above.rsplit("/", 1)[0]
        if above.endswith(":/"):
            break
    return here, {}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
