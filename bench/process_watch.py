"""A process and all that it starts, watched from outside: memory, CPU time, and when its log grew."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from actors.reward_child import BOOT
from actors.reward_source import SourceActor
from bench.figures import GIB

POLL_S = 0.02
PAGE = 4096
LOOK_FOR_NEW_S = 1.0
"""Between two looks for processes that have started since."""

MEMORY_SHARE = 0.02
"""Most of one core that looking at the memory may cost."""


@dataclass(frozen=True, slots=True)
class Mark:
    """The moment at which a line was appended."""

    seconds: float
    """Since the watch began."""

    cpu: dict[int, tuple[str, float]]
    """Process id -> its kind and the CPU seconds that it had used."""


@dataclass
class ProcessWatch:
    """Watches until the end of the ``with`` block.

    Args:
        pid: the root of the process tree.
        log: a file; every line appended to it is marked.
    """

    pid: int
    log: Path
    marks: list[Mark] = field(default_factory=list)
    peak: dict[str, float] = field(default_factory=dict)
    """Kind of process -> GiB at the moment when all of them together took most. Proportional set size: pages that
    several processes share are counted once."""

    own: dict[str, float] = field(default_factory=dict)
    """Kind of process -> GiB that one process of it had for itself (resident, less what is shared) at its own worst
    moment."""

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="process-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def cpu_seconds(self, first: int, last: int) -> dict[str, float]:
        """Kind of process -> CPU seconds between two marks."""
        before, used = self.marks[first].cpu, dict[str, float]()
        for pid, (kind, seconds) in self.marks[last].cpu.items():
            used[kind] = used.get(kind, 0.0) + seconds - before.get(pid, (kind, 0.0))[1]
        return used

    def _run(self) -> None:
        next_look = next_kinds = 0.0
        kinds: dict[int, str] = {}
        while not self._stop.wait(POLL_S):
            if time.monotonic() >= next_kinds:
                kinds = self._kinds()
                next_kinds = time.monotonic() + LOOK_FOR_NEW_S
            self._look_at_own(kinds)
            if self._lines() > len(self.marks):
                mark = Mark(time.monotonic() - self._began, self._cpu())
                self.marks += [mark] * (self._lines() - len(self.marks))
            began = time.monotonic()
            if began >= next_look:
                self._look()
                next_look = time.monotonic() + (time.monotonic() - began) / MEMORY_SHARE

    def _lines(self) -> int:
        return self.log.read_bytes().count(b"\n") if self.log.is_file() else 0

    def _tree(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.pid)
            return [root, *root.children(recursive=True)]
        return []

    def _cpu(self) -> dict[int, tuple[str, float]]:
        found = {}
        for process in self._tree():
            with suppress(psutil.Error):
                times = process.cpu_times()
                found[process.pid] = (self._kind(process), times.user + times.system)
        return found

    def _look(self) -> None:
        now: dict[str, float] = {}
        for process in self._tree():
            with suppress(psutil.Error):
                kind = self._kind(process)
                now[kind] = now.get(kind, 0.0) + process.memory_full_info().pss / GIB
        if sum(now.values()) > sum(self.peak.values()):
            self.peak = now

    def _kinds(self) -> dict[int, str]:
        found = {}
        for process in self._tree():
            with suppress(psutil.Error):
                found[process.pid] = self._kind(process)
        return found

    def _look_at_own(self, kinds: dict[int, str]) -> None:
        """One short file a process: cheap enough to see what lasts a tenth of a second."""
        for pid, kind in kinds.items():
            with suppress(OSError):
                _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
                self.own[kind] = max(self.own.get(kind, 0.0), (int(resident) - int(shared)) * PAGE / GIB)

    def _kind(self, process: psutil.Process) -> str:
        """The actor's class, its child processes counted in; "driver" for the root, "ray" for what else Ray runs."""
        if process.pid == self.pid:
            return "driver"
        words = process.cmdline()
        if BOOT in words:
            return SourceActor.__name__
        title = words[0] if words else ""
        name = title.removeprefix("ray::").split(".")[0]
        return name if title.startswith("ray::") and name.endswith("Actor") else "ray"
