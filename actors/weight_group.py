"""Weights from a learner's rank straight to the engines' workers, over a process group that is theirs alone.

`broadcast`: one rank to all workers, NCCL between GPUs (gloo on CPU). `ipc`: one rank to the one engine that shares its
GPU, which maps the rank's memory. Bucket by bucket in both: a sharded model is never whole in one place. Each bucket is
preceded by what it holds and a checksum. Run on CPU only so far: over gloo, and over shared memory in place of CUDA's.
"""

from __future__ import annotations

import pickle
import socket
from collections.abc import Collection, Iterable, Iterator
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from actors.publishing import Seat
from actors.weights import Entry, check_shapes

BUCKET_BYTES = 256 << 20
TIMEOUT = timedelta(minutes=5)
"""For one bucket, and for all to come together."""

START_TIMEOUT = timedelta(minutes=30)
"""For the ranks of a learner to come together: some nodes are slow to start a process."""

class Bucket(NamedTuple):
    """What is said before a bucket's bytes."""

    entries: list[Entry]
    nbytes: int
    checksum: int
    memory: bytes | None
    """Where the reader maps it (ipc)."""


def open_store(
    host: str,
    port: int,
    rank: int,
    world_size: int,
    listener: socket.socket | None = None,
    timeout: timedelta = START_TIMEOUT,
) -> dist.TCPStore:
    """Where the members of a group find each other. Rank 0 serves it, through ``listener`` if it listens there already:
    then no other process can have taken the port."""
    fd = None if listener is None else listener.detach()
    return dist.TCPStore(host, port, world_size, rank == 0, timeout, wait_for_workers=False, master_listen_fd=fd)


class WeightGroup:
    """One member. Making it waits for all others.

    Args:
        seat: whose it is.
        device: of the tensors.
        listener: rank 0's, which listens where the seat says.
    """

    def __init__(self, seat: Seat, device: torch.device, listener: socket.socket | None = None) -> None:
        self._seat, self._device = seat, device
        store = open_store(seat.host, seat.port, seat.rank, seat.world_size, listener, TIMEOUT)
        prefixed = dist.PrefixStore("weights", store)
        self._over_nccl = device.type == "cuda" and seat.kind == "broadcast"
        self._group: Any
        if self._over_nccl:
            options = dist.ProcessGroupNCCL.Options()
            self._group = dist.ProcessGroupNCCL(prefixed, seat.rank, seat.world_size, options)
        else:
            self._group = dist.ProcessGroupGloo(prefixed, seat.rank, seat.world_size, TIMEOUT)
        if seat.kind == "ipc" and device.type == "cpu":
            torch.multiprocessing.set_sharing_strategy("file_system")  # file descriptors need a server of their own

    def send(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, dtype: torch.dtype | None) -> None:
        """Hand all tensors to all other members, floating point ones cast to ``dtype``."""
        for entries, flat in _buckets(named_tensors, dtype, self._device):
            shared = bytes(ForkingPickler.dumps(flat)) if self._seat.kind == "ipc" else None
            self._say(Bucket(entries, flat.nbytes, _checksum(flat), shared))
            if shared is None:
                self._broadcast(flat)
            else:
                self._group.barrier().wait()  # the reader has its copy
        self._say(None)

    def receive(
        self, expected: dict[str, tuple[int, ...]], optional: Collection[str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """What `send` sends.

        Raises:
            RuntimeError: a damaged bucket, or at the end, if names or shapes were not those expected.
        """
        shapes = {}
        while (bucket := self._hear()) is not None:
            if bucket.memory is None:
                flat = torch.empty(bucket.nbytes, dtype=torch.uint8, device=self._device)
                self._broadcast(flat)
            else:
                flat = pickle.loads(bucket.memory).clone()
                self._group.barrier().wait()
            found = _checksum(flat)
            if found != bucket.checksum:
                raise RuntimeError(f"weights arrived damaged: checksum {found}, sent {bucket.checksum}")
            for entry in bucket.entries:
                shapes[entry.name] = entry.shape
                data = flat[entry.offset : entry.offset + entry.nbytes]
                yield entry.name, data.view(getattr(torch, entry.dtype)).view(entry.shape)
        check_shapes(shapes, expected=expected, optional=optional)

    def _say(self, bucket: Bucket | None) -> None:
        text = torch.frombuffer(bytearray(pickle.dumps(bucket)), dtype=torch.uint8)
        self._broadcast(torch.tensor([len(text)]))
        self._broadcast(text)

    def _hear(self) -> Bucket | None:
        (length,) = self._broadcast(torch.zeros(1, dtype=torch.int64)).tolist()
        text = self._broadcast(torch.empty(length, dtype=torch.uint8))
        bucket: Bucket | None = pickle.loads(text.cpu().numpy().tobytes())
        return bucket

    def _broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(self._device) if self._over_nccl else tensor
        self._group.broadcast(tensor, 0).wait()
        return tensor


def _buckets(
    named_tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype | None, device: torch.device
) -> Iterator[tuple[list[Entry], torch.Tensor]]:
    """Tensors joined up to about `BUCKET_BYTES`, each on a multiple of 8 bytes."""
    entries: list[Entry] = []
    parts: list[torch.Tensor] = []
    end = 0
    for name, tensor in named_tensors:
        tensor = tensor.detach().to(device)
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        data = tensor.contiguous().reshape(-1).view(torch.uint8)
        data = torch.nn.functional.pad(data, (0, -len(data) % 8))
        entries.append(
            Entry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), end, tensor.nbytes)
        )
        parts.append(data)
        end += len(data)
        if end >= BUCKET_BYTES:
            yield entries, torch.cat(parts)
            entries, parts, end = [], [], 0
    if parts:
        yield entries, torch.cat(parts)


def _checksum(flat: torch.Tensor) -> int:
    """Where the tensor is: the sum of its 8-byte words, modulo 2 to the 64th."""
    return int(flat.view(torch.int64).sum())
