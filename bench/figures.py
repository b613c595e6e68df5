"""Medians with their spread, and where they were measured."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console

from rayllm.lineage import code_version, versions

GIB = 1 << 30
WIDTH = 120
"""Columns of the tables."""


def console() -> Console:
    """As wide as the tables, wherever it goes."""
    return Console(width=WIDTH)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "q1": float(low), "q3": float(high)}


def written(figure: dict[str, float], digits: int = 3) -> str:
    """``median (q1 to q3)``."""
    return f"{figure['median']:.{digits}f} ({figure['q1']:.{digits}f} to {figure['q3']:.{digits}f})"


def circumstances() -> dict[str, Any]:
    """Machine, versions, date and command; the load at this moment tells whether others use the machine."""
    return {
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
            "system": f"{platform.system()} {platform.release().partition('-')[0]}",
            "load_before": round(os.getloadavg()[0], 2),
        },
        "versions": {"python": platform.python_version(), **versions()},
        "code": code_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
