"""A job's own Ray session with two learner ranks in it, for tests from outside: python -m tests.jobs.session_script.

Prints one line of JSON about itself, then waits for a line on standard input (or a signal) and ends.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import psutil
import ray

from actors.environment import backend
from actors.group import ActorGroup, Role
from actors.learner import LearnerActor
from actors.weight_group import open_store
from jobs.session import ray_session
from rayllm.models.engine import init_distributed


class Rank(LearnerActor):
    """Meets the other rank, with no model."""

    def __init__(self, rank: int) -> None:
        self.rank, self.world_size, self._listener = rank, 2, None
        self.before = set(own_sockets())

    def meet(self, address: tuple[str, int]) -> list[tuple[str, int]]:
        os.environ.update(RANK=str(self.rank), WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR=address[0])
        os.environ["MASTER_PORT"] = str(address[1])
        store = open_store(*address, self.rank, self.world_size, self._taken_listener())
        init_distributed(backend(0), store)
        return sorted(set(own_sockets()) - self.before)


def own_sockets() -> list[tuple[str, int]]:
    """(address, port) that this process listens on."""
    return [(c.laddr.ip, c.laddr.port) for c in psutil.Process().net_connections() if c.status == "LISTEN"]


def listening() -> list[tuple[str, str, int]]:
    """(process, address, port) of all sockets that this job's processes listen on."""
    found = []
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            for connection in process.net_connections():
                if connection.status == "LISTEN":
                    found.append((process.name(), connection.laddr.ip, connection.laddr.port))
        except psutil.Error:
            continue
    return found


def main() -> None:
    with ray_session(None):
        ranks = ActorGroup(Role("rank", 2, 0.1, 0), Rank, lambda rank: {"rank": rank})
        address = ranks.submit(Rank.address, rank=0)[0]
        own = ranks.call(Rank.meet, address)
        folder = next(Path("/tmp").glob(f"rayllm-{os.getpid()}-*"))
        token = folder / "token"
        about = {
            "gcs": ray.get_runtime_context().gcs_address,
            "listening": listening(),
            "ranks": own,
            "address": ray.get(address),
            "token_mode": oct(token.stat().st_mode & 0o777),
            "folder": str(folder),
            "folder_mode": oct(folder.stat().st_mode & 0o777),
            "home_token": (Path.home() / ".ray/auth_token").exists(),
            "children": [p.pid for p in psutil.Process().children(recursive=True)],
        }
        print(json.dumps(about), flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
