"""Which rows go together: equal work for every rank, and micro-batches that fit a budget of padded tokens.

Everything here is about row numbers and lengths; each function is deterministic, and every row is in exactly one part.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def balanced_partition(lengths: Sequence[int], num_parts: int) -> list[list[int]]:
    """Rows of each part: equal numbers of rows (give or take one), near-equal sums of ``lengths``.

    Longest first, one row for every part in turn, the longest of the turn to the part with the least so far.
    100,000 rows take less than a second.

    Args:
        lengths: tokens of each row.
        num_parts: at least 1; a part is empty when there are fewer rows.
    """
    if num_parts < 1:
        raise ValueError(f"num_parts={num_parts}: expected at least 1")
    values = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-values, kind="stable")
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    sums = np.zeros(num_parts, dtype=np.int64)
    for start in range(0, len(order), num_parts):
        rows = order[start : start + num_parts]
        emptiest = np.argsort(sums, kind="stable")[: len(rows)]
        sums[emptiest] += values[rows]
        for part, row in zip(emptiest.tolist(), rows.tolist(), strict=True):
            parts[part].append(row)
    return parts


def micro_batches_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Rows of each micro-batch, longest rows first: rows x longest row is at most ``max_tokens``.

    A row that is longer than the budget stands alone.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: expected at least 1")
    parts: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not parts or (len(parts[-1]) + 1) * longest > max_tokens:
            parts.append([])
            longest = lengths[row]
        parts[-1].append(row)
    return parts


def with_num_parts(parts: Sequence[Sequence[int]], num_parts: int) -> list[list[int]]:
    """The same rows in ``num_parts`` parts, so that every rank makes the same number of passes.

    The part with the most rows is halved until there are enough; when all rows stand alone, empty parts are added,
    for which the caller computes on something of weight zero.
    """
    if num_parts < len(parts):
        raise ValueError(f"num_parts={num_parts} is less than the {len(parts)} parts there are")
    result = [list(part) for part in parts]
    while len(result) < num_parts:
        largest = max(range(len(result)), key=lambda i: len(result[i]), default=None)
        if largest is None or len(result[largest]) < 2:
            return result + [[] for _ in range(num_parts - len(result))]
        part = result[largest]
        middle = len(part) // 2
        result[largest : largest + 1] = [part[:middle], part[middle:]]
    return result
