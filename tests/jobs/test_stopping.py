"""The first signal waits for what must be finished, the second does not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import ROOT, heed_ctrl_c

SCRIPT = """
import subprocess, sys, time
from jobs import stopping

stopping.install()
child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
try:
    with stopping.held(), stopping.held():
        print(child.pid, flush=True)
        deadline = time.monotonic() + 30
        while not stopping.asked() and time.monotonic() < deadline:
            time.sleep(0.01)
        print("asked", flush=True)
        time.sleep(float(sys.argv[1]))
        print("saved", flush=True)
    print("never", flush=True)
except KeyboardInterrupt:
    child.kill()
    with stopping.held():  # nothing is due any more
        print("clean", flush=True)
    sys.exit(stopping.status())
"""


def start(seconds: float) -> tuple[subprocess.Popen, psutil.Process]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(seconds)], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    return process, psutil.Process(int(process.stdout.readline()))


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.scorecard("R26", "R27")
def test_the_first_signal_waits_for_what_must_be_finished(signum, status):
    process, _ = start(0.1)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=30)
    assert output.split() == ["asked", "saved", "clean"] and process.returncode == status


@pytest.mark.scorecard("R26", "R68")
def test_the_second_signal_ends_everything_at_once():
    process, child = start(60)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert output == "" and process.returncode == 130
    deadline = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.05)


LOST = """
import os, signal
from jobs import stopping

class Last:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):  # the handler runs between two of them
            pass

stopping.install()
stopping.check()
Last()
print("still here", flush=True)
try:
    stopping.check()
except KeyboardInterrupt:
    print("noticed", flush=True)
"""


def test_a_signal_that_python_swallowed_is_noticed_by_who_asks():
    done = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["still here", "noticed"], done.stderr


@pytest.mark.scorecard("R27")
def test_without_a_hold_the_first_signal_interrupts():
    code = "import time; from jobs import stopping; stopping.install(); print(1, flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in error
