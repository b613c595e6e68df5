"""Weights on their way from a learner to those who sample or score with them: what travels is where they lie, or where
to meet. Who only hands that on needs no torch."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from actors.environment import this_node
from actors.memory import Memory, Place

if TYPE_CHECKING:  # who only samples needs no Ray
    import ray
    import torch

    from actors.weights import WeightBundle


Kind = Literal["broadcast", "ipc"]


class Seat(NamedTuple):
    """One member's place in a `WeightGroup`; the learner's rank is 0."""

    host: str
    port: int
    rank: int
    world_size: int
    kind: Kind

    def moved(self, ranks: int) -> Seat:
        return self._replace(rank=self.rank + ranks)


@dataclass(frozen=True, slots=True)
class Sent:
    """Weights that the learner sends through the group that it and the engines have joined."""

    version: int


@dataclass(frozen=True, kw_only=True)
class Published:
    """Where a `WeightBundle` lies until the next one is published by the same learner. As small for a large model."""

    node: str
    place: Place
    nbytes: int
    """Of the bundle's buffer; what describes its tensors follows, up to ``end``."""

    end: int
    version: int
    checksum: str
    stored: tuple[ray.ObjectRef, ...]
    """The reference of these bytes in Ray's store, if somebody reads on another node."""

    def fetch(self) -> WeightBundle:
        """Of this node's memory, or out of Ray's store.

        Raises:
            RuntimeError: the weights lie on another node and were not put into the store.
        """
        import ray

        from actors.weights import WeightBundle

        if self.node == this_node():
            content = self.place.read(self.end)
        elif self.stored:
            content = ray.get(self.stored[0])
        else:
            raise RuntimeError(f"weights of version {self.version} were published for node {self.node} only")
        entries, scaling = pickle.loads(content[self.nbytes :].tobytes())
        return WeightBundle(
            buffer=content[: self.nbytes],
            entries=entries,
            version=self.version,
            checksum=self.checksum,
            scaling=scaling,
        )


class Publisher:
    """A learner's side: one memory, packed anew for every version."""

    def __init__(self) -> None:
        self._memory = Memory()

    def publish(
        self,
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        version: int,
        dtype: torch.dtype | None = None,
        scaling: dict[str, float] | None = None,
        nodes: Collection[str] | None = None,
    ) -> Published:
        """Pack the tensors where others find them.

        Args:
            named_tensors, version, dtype, scaling: as in `pack`.
            nodes: where the readers live; None: anywhere.
        """
        import ray

        from actors.weights import pack

        bundle = pack(named_tensors, version=version, dtype=dtype, scaling=scaling, memory=self._memory)
        description = np.frombuffer(pickle.dumps((bundle.entries, bundle.scaling)), dtype=np.uint8)
        nbytes = bundle.buffer.nbytes
        end = nbytes + len(description)
        self._memory.reserve(end)
        self._memory.array[nbytes:end] = description
        node = this_node()
        elsewhere = nodes is None or set(nodes) - {node}
        return Published(
            node=node,
            place=self._memory.place(),
            nbytes=nbytes,
            end=end,
            version=version,
            checksum=bundle.checksum,
            stored=(ray.put(self._memory.array[:end]),) if elsewhere else (),
        )
