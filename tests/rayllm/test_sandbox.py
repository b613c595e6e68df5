"""Programs that mean harm: each ends at a limit, with a line that says so, and nothing of it is left."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from rayllm.errors import InputError
from rayllm.sandbox import Limits, check_sandbox, passes_tests, run_program
from tests.conftest import ROOT

SHORT = Limits(wall_s=2, cpu_s=1, memory_mb=256)
LONG = replace(SHORT, wall_s=60)
"""For what another limit ends: the machine may be busy."""


@pytest.fixture(scope="module", autouse=True)
def can_be_closed():
    try:
        check_sandbox()
    except InputError as error:
        pytest.skip(str(error))


def processes_with(mark: str) -> list[str]:
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark in (folder / "cmdline").read_bytes().decode(errors="replace"):
                found.append(folder.name)
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("program", "status", "message"),
    [
        ("import time; time.sleep(1000)", "late", "was not done at its deadline and was killed"),
        ("while True: pass", "failed", "killed at the limit of its CPU time"),
        ("import socket; socket.create_connection(('127.0.0.1', 22), 1)", "failed", "Network is unreachable"),
        ("import socket; socket.create_connection(('8.8.8.8', 53), 1)", "failed", "Network is unreachable"),
        ("import os\nwhile True: os.fork()", "failed", "Resource temporarily unavailable"),
        ("open('/tmp/x', 'wb').write(b'x' * (1 << 30))", "failed", "MemoryError"),
        ("f = open('/tmp/x', 'wb')\nwhile True: f.write(b'x' * (1 << 20))", "failed", "File too large"),
        ("for i in range(99): open(f'/tmp/{i}', 'wb').write(b'x' * (8 << 20))", "failed", "No space left on device"),
        ("x = []\nwhile True: x.append(bytearray(1 << 20))", "failed", "MemoryError"),
        ("while True: print('x' * 10_000)", "flood", "wrote too much output"),
        ("open('/etc/passwd')", "failed", "FileNotFoundError"),
        ("open('/usr/x', 'w')", "failed", "Read-only file system"),
        ("import os; os.kill(-1, 9)", "failed", "ProcessLookupError"),
        ("import os; os.setuid(0)", "failed", "Operation not permitted"),
    ],
)
@pytest.mark.scorecard("S16")
def test_what_does_harm_ends_at_a_limit(program, status, message):
    outcome = run_program(program, limits=SHORT if status == "late" else LONG)
    assert outcome.status == status and message in outcome.message, outcome


@pytest.mark.scorecard("S16")
def test_nothing_is_left_of_a_program_that_forks_and_hides():
    mark = uuid.uuid4().hex
    child = f"import time; time.sleep(1000)  # {mark}"
    program = f"""
import os, subprocess, sys
while True:
    try:
        subprocess.Popen([sys.executable, "-c", {child!r}], start_new_session=True)
    except OSError:
        pass
"""
    assert run_program(program, limits=SHORT).status in ("late", "failed")
    assert not processes_with(mark)


@pytest.mark.scorecard("S16")
def test_a_program_sees_python_and_an_empty_folder(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "4711")
    here = str(Path(__file__).resolve())
    program = f"import os; print(os.environ.get('SECRET_KEY'), os.path.exists({here!r}), *sorted(os.listdir('/tmp')))"
    _, top, *below = Path(sys.prefix).parts
    pythons_own = [below[0]] if top == "tmp" else []
    assert run_program(program).stdout.split() == ["None", "False", *sorted(["program.py", *pythons_own])]
    outcome = run_program("import json, math; print(json.dumps(math.pi), input())", stdin="hello\n")
    assert (outcome.stdout, outcome.message) == ("3.141592653589793 hello\n", "ended well")


@pytest.mark.parametrize(
    ("code", "score", "why"),
    [
        ("def double(x): return 2 * x", 1.0, "passed"),
        ("def double(x): return x", 0.0, "AssertionError"),
        ("def double(x) return x", 0.0, "SyntaxError"),
        ("print('success')\nimport sys; sys.exit(0)", 0.0, "ended before its tests were done"),
        ("import os; os.write(1, b'all tests passed'); os._exit(0)", 0.0, "ended before its tests were done"),
        ("import atexit, os; atexit.register(lambda: os._exit(0)); raise ValueError", 0.0, "ended before its tests"),
        ("import time; time.sleep(99)", 0.0, "was not done at its deadline"),
    ],
)
@pytest.mark.scorecard("S17")
def test_statements_must_all_pass(code, score, why):
    found, message = passes_tests(code, ["assert double(1) == 2", "assert double(4) == 8"], limits=SHORT if "sleep" in code else LONG)
    assert found == score and why in message


def test_cases_compare_what_is_printed():
    cases = [{"input": "1", "output": "2\n"}, {"input": "4", "output": "8"}]
    assert passes_tests("print(2 * int(input()))", cases, limits=LONG) == (1.0, "passed")
    assert passes_tests("print(2)", cases, limits=LONG) == (0.0, "printed '2', expected '8'")


@pytest.mark.parametrize("tests", [None, [], 3, [{"input": "1"}], [1]])
def test_tests_of_another_form_are_refused(tests):
    with pytest.raises(ValueError, match="expected tests as statements or as a list of"):
        passes_tests("pass", tests)


@pytest.mark.skipif(os.getuid() != 0, reason="the other tests run as an ordinary user here")
@pytest.mark.scorecard("S16")
def test_an_ordinary_user_has_the_same_sandbox(tmp_path):
    """By a Python that all users may read."""
    python = next((p for p in ("/usr/bin/python3", "/usr/local/bin/python3") if Path(p).exists()), None)
    if python is None or Path(sys.executable).resolve() == Path(python).resolve():
        python = sys.executable
    tmp_path.chmod(0o755)
    (tmp_path / "rayllm").mkdir()
    for name in ("__init__.py", "errors.py", "sandbox.py", "sandbox_launcher.py"):
        (tmp_path / "rayllm" / name).write_text((ROOT / "rayllm" / name).read_text())
    for folder in tmp_path.parents:
        if not folder.stat().st_mode & 0o005:
            folder.chmod(folder.stat().st_mode | 0o055) if folder.name.startswith("pytest-") else None
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from rayllm.sandbox import *; import os\n"
        "print(run_program('import os; print(os.getuid())').stdout.strip())\n"
        "print(run_program('import socket; socket.create_connection((\"127.0.0.1\", 22))').message)\n"
        "print(run_program('import os\\nwhile True: os.fork()').message)\n"
    )
    done = subprocess.run([python, "-c", code], user=1234, group=1234, extra_groups=[], capture_output=True, text=True)
    if "Permission denied" in done.stderr or "cannot be closed" in done.stderr:
        pytest.skip(done.stderr[-200:])
    uid, network, forks = done.stdout.splitlines()
    assert uid == "1234" and "Network is unreachable" in network and forks.startswith("ended with")
