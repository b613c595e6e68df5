"""The hook for faults: what strikes, where, once; and that every point of the list is in the code."""

from __future__ import annotations

import ast
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import torch

from rayllm import faults
from rayllm.faults import Fault, Point, flip_bytes, plan, struck

ROOT = Path(__file__).resolve().parents[2]

LOOP = """
import json, sys, time
from pathlib import Path
from rayllm import faults
for step in range(4):
    print("step", step, faults.reach("driver.step", json.loads(sys.argv[1]), rank=int(sys.argv[2])), flush=True)
"""


def start(folder: Path, *chosen: Fault, value: object = 1.5, rank: int = 0) -> subprocess.Popen[str]:
    """A process that passes four times through ``driver.step``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **plan(folder, chosen)}
    return subprocess.Popen(
        [sys.executable, "-c", LOOP, json.dumps(value), str(rank)], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def steps(process: subprocess.Popen[str]) -> list[str]:
    out, _ = process.communicate(timeout=60)
    return [line.split()[-1] for line in out.splitlines()]


def test_a_kill_strikes_at_its_pass_and_once_only(tmp_path):
    first = start(tmp_path, Fault("driver.step", "kill", passes=3))
    assert len(steps(first)) == 2 and first.returncode == -signal.SIGKILL
    (fell,) = struck(tmp_path)
    assert (fell.pid, fell.rank, fell.fault.point) == (first.pid, 0, "driver.step")
    assert 0 < time.monotonic() - fell.time < 60
    second = subprocess.run(  # the same folder: it has struck
        [sys.executable, "-c", LOOP, "1.5", "0"], env={**os.environ, "PYTHONPATH": str(ROOT), faults.VARIABLE: str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert second.returncode == 0 and len(second.stdout.splitlines()) == 4


def test_of_two_processes_one_is_struck_and_a_rank_only_if_it_is_meant(tmp_path):
    both = [start(tmp_path / "any", Fault("driver.step", "raise")) for _ in range(2)]
    for process in both:
        process.wait(60)
    assert sorted(process.returncode for process in both) == [0, 1]
    assert "a fault on purpose at driver.step" in "".join(process.stderr.read() for process in both)
    meant = Fault("driver.step", "raise", rank=1)
    assert len(steps(start(tmp_path / "rank", meant, rank=0))) == 4
    assert len(steps(start(tmp_path / "rank", meant, rank=1))) == 0


def test_stop_and_delay_and_corrupt(tmp_path):
    hanging = start(tmp_path / "stop", Fault("driver.step", "stop", passes=2))
    assert os.waitpid(hanging.pid, os.WUNTRACED)[1] >> 8 == signal.SIGSTOP
    hanging.kill()
    hanging.communicate()
    slow = start(tmp_path / "delay", Fault("driver.step", "delay", seconds=0.3))
    began = time.monotonic()
    assert len(steps(slow)) == 4
    assert time.monotonic() - began > 0.3  # it slept at least as long as it was told
    assert steps(start(tmp_path / "nan", Fault("driver.step", "corrupt", passes=2))) == ["1.5", "nan", "1.5", "1.5"]


def test_corrupt_takes_tensors_and_files(tmp_path):
    assert faults._strike(Fault("engine.loss", "corrupt"), torch.ones(3)).isnan().all()
    assert math.isnan(faults._strike(Fault("engine.loss", "corrupt"), 1.0))
    (tmp_path / "small").write_bytes(b"a" * 10)
    (tmp_path / "large").write_bytes(bytes(range(200)))
    flip_bytes(tmp_path)
    assert (tmp_path / "small").read_bytes() == b"a" * 10
    flipped = (tmp_path / "large").read_bytes()
    assert [i for i in range(200) if flipped[i] != i] == list(range(100, 116))


def test_only_a_small_disk_is_filled(tmp_path):
    with pytest.raises(OSError, match="no test's own"):
        faults.fill_disk(tmp_path / "file")
    code = (
        "import errno, sys; from pathlib import Path; from rayllm.faults import fill_disk\n"
        "folder = Path(sys.argv[1]); (folder / 'before').write_text('x'); ballast = fill_disk(folder / 'file')\n"
        "try: (folder / 'after').write_bytes(bytes(1))\n"
        "except OSError as error: print(error.errno == errno.ENOSPC, ballast.stat().st_size)\n"
    )
    mount = f"mount -t tmpfs -o size=2m none {tmp_path} && exec {sys.executable} -c \"$0\" {tmp_path}"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, code], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    full, size = done.stdout.split()
    assert full == "True" and 1 << 20 < int(size) < 2 << 20


def calls() -> list[tuple[str, str]]:
    """(file, point) of every call of ``reach`` in the code."""
    found = []
    for top in ("rayllm", "actors", "jobs"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "reach":
                    owner = node.func.value
                    if isinstance(owner, ast.Name) and owner.id == "faults":
                        found.append((str(path.relative_to(ROOT)), ast.literal_eval(node.args[0])))
    return found


def test_every_point_is_in_the_code_once_and_every_actor_has_one():
    points = [point for _, point in calls()]
    assert sorted(points) == sorted(get_args(Point))
    actors = {
        "policy", "critic", "reference", "rollout", "reward_source", "learner", "trainer", "progress", "labeling",
        "serving",
    }  # fmt: skip
    assert actors <= {Path(file).stem for file, _ in calls() if file.startswith("actors/")}


def test_without_a_plan_nothing_is_looked_for_and_what_passes_comes_back():
    value = object()
    assert faults._planned is None and faults.carried() == {}
    assert faults.reach("engine.loss", value) is value
