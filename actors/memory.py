"""Memory of one process that others on its node read: the same pages, nothing is copied."""

from __future__ import annotations

import mmap
import os
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Memory:
    """Bytes that other processes of this user on this node may map, for as long as this process lives. They have no
    name in the file system, so that none is left behind by a process that is killed."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("rayllm-weights")
        self.array = np.empty(0, dtype=np.uint8)

    def __del__(self) -> None:
        os.close(self._fd)

    def reserve(self, nbytes: int) -> None:
        """Make ``array`` at least so long; what it holds stays."""
        if nbytes > len(self.array):
            nbytes = max(nbytes, 2 * len(self.array))
            os.ftruncate(self._fd, nbytes)
            self.array = np.frombuffer(mmap.mmap(self._fd, nbytes), dtype=np.uint8)

    def place(self) -> Place:
        return Place(os.getpid(), self._fd)


class Place(NamedTuple):
    """Where a `Memory` is found by another process of its node."""

    pid: int
    fd: int

    def read(self, nbytes: int) -> np.ndarray:
        """(nbytes,) uint8: the first ``nbytes`` bytes, read-only, as they change."""
        return _mapped(self.pid, self.fd, nbytes)


@lru_cache(maxsize=2)
def _mapped(pid: int, fd: int, nbytes: int) -> np.ndarray:
    """Kept from sync to sync: the pages of a new mapping would all fault again."""
    opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY)
    try:
        return np.frombuffer(mmap.mmap(opened, nbytes, prot=mmap.PROT_READ), dtype=np.uint8)
    finally:
        os.close(opened)
