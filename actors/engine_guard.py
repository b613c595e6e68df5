"""Ends vLLM's processes when the Serve replica that started them is gone.

A replica that is killed outright (out of memory, a lost raylet) cannot stop its engine, whose process would
hold its memory for ever. vLLM imports this module, as its worker extension, in every process that holds
weights; the import starts a thread that watches the replica.
"""

from __future__ import annotations

import os
import threading
import time

import psutil

REPLICA_PID = "RAYLLM_REPLICA_PID"
"""Environment variable with the replica's process id; without it nothing is watched."""

POLL_S = 1.0


class EngineGuard:
    """Adds nothing to vLLM's worker; its name makes vLLM import this module."""


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _exit_without(pid: int) -> None:
    while _is_alive(pid):
        time.sleep(POLL_S)
    os._exit(1)


if REPLICA_PID in os.environ:
    threading.Thread(target=_exit_without, args=(int(os.environ[REPLICA_PID]),), daemon=True).start()
