"""The Ray cluster of a job: the one it was submitted to, or one of its own on this machine that leaves no trace."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import ray

TEMP_PREFIX = "rayllm-"


@contextmanager
def ray_session(logs_dir: Path, *, verbose: bool = False) -> Iterator[None]:
    """Connect to the cluster named by RAY_ADDRESS (set inside a Ray job), or start one here.

    A local cluster lives in a temporary folder of its own; at the end its processes stop, the workers' logs move to
    ``logs_dir`` and the folder goes. If a session is already open, it is used and left open.
    """
    if ray.is_initialized():
        yield
        return
    _quiet_libraries(verbose)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=verbose, logging_level=logging.INFO if verbose else logging.ERROR)
        try:
            yield
        finally:
            ray.shutdown()
        return
    _remove_stale_folders()
    folder = Path(tempfile.mkdtemp(prefix=f"{TEMP_PREFIX}{os.getpid()}-", dir="/tmp"))
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
            _temp_dir=str(folder),
        )
        yield
    finally:
        with _no_interrupt():
            ray.shutdown()
            _keep_logs(folder, logs_dir)
            shutil.rmtree(folder, ignore_errors=True)


def _quiet_libraries(verbose: bool) -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning of Ray on CPU workers
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    if not verbose:
        for name in ("ray", "ray.train", "ray.serve", "transformers", "deepspeed", "DeepSpeed", "vllm"):
            logging.getLogger(name).setLevel(logging.ERROR)


def _keep_logs(folder: Path, logs_dir: Path) -> None:
    """Workers' and Ray's own logs, minus the empty ones."""
    logs_dir.mkdir(parents=True, exist_ok=True)
    for log in folder.glob("session_2*/logs/*.*"):
        if log.is_file() and log.stat().st_size:
            shutil.copy2(log, logs_dir / log.name)


def _remove_stale_folders() -> None:
    """Of sessions whose process was killed outright."""
    for folder in Path("/tmp").glob(f"{TEMP_PREFIX}[0-9]*-*"):
        pid = int(folder.name.removeprefix(TEMP_PREFIX).split("-")[0])
        if not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """A second Ctrl-C must not stop the clean-up half way."""

    def ignore(signum: int, frame: FrameType | None) -> None:
        return

    previous = {s: signal.signal(s, ignore) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
