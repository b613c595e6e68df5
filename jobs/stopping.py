"""Ctrl-C and SIGTERM: the first lets the job save and end, the second ends it at once.

The first one raises KeyboardInterrupt, outside of `held` right away, inside at its end. Only a KeyboardInterrupt passes
through a call of Ray: a SystemExit becomes status 1, and a subclass becomes its parent.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_came: list[int] = []
"""The first signal, once it came."""

_holds = 0
_due = False
"""The first signal came while it was held back."""


def install() -> None:
    """From now on; in the main thread. A SIGINT that is ignored, as in the background of a shell, stays so."""
    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _handle)


def installed() -> bool:
    return signal.getsignal(signal.SIGTERM) is _handle


def asked() -> bool:
    """Whether the job should end."""
    return bool(_came)


def check() -> None:
    """Raises KeyboardInterrupt if a signal came. It was raised then, too, but where Python ignores what is raised, in a
    destructor or a callback, it is lost: a loop asks here before it goes on."""
    if _came:
        raise KeyboardInterrupt


def status() -> int:
    """The exit status of a job that was stopped: 130 or 143, as the shell has it."""
    return 128 + (_came[0] if _came else signal.SIGINT)


@contextmanager
def held() -> Iterator[None]:
    """What is inside is finished before the first signal counts."""
    hold()
    try:
        yield
    finally:
        release()


def hold() -> None:
    """Begin what is finished before the first signal counts; `release` ends it."""
    global _holds
    _holds += 1


def release() -> None:
    """Raises KeyboardInterrupt if a signal came since `hold`."""
    global _holds, _due
    _holds -= 1
    if _due and not _holds:
        _due = False
        raise KeyboardInterrupt


def _handle(signum: int, frame: FrameType | None) -> None:
    global _due
    if _came:
        end_at_once(128 + signum)
    _came.append(signum)
    if _holds:
        _due = True
        return
    raise KeyboardInterrupt


def end_at_once(status: int) -> None:
    """No clean-up: the next job on this machine removes the session's folder."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    if sys.stdout.isatty():
        sys.stdout.write("\033[?25h\n")  # a live view hides the cursor
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
