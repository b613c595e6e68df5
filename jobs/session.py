"""The Ray cluster of a job: the one it was submitted to, or one of its own on this machine that leaves no trace."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import AuthenticationError

from jobs import stopping
from jobs.stopping import SIGNALS
from rayllm.errors import InputError

TEMP_PREFIX = "rayllm-"
KILL_AFTER_S = 15.0
CONNECT_S = 10.0
LOOK_S, GRACE_S = 1.0, 5.0
"""Between two looks at the daemons, and how long the job may take to end when they have ended."""

DAEMONS = ("gcs_server", "raylet")
"""Ray's: without one of them nothing goes on."""

LOG_BYTES, LOG_FILES = 32 << 20, 3
"""Of each process's log: Ray begins a new file at so many bytes and keeps so many of the old ones."""

UNUSED = {
    "task_events_report_interval_ms": 0,  # what the head keeps of 100,000 calls for a dashboard: 70 KiB a step of PPO
    "event_stats": False,  # the times of all that event loops do, in idle processes too, 100 times a second
    "enable_worker_prestart": False,  # processes without our environment, in which nothing of ours runs
    "prestart_worker_first_driver": False,
}
"""Of Ray: what nobody looks at here."""

_TOKEN = secrets.token_hex(32)
"""What the sessions of this process ask of everyone who connects: Ray's daemons listen on every network."""

_own_cluster: list[Path] = []
"""Folder of the cluster that this process has started."""


@contextmanager
def ray_session(
    logs_dir: Path | None, *, verbose: bool = False, wait: bool = True
) -> Iterator[Callable[[], None]]:
    """Connect to the cluster named by RAY_ADDRESS (set inside a Ray job), or start one here.

    A local cluster lives in a temporary folder of its own, and so do the temporary files of its workers. At the end
    its processes are stopped, the logs move to ``logs_dir`` (None: they are dropped) and the folder goes. If a
    session is already open, it is used and left open.

    Without ``wait`` a local cluster comes up while the caller does something else; what is yielded waits for it.
    """
    if ray.is_initialized():
        yield _nothing
        return
    _quiet_libraries(verbose)
    handlers: dict[signal.Signals, Any] = {signum: signal.getsignal(signum) for signum in SIGNALS}
    level = logging.INFO if verbose else logging.ERROR
    if os.environ.get("RAY_ADDRESS"):
        _connect(os.environ["RAY_ADDRESS"], log_to_driver=verbose, logging_level=level)
        _put_back(handlers)
        try:
            yield _nothing
        finally:
            ray.shutdown()
        return
    _remove_stale_sessions()
    folder = Path(tempfile.mkdtemp(prefix=f"{TEMP_PREFIX}{os.getpid()}-", dir="/tmp"))
    before = set(psutil.Process().children(recursive=True))
    _own_cluster.append(folder)
    cluster = _Starting(folder, log_to_driver=verbose, logging_level=level)

    def started() -> None:
        cluster.wait()
        _put_back(handlers)  # Ray replaces the one of SIGTERM

    try:
        if wait:
            started()
        yield started
    finally:
        _put_back(handlers)
        cluster.ends()
        with _uninterrupted():
            with suppress(BaseException):  # raised to whoever waited for it
                cluster.wait()
            _stop_cluster(before)
            cluster.end()
            if logs_dir is not None:
                _keep_logs(folder, logs_dir)
            shutil.rmtree(folder, ignore_errors=True)
            _own_cluster.remove(folder)
            _put_back(handlers)


def _connect(address: str, **options: Any) -> None:
    try:
        _look_for(address)
        ray.init(**options)
    except (OSError, AuthenticationError) as error:
        raise InputError(
            f"RAY_ADDRESS: no connection to {address}: {str(error).splitlines()[0]} If the cluster is up and wants a "
            "token: export RAY_AUTH_MODE=token, and the token in ~/.ray/auth_token or RAY_AUTH_TOKEN"
        ) from None


def _look_for(address: str) -> None:
    """Raise OSError at once if nobody listens there; Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()


class _Starting:
    """A cluster that comes up in a thread. The thread lives as long as the cluster: Ray ties its daemons to it, so that
    they end with this process however that ends."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self._folder, self._settings = folder, settings
        self._started: Future[None] = Future()
        self._over = threading.Event()
        self._ending = False
        tempfile.gettempdir()  # looked up here, before TMPDIR changes for the daemons
        threading.Thread(target=self._run, name="ray-daemons", daemon=True).start()

    def wait(self) -> None:
        """Until it is up.

        Raises:
            Exception: whatever kept Ray from starting.
        """
        self._started.result()

    def ends(self) -> None:
        """Its daemons may end now."""
        self._ending = True

    def end(self) -> None:
        self._over.set()

    def _run(self) -> None:
        try:
            with _environment(**_for_daemons(self._folder)):
                ray.init(
                    address="local",
                    include_dashboard=False,
                    _temp_dir=str(self._folder / "r"),  # in ours, closed to others: Ray opens its own to everyone
                    _system_config=UNUSED,
                    **self._settings,
                )
        except BaseException as error:
            self._started.set_exception(error)
        else:
            self._started.set_result(None)
            self._watch()
        self._over.wait()

    def _watch(self) -> None:
        """End this process when a daemon has ended by itself: Ray's own calls would wait for minutes, or for ever."""
        missing = 0.0
        while not self._over.wait(LOOK_S) and not self._ending:
            lost = sorted({*DAEMONS} - {daemon.name() for daemon in _daemons() if _is_running(daemon)})
            missing = missing + LOOK_S if lost and not stopping.asked() else 0.0
            if missing > GRACE_S:
                told = f"failed: Ray's {' and '.join(lost)} ended; the same command continues where the run was\n"
                sys.stderr.write(told)
                stopping.end_at_once(1)


def _nothing() -> None:
    """There is nothing to wait for."""


def _quiet_libraries(verbose: bool) -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning of Ray on CPU workers
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # else each report to Ray Train waits up to 2 s
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process of its own; nobody asks what it sees
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("RAY_ROTATION_MAX_BYTES", str(LOG_BYTES))
    os.environ.setdefault("RAY_ROTATION_BACKUP_COUNT", str(LOG_FILES))
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import puts its logger back
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of calls that nobody waits for any more
        for name in ("ray", "ray.train", "ray.serve", "transformers", "deepspeed", "DeepSpeed", "vllm"):
            logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def _environment(**changes: str | None) -> Iterator[None]:
    """For processes started meanwhile; None: without the variable."""
    before = {name: os.environ.get(name) for name in changes}
    _set_environment(changes)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _for_daemons(folder: Path) -> dict[str, str | None]:
    """Variables for a cluster whose files lie in ``folder``.

    Temporary files: vLLM and DeepSpeed leave sockets and files in TMPDIR. Token authentication, on whatever the
    environment says: Ray switches itself to tokens where no mode is set, and looks the token up once. It lies where
    only this user reads it; Ray's own way is a file in the home folder that all can read.
    """
    temporary, token = folder / "tmp", folder / "token"
    temporary.mkdir()
    token.touch(mode=0o600)
    token.write_text(_TOKEN)
    return {
        "TMPDIR": str(temporary), "RAY_AUTH_TOKEN_PATH": str(token), "RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN": None
    }  # fmt: skip


def _stop_cluster(before: set[psutil.Process]) -> None:
    """Shut Ray down and end every process that was started since ``before``, engines of dead actors included."""
    started = [p for p in psutil.Process().children(recursive=True) if p not in before]
    if not cluster_lives():  # Ray's calls would wait a minute for an answer
        end_processes(started, after=0)
    ray.shutdown()
    end_processes(started, after=KILL_AFTER_S)


def cluster_lives() -> bool:
    """False if whoever stopped this job signalled Ray's daemons too, as `kill -- -GROUP` and systemd do. A cluster that
    this process only connected to counts as alive."""
    if not _own_cluster:
        return True
    time.sleep(0.2)
    daemons = _daemons()
    return bool(daemons) and all(_is_running(daemon) for daemon in daemons)


def end_processes(processes: list[psutil.Process], *, after: float) -> None:
    """Kill the processes that have not ended by themselves ``after`` seconds from now."""
    _, alive = psutil.wait_procs(processes, timeout=after)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=KILL_AFTER_S)


def _daemons() -> list[psutil.Process]:
    """Ray's, of this process's own cluster."""
    return [process for process in psutil.Process().children() if _is_daemon(process)]


def _is_daemon(process: psutil.Process) -> bool:
    try:
        return process.name() in DAEMONS
    except psutil.NoSuchProcess:
        return False


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _keep_logs(folder: Path, logs_dir: Path) -> None:
    """Workers' and Ray's own logs, minus the empty ones."""
    logs_dir.mkdir(parents=True, exist_ok=True)
    for log in folder.glob("r/session_2*/logs/*.*"):
        if log.is_file() and log.stat().st_size:
            shutil.copy2(log, logs_dir / log.name)


def _remove_stale_sessions() -> None:
    """What jobs that were killed outright have left: Ray's agents live on for minutes, the folder for ever."""
    for folder in Path("/tmp").glob(f"{TEMP_PREFIX}[0-9]*-*"):
        pid = folder.name.removeprefix(TEMP_PREFIX).split("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            end_processes([p for p in psutil.process_iter() if _writes_to(p, folder)], after=0)
            shutil.rmtree(folder, ignore_errors=True)


def _writes_to(process: psutil.Process, folder: Path) -> bool:
    try:
        return any(file.path.startswith(f"{folder}/") for file in process.open_files())
    except psutil.Error:  # gone, or another user's
        return False


def _put_back(handlers: dict[signal.Signals, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Nothing ends the clean-up half way but a second signal in a job that minds it."""
    if stopping.installed():
        with stopping.held():
            yield
        return
    _put_back({signum: signal.SIG_IGN for signum in SIGNALS})
    yield
