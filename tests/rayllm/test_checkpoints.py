"""Checkpoints that lose nothing: damage is refused by name, a kill or a full disk leaves the last good one."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayllm.checkpoints import LATEST, MAX_MISSED, CheckpointError, Checkpoints, check, read_state, write_file
from tests.conftest import ROOT

SIZE = 3000


def save(checkpoints: Checkpoints, step: int) -> Path:
    """Two parts: one told of by its writer, one found."""
    folder = checkpoints.prepare(step, 2 * SIZE)
    (folder / "policy").mkdir()
    files = write_file(folder / "policy/part", bytes([step % 256]) * SIZE)
    (folder / "reference").write_bytes(os.urandom(SIZE))
    return checkpoints.commit(step, files, {"step": step})


@pytest.mark.scorecard("R31")
def test_the_newest_is_complete_and_old_ones_go(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.newest() is None
    for step in (1, 2, 3):
        save(checkpoints, step)
    (checkpoints.prepare(4, SIZE) / "half").write_bytes(b"killed here")
    step, folder = Checkpoints(tmp_path / "c", keep=2).newest()
    assert (step, read_state(folder)) == (3, {"step": 3})
    assert (tmp_path / "c" / LATEST).read_text() == "step-000003"
    assert checkpoints.steps() == [2, 3]
    save(checkpoints, 4)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [LATEST, "step-000003", "step-000004"]


@pytest.mark.scorecard("R31")
def test_the_oldest_go_when_they_take_too_much_space(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=5, max_gib=3 * SIZE * 2 / 2**30)
    for step in range(1, 6):
        save(checkpoints, step)
    assert checkpoints.steps() == [4, 5]  # two take 4 * SIZE and the manifests, three would take more than 6 * SIZE
    checkpoints.max_gib = 1e-9
    save(checkpoints, 6)
    assert checkpoints.steps() == [6]


def flip(folder: Path) -> None:
    content = bytearray((folder / "policy/part").read_bytes())
    content[SIZE // 2] ^= 1
    (folder / "policy/part").write_bytes(content)


DAMAGE = {
    "flipped bit": (flip, r"policy/part is not what was written: its sha256 is"),
    "truncated": (lambda f: os.truncate(f / "policy/part", SIZE - 1), r"policy/part has 2999 bytes, 3000 were written"),
    "missing": (lambda f: (f / "reference").unlink(), r"reference is missing; manifest.json lists it"),
    "of another step": (
        lambda f: shutil.copy(f.parent / "step-000001/policy/part", f / "policy/part"), r"policy/part is not what"
    ),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"manifest.json cannot be read: FileNotFoundError"),
    "half a manifest": (lambda f: os.truncate(f / "manifest.json", 40), r"manifest.json cannot be read: JSONDecodeError"),
    "manifest of another step": (
        lambda f: shutil.copy(f.parent / "step-000001/manifest.json", f / "manifest.json"), r"expected \(1, 2, True\)"
    ),
    "state": (lambda f: (f / "state.json").write_text('{"step": 7}'), r"state.json is not what was written"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.scorecard("R29", "S03")
def test_what_is_damaged_is_refused_by_name_and_the_one_before_is_used(tmp_path, damage):
    spoil, message = DAMAGE[damage]
    checkpoints = Checkpoints(tmp_path, keep=3)
    save(checkpoints, 1)
    spoil(save(checkpoints, 2))
    with pytest.raises(CheckpointError, match=message):
        check(tmp_path / "step-000002")
    step, _ = checkpoints.newest()
    assert step == 1 and len(checkpoints.refused) == 1 and "step-000002" in checkpoints.refused[0]
    save(checkpoints, 2)
    assert checkpoints.newest()[0] == 2 and not list(tmp_path.glob("refused-*"))


@pytest.mark.scorecard("R29", "R30", "S03")
def test_when_all_are_damaged_nothing_starts_over_silently(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    flip(save(checkpoints, 1))
    with pytest.raises(CheckpointError, match="no checkpoint can be used: .*step-000001/policy/part.*overwrite=true"):
        checkpoints.newest()


@pytest.mark.scorecard("R30")
def test_a_checkpoint_that_is_gone_is_missed(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2):
        save(checkpoints, step)
    shutil.rmtree(tmp_path / "step-000002")
    assert checkpoints.newest()[0] == 1
    assert "step-000002 is gone" in checkpoints.refused[0]
    shutil.rmtree(tmp_path / "step-000001")
    with pytest.raises(CheckpointError, match="step-000002 is gone"):
        checkpoints.newest()


SAVE_FOR_EVER = """
import sys
from pathlib import Path
from rayllm.checkpoints import Checkpoints
from tests.rayllm.test_checkpoints import save

checkpoints = Checkpoints(Path(sys.argv[1]), keep=1)
found = checkpoints.newest()
step = found[0] if found else 0
print("ready", flush=True)
while True:
    step += 1
    save(checkpoints, step)
"""


@pytest.mark.scorecard("R08", "R25")
def test_killed_at_any_moment_the_last_good_one_is_there(tmp_path):
    """Twelve times; with keep=1 the old one must not go before the new one is safe."""
    rng, reached = random.Random(0), 0
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.01, 0.1))
        process.kill()
        process.wait()
        checkpoints = Checkpoints(tmp_path, keep=1)
        found = checkpoints.newest()
        assert not checkpoints.refused
        if found is not None:
            assert found[0] >= reached and read_state(found[1]) == {"step": found[0]}
            reached = found[0]
    assert reached > 12


FILL_THE_DISK = """
import errno, sys
from pathlib import Path
from rayllm.checkpoints import Checkpoints, write_file
from tests.rayllm.test_checkpoints import save

checkpoints = Checkpoints(Path(sys.argv[1]) / "c", keep=3)
for step in (1, 2):
    folder = checkpoints.prepare(step, 2**20)
    checkpoints.commit(step, write_file(folder / "part", bytes(2**20)), {"step": step})
try:
    checkpoints.prepare(3, 7 * 2**20)
except OSError as error:
    assert error.errno == errno.ENOSPC and "needs 0.00795 GiB, free are" in str(error), error
    assert str(checkpoints.folder) in str(error)
    print(checkpoints.failed(3, str(error)))
else:
    raise SystemExit("there was no room for it")
assert checkpoints.steps() == [1, 2], "nothing goes that would not help"
folder = checkpoints.prepare(3, 5 * 2**20)
assert checkpoints.steps() == [2], "the older one makes room, the newest stays"
try:
    write_file(folder / "part", bytes(9 * 2**20))  # another process filled the disk meanwhile
except OSError as error:
    assert error.errno == errno.ENOSPC and str(folder / "part") in str(error), error
    checkpoints.failed(3, str(error))
else:
    raise SystemExit("the disk was not full")
assert checkpoints.newest()[0] == 2 and not checkpoints.partial(3).exists()
folder = checkpoints.prepare(4, 2**20)
checkpoints.commit(4, write_file(folder / "part", bytes(2**20)), {"step": 4})
assert checkpoints.newest()[0] == 4
print("survived")
"""


@pytest.mark.scorecard("R28")
def test_a_full_disk_costs_a_save_and_no_checkpoint(tmp_path):
    """On a real filesystem of 8 MiB."""
    mount = f"mount -t tmpfs -o size=8m none {tmp_path}"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "sh", "-c", mount]).returncode:
        pytest.skip("this machine lets nobody mount a small filesystem")
    run = f'{mount} && {sys.executable} -c "$0" {tmp_path}'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", run, FILL_THE_DISK], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no checkpoint of step 3: ") and done.stdout.endswith("survived\n")


@pytest.mark.scorecard("R28", "R33")
def test_a_run_that_cannot_save_again_and_again_stops(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in range(MAX_MISSED):
        assert "no checkpoint of step" in checkpoints.failed(step, "disk full")
    with pytest.raises(RuntimeError, match=r"disk full; 4 saves in a row failed"):
        checkpoints.failed(9, "disk full")
    save(checkpoints, 10)
    assert checkpoints.failed(11, "disk full")


@pytest.mark.scorecard("R37")
def test_bytes_that_the_disk_changed_are_noticed_at_once(tmp_path, monkeypatch):
    from rayllm import checkpoints as module

    def rots(path: Path) -> str:
        path.write_bytes(b"x" * path.stat().st_size)
        return real(path)

    real = module.sha256_file
    monkeypatch.setattr(module, "sha256_file", rots)
    with pytest.raises(OSError, match="read back") as error:
        write_file(tmp_path / "part", b"good bytes")
    assert error.value.errno == errno.EIO


@pytest.mark.scorecard("R29")
def test_the_manifest_lists_every_file(tmp_path):
    folder = save(Checkpoints(tmp_path, keep=1), 5)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 5 and set(manifest["files"]) == {"policy/part", "reference", "state.json"}
    assert manifest["files"]["policy/part"]["bytes"] == SIZE
