"""The watched side of supervision: an actor's process counts what it does and says so from a thread of its own.

`count` is called where work is done, in any thread. A thread of the same process sends the counters to the supervisor
now and then; so a process that is stopped, a thread that hangs, and work that never ends all look the same from
outside: counters that do not move. `end_process` writes down where a process stands and ends it with all its children.
"""

from __future__ import annotations

import faulthandler
import inspect
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray

from actors.carried import Carried
from actors.counters import counters
from actors.group import Role, actor_options, constructor, methods_for_others, whereabouts
from rayllm.startup import without_garbage_collection

STACKS_S = 5.0
"""How long a process that is to be ended may take to say where it stands."""

END_S = 5.0


@dataclass(frozen=True, slots=True)
class Report:
    """What a watched process says of itself."""

    node: str
    pid: int
    started: int
    """With the pid it names the process for good: pids come again."""

    stacks: int
    """File descriptor, of that process, of the file to which SIGUSR2 makes it write all its threads' stacks."""

    counters: Mapping[str, int]


def shell(cls: type) -> type:
    """A class with the methods of another one, which stays carried until an actor is made: Ray imports the class of an
    actor wherever its handle goes, and a supervisor has no use for what its actors are made of."""
    carried = Carried(cls)

    def init(self: Any, supervisor: Any, number: int, every_s: float, arguments: Mapping[str, Any]) -> None:
        be_watched(supervisor, number, every_s)
        with without_garbage_collection():
            opened = carried.open()
            self.inside = object.__new__(opened)
            constructor(opened)(self.inside, **arguments)

    methods = {name: _handed_in(name, method) for name, method in methods_for_others(cls).items()}
    return type(cls.__name__, (), {**methods, "__init__": init, "whereabouts": whereabouts})


def _handed_in(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.inside, name)(*args, **kwargs)

    async def wait(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await getattr(self.inside, name)(*args, **kwargs)

    return wait if inspect.iscoroutinefunction(method) else call


def start_watched(
    role: Role,
    cls: type,
    arguments: Mapping[str, Any],
    supervisor: Any,
    number: int,
    every_s: float,
    **options: Any,
) -> Any:
    """Start an actor that reports to ``supervisor`` as ``number``.

    Args:
        cls: a `shell`.
        arguments: of its class's own constructor.
        supervisor: handle of an actor with ``report(number, Report)``.
        every_s: between two reports.
        options: of Ray, over those of the role.
    """
    remote_cls: Any = ray.remote(cls)
    return remote_cls.options(**{**actor_options(role, cls), **options}).remote(supervisor, number, every_s, arguments)


def be_watched(supervisor: Any, name: Any, every_s: float, *, disk: bool = False) -> None:
    """Before the actor's own constructor runs: that may be what hangs.

    Args:
        supervisor: handle of an actor with ``report(name, Report)``.
        every_s: between two reports.
        disk: bytes that the process reads from disks or writes there count as progress.
    """
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # with its children a group of its own, which can be ended as a whole
    stacks = tempfile.TemporaryFile()  # noqa: SIM115  it has no name, and lives as long as the process
    faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
    threading.Thread(target=_report, args=(supervisor, name, every_s, stacks, disk), name="report", daemon=True).start()


def _report(supervisor: Any, name: Any, every_s: float, stacks: Any, disk: bool) -> None:
    node = str(ray.get_runtime_context().get_node_id())
    process = psutil.Process()
    pid, started = process.pid, start_of(process.pid)
    while ray.is_initialized():
        done = dict(counters)
        if disk:
            moved = process.io_counters()
            done["disk"] = moved.read_bytes + moved.write_bytes
        supervisor.report.remote(name, Report(node, pid, started, stacks.fileno(), done))
        time.sleep(every_s)


def end_process(report: Report) -> str:
    """End a process of this node, its process group and its descendants; returns where its threads stood, if it
    still lived."""
    stacks, family = "", []
    with suppress(psutil.NoSuchProcess, FileNotFoundError):
        process = psutil.Process(report.pid)
        if start_of(report.pid) != report.started:
            return ""  # long gone, and its pid is somebody else's
        family = [process, *process.children(recursive=True)]
        if process.status() != psutil.STATUS_ZOMBIE:
            stacks = _stacks(report)
    with suppress(ProcessLookupError):
        os.killpg(report.pid, signal.SIGKILL)
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=END_S)
    return stacks


def start_of(pid: int) -> int:
    """Ticks from the machine's start to the process's, of which no change of the clock makes others.

    Raises:
        FileNotFoundError: there is none.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19])  # proc_pid_stat(5): field 22, and two are before the bracket


def _stacks(report: Report) -> str:
    try:
        with open(f"/proc/{report.pid}/fd/{report.stacks}", "rb") as file:
            os.kill(report.pid, signal.SIGUSR2)
            os.kill(report.pid, signal.SIGCONT)  # a stopped process writes nothing
            deadline, text = time.monotonic() + STACKS_S, b""
            while time.monotonic() < deadline:
                time.sleep(0.1)
                before, text = text, os.pread(file.fileno(), 1 << 20, 0)
                if text and text == before:
                    break
            return text.decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return ""
