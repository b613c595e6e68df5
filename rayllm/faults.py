"""Faults on purpose, for tests: named points of the code at which a process can be made to fail.

Every actor calls `reach` where it may fail in real life. A test writes its faults into a folder (`plan`) and starts
processes in whose environment `VARIABLE` names it; a process looks once, when it imports this module. No command and no
setting does so: without the variable `reach` is a comparison with None, a tenth of a microsecond beside work of
milliseconds.

A fault strikes once, in the first process that gets there, however often its victim is started anew. Whoever strikes
claims it by a file in the folder that says who, where and when: a test reads its victim and its clock there (`struck`).
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

T = TypeVar("T")

VARIABLE = "RAYLLM_TEST_FAULTS"
"""Names the folder of the faults; set by tests alone."""

LARGEST_DISK = 256 << 20
"""Bytes of the largest file system that `fill` fills: a small one, made for the test."""

Action = Literal["kill", "stop", "raise", "delay", "corrupt", "fill"]
"""`kill`: SIGKILL; `stop`: SIGSTOP, it hangs; `raise`: a RuntimeError; `delay`: sleeps for ``seconds``; `corrupt`: the
number or tensor at the point becomes NaN, of a file there 16 bytes are flipped; `fill`: the disk of the path at the
point becomes full."""

Point = Literal[
    "rollout.init", "rollout.generate", "rollout.update_weights",
    "policy.setup", "policy.logprobs", "policy.update", "policy.publish", "critic.setup", "critic.values",
    "critic.update", "engine.loss", "learner.save", "learner.load", "reference.logprobs", "reward.scores",
    "trainer.step", "trainer.save", "progress.push", "label.sample", "label.score", "serve.load", "driver.step",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fault:
    """What is to happen, and where."""

    point: Point
    action: Action
    passes: int = 1
    """Which of a process's passes through the point it strikes, counted from 1."""

    rank: int | None = None
    """Of the process it strikes; None: any."""

    seconds: float = 0.0
    """Of a `delay`."""


@dataclass(frozen=True, slots=True)
class Struck:
    """A fault that has struck."""

    fault: Fault
    pid: int
    rank: int | None
    time: float
    """Seconds of the machine's monotonic clock, which all its processes share."""


def plan(folder: Path, faults: Sequence[Fault]) -> dict[str, str]:
    """Write the faults; returns the variable to start processes with."""
    for fault in faults:
        assert fault.point in get_args(Point) and fault.action in get_args(Action), fault
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps([asdict(fault) for fault in faults]))
    return {VARIABLE: str(folder)}


def struck(folder: Path) -> list[Struck]:
    """Those that have, in the order of the plan."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("struck-*.json"))]
    return [Struck(Fault(**one.pop("fault")), **one) for one in found]


def carried() -> dict[str, str]:
    """The variable, where this process has it, for those that it starts with an environment of their own."""
    return {} if _planned is None else {VARIABLE: str(_planned.folder)}


def reach(point: Point, value: Any = None, *, rank: int | None = None) -> Any:
    """A fault that waits here strikes.

    Args:
        point: where this is.
        value: what passes here, for `corrupt` and `fill`: a number, a tensor, a file or a folder.
        rank: of this process among its kind.

    Returns:
        ``value``, or what a fault made of it.
    """
    return value if _planned is None else _planned.reach(point, value, rank)


class _Planned:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._faults = [Fault(**fault) for fault in json.loads((folder / "plan.json").read_text())]
        self._passes: Counter[str] = Counter()

    def reach(self, point: str, value: Any, rank: int | None) -> Any:
        self._passes[point] += 1
        for number, fault in enumerate(self._faults):
            due = fault.point == point and fault.passes == self._passes[point] and fault.rank in (None, rank)
            if due and self._claim(number, fault, rank):
                value = _strike(fault, value)
        return value

    def _claim(self, number: int, fault: Fault, rank: int | None) -> bool:
        """Whether this process is the first; the file is there with its whole content or not at all."""
        said = {"fault": asdict(fault), "pid": os.getpid(), "rank": rank, "time": time.monotonic()}
        mine = self.folder / f"claim-{number:03d}-{os.getpid()}"
        mine.write_text(json.dumps(said))
        try:
            os.link(mine, self.folder / f"struck-{number:03d}.json")
        except FileExistsError:
            return False
        finally:
            mine.unlink()
        return True


def _strike(fault: Fault, value: Any) -> Any:
    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault.action == "raise":
        raise RuntimeError(f"a fault on purpose at {fault.point}")
    if fault.action == "delay":
        time.sleep(fault.seconds)
    if fault.action == "fill":
        fill_disk(value)
    if fault.action == "corrupt":
        return flip_bytes(value) if isinstance(value, Path) else value * math.nan
    return value


def flip_bytes(path: Path, *, count: int = 16) -> Path:
    """Change bytes in the middle of a file, or of the largest one below a folder; returns ``path``."""
    files = [path] if path.is_file() else sorted(path.rglob("*"), key=lambda f: f.stat().st_size if f.is_file() else -1)
    with files[-1].open("r+b") as file:
        place = files[-1].stat().st_size // 2
        file.seek(place)
        found = file.read(count)
        file.seek(place)
        file.write(bytes(byte ^ 0xFF for byte in found))
    return path


def fill_disk(path: Path) -> Path:
    """Leave no free byte on the file system of ``path``; returns the file that takes them.

    Raises:
        OSError: it is larger than a test would make one.
    """
    folder = path if path.is_dir() else path.parent
    if shutil.disk_usage(folder).total > LARGEST_DISK:
        raise OSError(errno.EFBIG, "this file system is no test's own; it is not filled", str(folder))
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        size = 1 << 20
        while size:
            try:
                if file.write(bytes(size)) < size:
                    size //= 2
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                size //= 2
    return ballast


def _found(environment: Mapping[str, str]) -> _Planned | None:
    return _Planned(Path(environment[VARIABLE])) if VARIABLE in environment else None


_planned = _found(os.environ)
