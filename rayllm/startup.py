"""How a process starts quickly."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@atexit.register
def _unfreeze() -> None:
    """At its end triton would tell what is still frozen as leaked, in thirty lines. Takes a second."""
    if "triton" in sys.modules:
        gc.unfreeze()


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """For imports: what they make stays, and looking through it again and again takes a quarter of their time. May be
    entered again inside."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
