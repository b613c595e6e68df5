"""`rayllm plan` against reality on this machine: every role's memory, and every phase's seconds.

    python -m bench.plan --model DIR --json OUT [--steps N] [key=value ...]

Runs the `ppo` job on the fixed workload of ``bench/workload.py``, as ``bench.ppo`` does, and plans the same config for a
cluster that is this machine. Memory is what a process has for itself (resident, less what it shares with others) at its
own worst moment, looked at 50 times a second.
"""

from __future__ import annotations

import argparse
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from bench import ppo
from bench.figures import GIB, circumstances
from bench.process_watch import POLL_S, ProcessWatch
from rayllm.lineage import write_json

PAGE = 4096
LOOK_FOR_NEW_S = 1.0


class OwnMemoryWatch(ProcessWatch):
    """Besides, each process's own memory over time."""

    def __enter__(self) -> OwnMemoryWatch:
        self.series: dict[tuple[str, int], list[tuple[float, float]]] = {}
        super().__enter__()
        self._poller = threading.Thread(target=self._poll, daemon=True)
        self._poller.start()
        return self

    def _poll(self) -> None:
        kinds: dict[int, str] = {}
        next_look = 0.0
        while not self._stop.wait(POLL_S):
            now = time.monotonic() - self._began
            if now >= next_look:
                next_look = now + LOOK_FOR_NEW_S
                for process in self._tree():
                    with suppress(psutil.Error):
                        kinds[process.pid] = self._kind(process)
            for pid, kind in kinds.items():
                with suppress(OSError):
                    _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
                    own = (int(resident) - int(shared)) * PAGE / GIB
                    self.series.setdefault((kind, pid), []).append((now, own))

    @property
    def own_peaks(self) -> dict[str, float]:
        """Kind -> GiB of the process of it that took most."""
        peaks: dict[str, float] = {}
        for (kind, _), points in self.series.items():
            peaks[kind] = max(peaks.get(kind, 0.0), max(own for _, own in points))
        return peaks
