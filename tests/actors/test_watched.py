"""The end of a watched process, on real processes and without Ray: nothing of it is left, and it says where it stood."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from actors.watched import Report, end_process, start_of

WATCHED = """
import faulthandler, os, signal, subprocess, sys, tempfile, threading
stacks = tempfile.TemporaryFile()
faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "1000"])
orphan = int(subprocess.check_output("sleep 1000 >/dev/null & echo $!", shell=True))
def where_it_stands():
    print(stacks.fileno(), child.pid, orphan, flush=True)
    threading.Event().wait()
where_it_stands()
"""


@pytest.fixture
def watched():
    """(report, pids of its child and of one whose parent has gone) of a process that leads a group."""
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    stacks, child, orphan = map(int, process.stdout.readline().split())
    yield Report("node", process.pid, start_of(process.pid), stacks, {}), [child, orphan]
    process.kill()
    process.wait()


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.scorecard("R03", partly=True)
def test_a_process_ends_with_all_that_it_started_and_tells_where_it_stood(watched, stopped):
    report, others = watched
    if stopped:
        os.kill(report.pid, signal.SIGSTOP)
    stacks = end_process(report)
    assert "in where_it_stands" in stacks
    assert all(gone(pid) for pid in [report.pid, *others])


@pytest.mark.scorecard("R04", partly=True)
def test_what_a_dead_process_left_behind_is_ended_too(watched):
    report, others = watched
    os.kill(report.pid, signal.SIGKILL)
    assert gone(report.pid) and not gone_now(others[1])
    assert end_process(report) == ""
    assert all(gone(pid) for pid in others)


def gone_now(pid: int) -> bool:
    return not psutil.pid_exists(pid)


def test_another_process_with_the_same_pid_is_left_alone(watched):
    report, others = watched
    earlier = Report(report.node, report.pid, report.started - 100, report.stacks, {})
    assert end_process(earlier) == ""
    assert psutil.pid_exists(report.pid) and not gone_now(others[0])
    end_process(report)
