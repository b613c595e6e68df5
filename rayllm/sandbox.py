"""Programs that a model wrote, run where they can do no harm: ``run_program``. Linux only.

A program runs in a child process, in namespaces of its own: no network (not even loopback), no view of other processes,
no files but Python and the system's libraries, read-only, and an empty /tmp of bounded size that goes with it. It has
no privileges (a launcher that is root makes it a user that nobody else is), an environment of five variables, limits on
CPU seconds, memory, file size, processes and output, and a wall clock: when that is over, all that it started is killed
at once by the kernel. Where the machine cannot do one of these, nothing runs.

What this does not protect from: holes of the kernel itself (the program makes system calls as any other; run the
actors in a virtual machine if that worries you); memory is limited for each process, so that a program has up to
``num_processes`` times ``memory_mb``, beside ``folder_mb`` of /tmp; the CPU's side channels; and reading what lies in
the system's folders and in Python's own.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rayllm import sandbox_launcher
from rayllm.errors import InputError


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one program."""

    wall_s: float = 10.0
    cpu_s: float = 5.0
    memory_mb: int = 512
    """Address space of each process."""

    file_mb: int = 16
    """Largest file."""

    folder_mb: int = 32
    """All files together."""

    num_processes: int = 16
    """Threads count; two are the sandbox's own."""

    output_mb: int = 1
    """Standard output and error together."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended."""

    status: Literal["done", "failed", "late", "flood"]
    """`failed`: with another exit status than 0, or by a signal, which limits send; `late`: at the wall clock; `flood`:
    it wrote more than ``output_mb``."""

    exit_status: int | None
    """128 and the signal's number for one that a signal ended; None unless `done` or `failed`."""

    stdout: str
    stderr: str

    @property
    def message(self) -> str:
        """One line for people."""
        if self.status == "late":
            return "was not done at its deadline and was killed"
        if self.status == "flood":
            return "wrote too much output and was killed"
        if self.status == "done":
            return "ended well"
        if self.exit_status == 128 + signal.SIGKILL:
            return "was killed at the limit of its CPU time or memory"
        last = self.stderr.strip().splitlines()[-1:] or ["no message"]
        return f"ended with status {self.exit_status}: {last[0][:200]}"


def run_program(program: str, *, stdin: str = "", limits: Limits | None = None) -> Outcome:
    """Run Python source in the sandbox and wait for its end.

    Raises:
        RuntimeError: this machine cannot close the sandbox; the program was not run.
    """
    limits = limits or Limits()
    with _memory_file(program) as program_file, _memory_file(stdin) as stdin_file:
        settings = {
            "program_fd": program_file.fileno(),
            "folders": sorted({sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parent)}),
            "folder_bytes": limits.folder_mb << 20, "file_bytes": limits.file_mb << 20,
            "memory_bytes": limits.memory_mb << 20, "cpu_s": max(1, round(limits.cpu_s)),
            "num_processes": limits.num_processes,
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-I", sandbox_launcher.__file__, json.dumps(settings)],
            stdin=stdin_file, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            pass_fds=[program_file.fileno()], start_new_session=True, env={}, cwd="/",
        )  # fmt: skip
    try:
        status, stdout, stderr = _read(process, limits)
    finally:
        _kill(process)
    if process.returncode == sandbox_launcher.NOT_CLOSED and status is None and "the sandbox cannot" in stderr:
        raise RuntimeError(f"{stderr.strip()[-300:]}: this machine or container lets no process make namespaces")
    if status is not None:
        return Outcome(status, None, stdout, stderr)
    return Outcome("failed" if process.returncode else "done", process.returncode, stdout, stderr)


def check_sandbox() -> None:
    """Raise InputError unless programs can be run here, shut in."""
    try:
        outcome = run_program("print(6 * 7)")
    except RuntimeError as error:
        raise InputError(
            f"verifier=code: {error}. As root it takes CAP_SYS_ADMIN, as another user unprivileged user namespaces "
            "(sysctl kernel.unprivileged_userns_clone, or the container's seccomp profile)"
        ) from None
    if outcome.stdout != "42\n":
        raise InputError(f"verifier=code: a first program in the sandbox {outcome.message}; is Python readable to all?")


def passes_tests(code: str, tests: Any, *, limits: Limits | None = None) -> tuple[float, str]:
    """(1.0 or 0.0, one line why) of a program against its tests.

    Args:
        code: Python.
        tests: statements (text, or a list of them), run after the code in its own namespace, all of which must pass;
            or a list of {input, output}: what the program must print, given the input. The output is compared out here
            and the program never sees it. Statements share a process with the code: one that ends early, prints
            "success" or breaks ``print`` gains nothing, but one written to attack Python's innards could fake a pass.
        limits: of each run.

    Raises:
        ValueError: tests of another form, or none.
        RuntimeError: no sandbox on this machine.
    """
    cases: list[Any] = [tests] if isinstance(tests, str) else list(tests) if isinstance(tests, Sequence) else []
    if cases and all(isinstance(case, str) for case in cases):
        return _passes_statements(code, cases, limits)
    if cases and all(isinstance(case, Mapping) and {"input", "output"} <= set(case) for case in cases):
        return _passes_cases(code, cases, limits)
    raise ValueError(f"expected tests as statements or as a list of {{input, output}}, got {tests!r:.100}")


_HARNESS = """
def run():
    import json, os, sys
    secret, code, tests = json.loads(sys.stdin.readline())
    write, scope = os.write, {"__name__": "__main__"}
    exec(compile(code, "response", "exec"), scope)
    for test in tests:
        exec(compile(test, "test", "exec"), scope)
    sys.__stdout__.flush()
    write(1, ("\\n" + secret).encode())
run()
"""


def _passes_statements(code: str, tests: list[str], limits: Limits | None) -> tuple[float, str]:
    secret = secrets.token_hex(16)
    outcome = run_program(_HARNESS, stdin=json.dumps([secret, code, tests]) + "\n", limits=limits)
    if outcome.status == "done" and outcome.stdout.endswith("\n" + secret):
        return 1.0, "passed"
    return 0.0, "ended before its tests were done" if outcome.status == "done" else outcome.message


def _passes_cases(code: str, cases: list[Mapping[str, Any]], limits: Limits | None) -> tuple[float, str]:
    for case in cases:
        outcome = run_program(code, stdin=str(case["input"]), limits=limits)
        if outcome.status != "done":
            return 0.0, outcome.message
        if _lines(outcome.stdout) != _lines(str(case["output"])):
            return 0.0, f"printed {outcome.stdout.strip()[:80]!r}, expected {str(case['output']).strip()[:80]!r}"
    return 1.0, "passed"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _memory_file(text: str) -> Any:
    """An open file with this text, at its start, that has no name."""
    file = os.fdopen(os.memfd_create("rayllm"), "wb+")
    file.write(text.encode("utf-8", errors="surrogatepass"))
    file.seek(0)
    return file


def _read(
    process: subprocess.Popen[bytes], limits: Limits
) -> tuple[Literal["late", "flood"] | None, str, str]:
    """(why it must be ended, output, errors), when the program closed both, or at a limit."""
    deadline = time.monotonic() + limits.wall_s
    parts: dict[Any, list[bytes]] = {process.stdout: [], process.stderr: []}
    status: Literal["late", "flood"] | None = None
    with selectors.DefaultSelector() as selector:
        for pipe in parts:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map() and status is None:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready and time.monotonic() >= deadline:
                status = "late"
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                if data:
                    parts[key.fileobj].append(data)
                else:
                    selector.unregister(key.fileobj)
            if sum(len(part) for pipe in parts.values() for part in pipe) > limits.output_mb << 20:
                status = "flood"
        if status is None:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                status = "late"
    stdout, stderr = (b"".join(part).decode(errors="replace") for part in parts.values())
    return status, stdout, stderr


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The launcher, and with it all in its namespace; returns when all are gone, as the pipes' ends then are."""
    if process.poll() is None:
        process.kill()
    process.wait()
    for pipe in (process.stdout, process.stderr):
        assert pipe is not None
        while os.read(pipe.fileno(), 1 << 16):
            pass
        pipe.close()
