"""The life of the serve job's processes: a port, signals, and a Ray cluster that leaves nothing behind."""

from __future__ import annotations

import errno
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray import serve

from jobs.session import cluster_lives, ray_session
from rayllm.errors import InputError

APP = "rayllm"
"""Name of the application in Serve."""

PORT_FREE_AFTER_S = 15.0


class Stop(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def check_port_free(host: str, port: int) -> None:
    """Raise InputError unless a server can listen on ``host`` and ``port``.

    Serve's proxies share ports (SO_REUSEPORT): without this check a second server would start and take turns
    with the first.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise InputError(f"host: cannot resolve {host!r}: {error.strerror}") from None
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except PermissionError:
            raise InputError(f"port: {port} needs root rights; set port to a number above 1023") from None
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise InputError(f"host: cannot listen on {host}: {error.strerror}") from None
            raise InputError(
                f"port: {port} is in use on {host}; stop the other server or set port to a free one, "
                f"such as port={_free_port(host)}"
            ) from None


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        return probe.getsockname()[1]


class Signals:
    """Inside the context, the first SIGINT or SIGTERM raises Stop; later ones cannot interrupt the clean-up.

    Library code may swallow the exception, so loops call ``check``. Outside the main thread signals cannot be
    caught and nothing is changed.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
        self.catch()
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def catch(self) -> None:
        """Put the handlers in place (again)."""
        for signum in self._previous:
            signal.signal(signum, self._handle)

    def ignore(self) -> None:
        for signum in self._previous:
            signal.signal(signum, signal.SIG_IGN)

    def check(self) -> None:
        """Raise Stop if a signal has arrived."""
        if self._received is not None:
            raise Stop(self._received)

    def _handle(self, signum: int, _frame: object) -> None:
        self.ignore()
        self._received = signum
        raise Stop(signum)


@contextmanager
def serve_session(host: str, port: int, signals: Signals) -> Iterator[None]:
    """Ray and, at the end, no Serve; a cluster that was started here ends with all its processes.

    Requests under way may finish (20 s); a second Ctrl-C cuts them off.
    """
    if ray.is_initialized():
        if serve.status().proxies:  # its port cannot be changed, and it is not ours to stop
            raise InputError("port: this cluster already runs Ray Serve; stop it first (`serve shutdown`)")
        try:
            yield
        finally:
            signals.ignore()
            _stop_app()
            serve.shutdown()
            _wait_until_free(host, port)
        return
    with ray_session(None):
        try:
            signals.check()
            yield
        finally:
            signals.ignore()
            if cluster_lives():
                with suppress(Stop):
                    signals.catch()
                    _stop_app()
            signals.ignore()


def _stop_app() -> None:
    """Returns when the replicas, and with them the engines, have ended."""
    if APP in serve.status().applications:
        serve.delete(APP)


def _wait_until_free(host: str, port: int) -> None:
    """The proxy ends a moment after Serve's shutdown returns."""
    deadline = time.monotonic() + PORT_FREE_AFTER_S
    while time.monotonic() < deadline:
        with suppress(InputError):
            return check_port_free(host, port)
        time.sleep(0.1)
