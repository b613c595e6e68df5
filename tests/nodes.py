"""A Ray cluster of several nodes on this machine: `python -m tests.nodes NODES.yaml`.

Reads a list of nodes, the head first: arguments of `cluster_utils.Cluster.add_node`. Prints the address when all are up.
Every line on its standard input adds a node, as JSON; the end of it ends the cluster.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Nodes:
    address: str
    process: subprocess.Popen[str]

    @property
    def env(self) -> dict[str, str]:
        """Of a driver that runs there."""
        return {**os.environ, "RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}

    def add(self, **node: Any) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(node) + "\n")
        self.process.stdin.flush()
        self.process.stdout.readline()


@contextmanager
def cluster_of(description: str, folder: Path) -> Iterator[Nodes]:
    """A cluster in a process of its own.

    Args:
        description: YAML.
        folder: for it and the log.
    """
    path = folder / "nodes.yaml"
    path.write_text(description)
    short = tempfile.mkdtemp(prefix="rt-", dir="/tmp")  # paths of sockets must be short
    (Path(short) / "ray").mkdir()  # for the file with the address, which other jobs of this machine must not find
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": short, "TMPDIR": short}
    with (folder / "nodes.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.nodes", str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=env,
        )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        assert address, (folder / "nodes.log").read_text()
        yield Nodes(address, process)
    finally:
        process.stdin.close()
        process.wait(timeout=60)
        shutil.rmtree(short, ignore_errors=True)


def main(path: Path) -> None:
    from ray.cluster_utils import Cluster

    head, *others = yaml.safe_load(path.read_text())
    cluster = Cluster()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cluster.add_node(
        **head, temp_dir=os.environ["RAY_TMPDIR"], include_dashboard=False, dashboard_agent_listen_port=port
    )
    for node in others:
        cluster.add_node(**node)
    print(cluster.address, flush=True)
    for line in sys.stdin:
        cluster.add_node(**json.loads(line))
        print("added", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
