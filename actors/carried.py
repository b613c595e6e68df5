"""Values that a process only hands on. There they stay pickled: it imports nothing for them, and copies no array."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

ValueT = TypeVar("ValueT")


class Carried(Generic[ValueT]):
    """Pickled where it is made, with its arrays beside it as they lie; travels as it is until somebody opens it.

    Not for what holds an ``ObjectRef``: Ray would keep that object for ever.
    """

    def __init__(self, value: ValueT) -> None:
        from ray import cloudpickle

        self._buffers: list[Any] = []
        self._pickled = cloudpickle.dumps(value, protocol=5, buffer_callback=self._buffers.append)

    def open(self) -> ValueT:
        """The value, anew with each call; its arrays share the memory in which they came, and are read-only there."""
        value: ValueT = pickle.loads(self._pickled, buffers=self._buffers)
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return _carried, (self._pickled, [pickle.PickleBuffer(buffer) for buffer in self._buffers])


class Delivery(Generic[ValueT]):
    """Arrives as the value itself: whoever gets it unpickles what was carried, and joins its parts.

    Args:
        join: makes one value of several; may be None where there is one part.
    """

    def __init__(
        self, parts: Sequence[Carried[ValueT]], join: Carried[Callable[[list[ValueT]], ValueT]] | None = None
    ) -> None:
        self.parts, self.join = parts, join

    def __reduce__(self) -> tuple[Any, ...]:
        return _delivered, (self.parts, self.join)


def _carried(pickled: bytes, buffers: list[Any]) -> Carried[Any]:
    carried: Carried[Any] = Carried.__new__(Carried)
    carried._pickled, carried._buffers = pickled, buffers
    return carried


def _delivered(parts: Sequence[Carried[Any]], join: Carried[Callable[[list[Any]], Any]] | None) -> Any:
    values = [part.open() for part in parts]
    if len(values) > 1:
        assert join is not None, "several parts want to be joined"
        return join.open()(values)
    return values[0]
