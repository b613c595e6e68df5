"""Weights on their way from a learner to those who sample or score with them: what travels is where they lie."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from actors.weights import Memory, Place, WeightBundle, pack

if TYPE_CHECKING:  # who only samples needs no Ray
    import ray


@dataclass(frozen=True, kw_only=True)
class Published:
    """A `WeightBundle` that stays where it was packed, until the next one is published by the same learner."""

    node: str
    place: Place
    nbytes: int
    bundle: WeightBundle
    """Without its buffer."""

    stored: tuple[ray.ObjectRef, ...]
    """The reference of the buffer in Ray's store, if somebody reads on another node."""

    def fetch(self) -> WeightBundle:
        """The bundle with its buffer: of this node's memory, or out of Ray's store.

        Raises:
            RuntimeError: the weights lie on another node and were not put into the store.
        """
        import ray

        if self.node == this_node():
            return replace(self.bundle, buffer=self.place.read(self.nbytes))
        if not self.stored:
            raise RuntimeError(f"weights of version {self.bundle.version} were published for node {self.node} only")
        return replace(self.bundle, buffer=ray.get(self.stored[0]))


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

        bundle = pack(named_tensors, version=version, dtype=dtype, scaling=scaling, memory=self._memory)
        node = this_node()
        elsewhere = nodes is None or set(nodes) - {node}
        return Published(
            node=node,
            place=self._memory.place(),
            nbytes=bundle.buffer.nbytes,
            bundle=replace(bundle, buffer=np.empty(0, dtype=np.uint8)),
            stored=(ray.put(bundle.buffer),) if elsewhere else (),
        )


def this_node() -> str:
    """Ray's id of the node of this process."""
    import ray

    return str(ray.get_runtime_context().get_node_id())
