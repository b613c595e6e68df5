"""One run of the whole path at a tiny size, by the command that a user types."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = Path(__file__).parent / "tiny.yaml"


def rayllm(
    *arguments: object, timeout: float = 600, cwd: Path = ROOT, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`rayllm ...` in a process of its own, standard output and error together."""
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env={**(os.environ if env is None else env), "PYTHONPATH": str(ROOT)},
    )


def dies_behind_its_last_checkpoint(run_dir: Path) -> dict[str, Any]:
    """Leave a finished run as one that was killed while it wrote its model; returns what it knew of itself."""
    record = json.loads((run_dir / "run.json").read_text())
    shutil.rmtree(run_dir / "model")
    killed = record | {"status": "running", "metrics": {}, "model": None}
    (run_dir / "run.json").write_text(json.dumps(killed))
    return record


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> tuple[Path, str]:
    """(run folder, output) of a finished pipeline."""
    run_dir = tmp_path_factory.mktemp("pipeline") / "run"
    done = rayllm("pipeline", "--config", TINY, f"run_dir={run_dir}")
    assert done.returncode == 0, done.stdout
    return run_dir, done.stdout
