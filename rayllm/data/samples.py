"""What a source of rewards may read, and the check of what it gave. Without torch: child processes import it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from rayllm.data.files import Row

LARGEST = 3.4e38
"""float32's."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Responses, one an entry; all tuples have the same order."""

    sample_ids: tuple[str, ...]
    """Prompt and number of the response to it: no two are equal. Answers are joined by it."""

    prompts: tuple[str, ...]
    """As the model reads them, special tokens included."""

    responses: tuple[str, ...]
    """Without special tokens and surrounding blanks."""

    token_ids: tuple[list[int], ...]
    """Those that the policy sampled."""

    rows: tuple[Row, ...]
    """Of the prompts, with all their columns."""

    stopped: tuple[bool, ...]
    """The policy ended its turn by itself."""

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, part: slice) -> Samples:
        return Samples(**{field.name: getattr(self, field.name)[part] for field in fields(self)})


@dataclass(frozen=True, slots=True)
class Failed:
    """In place of a score."""

    reason: str


def checked_scores(found: Any, sample_ids: tuple[str, ...]) -> list[float | Failed]:
    """What a source gave, one entry for each of ``sample_ids``, in their order.

    A number that is not finite is a failure of its response alone.

    Args:
        found: a sequence of numbers (or ``Failed``) in the order of the responses, or a mapping from sample ids.
        sample_ids: of the responses that the source was asked about.

    Raises:
        ValueError: anything else: no sequence, another number of values, ids missing or unknown, a value that is no
            number. The text goes on after the source's name.
    """
    if isinstance(found, Mapping):
        found = _joined({str(key): value for key, value in found.items()}, sample_ids)
    expected = f"expected a sequence of {len(sample_ids)} finite numbers, one a response"
    shape = getattr(found, "shape", None)
    if shape is not None and tuple(shape) != (len(sample_ids),):
        raise ValueError(f"returned the shape {tuple(shape)}, {expected}")
    values = found.tolist() if hasattr(found, "tolist") else found
    if not isinstance(values, list | tuple):
        raise ValueError(f"returned {values!r:.80}, {expected}")
    if len(values) != len(sample_ids):
        raise ValueError(f"returned {len(values)} values, {expected}")
    return [_checked(value, expected) for value in values]


def _joined(by_id: dict[str, Any], sample_ids: tuple[str, ...]) -> list[Any]:
    missing = [sample_id for sample_id in sample_ids if sample_id not in by_id]
    unknown = by_id.keys() - set(sample_ids)
    if missing or unknown:
        what = f"no value for {missing[0]}" if missing else f"a value for {min(unknown)}, which was not asked for"
        raise ValueError(
            f"returned {what} ({len(missing)} missing, {len(unknown)} unknown of {len(sample_ids)} responses)"
        )
    return [by_id[sample_id] for sample_id in sample_ids]


def _checked(value: Any, expected: str) -> float | Failed:
    if isinstance(value, Failed):
        return value
    if hasattr(value, "item"):  # a number of numpy or torch
        value = value.item()
    if not isinstance(value, int | float):  # bool is an int
        raise ValueError(f"returned {value!r:.40} among its values, {expected}")
    number = float(value)
    if not math.isfinite(number) or abs(number) > LARGEST:
        return Failed(f"returned {number}, expected a finite number")
    return number
