"""How a process starts, and that it ends in silence."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT


def test_what_was_imported_without_garbage_collection_is_not_told_as_leaked():
    pytest.importorskip("triton")
    code = "import rayllm.startup\nwith rayllm.startup.without_garbage_collection():\n    import triton"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout + ended.stderr == ""
