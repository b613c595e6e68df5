"""A job's own Ray session: who may connect, what listens, what is left, two at once, Ctrl-C, no network, no memory."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from actors.weight_group import open_store
from jobs.session import _remove_stale_sessions
from tests.conftest import ROOT, heed_ctrl_c


def environment(home: Path, **more: str) -> dict[str, str]:
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "HOME": str(home), "PYTHONPATH": str(ROOT), "TMPDIR": "/tmp", **more}


def start(home: Path, *, wrapper: tuple[str, ...] = (), **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*wrapper, sys.executable, "-m", "tests.jobs.session_script"], cwd=ROOT, env=environment(home, **more), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=heed_ctrl_c,
    )  # fmt: skip


def about(process: subprocess.Popen[str]) -> dict:
    line = process.stdout.readline()
    assert line.startswith("{"), line + process.stderr.read()
    return json.loads(line)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Status and standard error."""
    if process.poll() is None:
        process.stdin.write("\n")
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(lives(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two sessions at once, each with a group of ranks; and what each said of itself."""
    home = tmp_path_factory.mktemp("home")
    processes = [start(home / str(number)) for number in range(2)]
    try:
        yield [(process, about(process)) for process in processes]
    finally:
        for process in processes:
            end(process)


@pytest.mark.scorecard("R61")
def test_two_sessions_at_once_have_ports_of_their_own(two, seen):
    ports = [{port for _, _, port in told["listening"]} for _, told in two]
    assert all(ports) and not ports[0] & ports[1]
    assert two[0][1]["gcs"] != two[1][1]["gcs"]
    assert all(len(told["ranks"]) == 2 for _, told in two)  # both groups met, each at an address of its own
    seen("two sessions with a process group each, no port in common")


@pytest.mark.scorecard("S06")
def test_nothing_listens_beyond_this_machine_but_what_asks_for_the_token(two, seen):
    _, told = two[0]
    beyond = sorted({(name, port) for name, ip, port in told["listening"] if ip not in ("127.0.0.1", "::1")})
    for _, port in beyond:  # whoever finds one of them can give no command
        for path in ("/api/jobs/", "/api/job_agent/jobs/"):
            assert http_status(port, path) in (0, 401, 403, 404, 405), (port, path)
    host, port = told["address"]
    assert host == "127.0.0.1" and [host, port] in told["ranks"][0]  # where the ranks met
    assert not [ip for ip, at in told["ranks"][0] if at == port and ip != host]
    ours = {tuple(pair) for rank in told["ranks"] for pair in rank if pair[0] in ("0.0.0.0", "::")}
    assert not ours, ours
    names = ", ".join(sorted({name for name, _ in beyond}))
    seen(f"{len(told['listening'])} sockets, {len(beyond)} of them beyond loopback ({names or 'none'})")


def http_status(port: int, path: str) -> int:
    """Of a POST without a token; 0 where nobody speaks HTTP."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=b'{"entrypoint": "true"}', method="POST")
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return 0


@pytest.mark.scorecard("S07", "S20")
def test_a_session_wants_its_token_and_keeps_it_to_its_user(two, tmp_path, seen):
    code = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print(ray.cluster_resources())"
    for changes in (
        {}, {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", code, two[0][1]["gcs"]], capture_output=True, text=True, timeout=120,
            env=environment(tmp_path / "home", **changes),
        )  # fmt: skip
        assert done.returncode != 0 and "CPU" not in done.stdout, changes
        assert "uthenticat" in done.stderr, done.stderr[-500:]
    for _, told in two:
        assert told["token_mode"] == "0o600" and told["folder_mode"] == "0o700"
        assert not told["home_token"]
    seen("refused without a token, with the mode off and with another's token; its file is 0600 in a folder of 0700")


@pytest.mark.scorecard("R14")
def test_a_job_whose_head_is_killed_ends_in_plain_words_and_leaves_no_process(tmp_path, seen):
    process = start(tmp_path / "home")
    told = about(process)
    (head,) = [p for p in psutil.Process(process.pid).children() if p.name() == "gcs_server"]
    began = time.monotonic()
    head.kill()
    process.wait(timeout=60)  # nobody tells it to end
    seconds, errors = time.monotonic() - began, process.stderr.read()
    assert process.returncode == 1, errors
    assert "failed: Ray's gcs_server ended; the same command continues where the run was" in errors
    assert gone(told["children"], 30)
    seen("status 1, told in plain words, no process left", detected=seconds)


@pytest.mark.scorecard("R62")
@pytest.mark.scorecard("R12", partly=True)
def test_a_killed_driver_leaves_no_process_and_the_next_session_clears_its_folder(tmp_path, seen):
    process = start(tmp_path / "home")
    told = about(process)
    began = time.monotonic()
    process.kill()
    process.wait()
    everyone = told["children"]
    gone(everyone, 15)
    left = [pid for pid in everyone if lives(pid)]
    detected = time.monotonic() - began
    assert all("gent" in psutil.Process(pid).name() for pid in left), [psutil.Process(pid).name() for pid in left]
    assert Path(told["folder"]).exists()
    _remove_stale_sessions()
    assert not Path(told["folder"]).exists() and gone(everyone, 10)
    process.communicate()
    agents = f", {len(left)} agents of Ray's only when the next job started" if left else ""
    seen(f"{len(everyone) - len(left)} processes ended by themselves{agents}; the next start left nothing", detected=detected)


@pytest.mark.scorecard("R62")
def test_leftovers_of_the_dead_are_cleared_and_those_of_the_living_stay():
    gone_pid = subprocess.Popen(["true"])
    gone_pid.wait()
    stale, alive = Path(f"/tmp/rayllm-{gone_pid.pid}-stale"), Path(f"/tmp/rayllm-{os.getpid()}-alive")
    for folder in (stale, alive):
        folder.mkdir()
    code = "import sys, time; f = open(sys.argv[1], 'w'); print('open', flush=True); time.sleep(600)"
    holders = [
        subprocess.Popen([sys.executable, "-c", code, str(folder / "log")], stdout=subprocess.PIPE)
        for folder in (stale, alive)
    ]
    try:
        for holder in holders:
            holder.stdout.readline()
        _remove_stale_sessions()
        holders[0].wait(10)
        assert not stale.exists() and alive.exists() and holders[1].poll() is None
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()
            holder.stdout.close()
        (alive / "log").unlink()
        alive.rmdir()


@pytest.mark.scorecard("R62")
def test_ray_address_to_nowhere_is_one_line(tmp_path, seen):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", "from jobs.session import ray_session\nwith ray_session(None): pass"],
        env=environment(tmp_path / "home", RAY_ADDRESS=f"127.0.0.1:{port}"), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0 and f"RAY_ADDRESS: no connection to 127.0.0.1:{port}" in done.stderr, done.stderr[-800:]
    seen("told with the address", detected=time.monotonic() - began)


@pytest.mark.scorecard("R68")
def test_ctrl_c_ends_a_session_and_a_second_one_does_no_harm(tmp_path, seen):
    recovered = 0.0
    for times in (1, 2):
        process = start(tmp_path / "home")
        told = about(process)
        began = time.monotonic()
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        _, errors = process.communicate(timeout=60)
        recovered = max(recovered, time.monotonic() - began)
        assert process.returncode == 130 and "Traceback" not in errors, errors[-800:]
        assert not Path(told["folder"]).exists() and gone(told["children"], 10)
    seen("status 130, no traceback, no process and no folder left, after one and after two", recovered=recovered)


@pytest.mark.scorecard("R61")
def test_twenty_groups_one_after_the_other_find_a_port(seen):
    for _ in range(20):
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        with pytest.raises(OSError, match="in use"):  # from the moment it is known it is ours
            socket.create_server(("127.0.0.1", port))
        store = open_store("127.0.0.1", port, 0, 1, listener)
        assert store.port == port
        group = dist.ProcessGroupGloo(dist.PrefixStore("g", store), 0, 1)
        group.barrier().wait()
        del group, store
    seen("20 process groups; a port that is told to others is bound before it is told, on its own address alone")


NO_NETWORK = """
import fcntl, socket, struct, os, sys
with socket.socket() as s:
    flags = struct.unpack("16sh", fcntl.ioctl(s, 0x8913, struct.pack("16sh", b"lo", 0)))[1]
    fcntl.ioctl(s, 0x8914, struct.pack("16sh", b"lo", flags | 1))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
"""Switches loopback on in a network namespace of its own and becomes what follows."""


@pytest.mark.scorecard("R66")
def test_a_session_and_its_process_group_need_no_network(tmp_path, seen):
    wrapper = ("unshare", "-rn", sys.executable, "-c", NO_NETWORK)
    process = subprocess.Popen(
        [*wrapper, "-m", "tests.jobs.session_script"], cwd=ROOT, env=environment(tmp_path / "home"), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    told = about(process)
    status, _ = end(process)
    assert status == 0 and told["ranks"]
    seen("Ray, an actor group and a process group came up with loopback alone")


OUT_OF_MEMORY = """
import ray, time
from actors.group import ActorGroup, Role, find_lost
from jobs.session import ray_session

class Sleeper:
    def sleep(self):
        time.sleep(100)

with ray_session(None):
    group = ActorGroup(Role("reference", 1, 0.1, 0), Sleeper, lambda rank: {})
    try:
        group.call(Sleeper.sleep)
    except RuntimeError as error:
        print("said:", str(error).splitlines()[0])
        print("lost:", find_lost([group]))
"""


@pytest.mark.scorecard("R67")
def test_a_process_that_ray_kills_for_memory_is_told_as_that(tmp_path, seen):
    """The monitor's bound is set below what the machine uses anyway, so that it strikes the first actor."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, timeout=200, cwd=ROOT,
        env=environment(tmp_path / "home", RAY_memory_usage_threshold="0.01", RAY_memory_monitor_refresh_ms="100"),
    )  # fmt: skip
    assert "said: reference: " in done.stdout and "out of memory" in done.stdout, done.stdout + done.stderr[-800:]
    assert "lost: {'reference': 'rank 0: its process was killed, the node was out of memory'}" in done.stdout
    seen(done.stdout.split("said: ")[1].splitlines()[0][:90], detected=time.monotonic() - began)
