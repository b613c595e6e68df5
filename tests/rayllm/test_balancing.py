"""Rows to ranks and to micro-batches."""

from __future__ import annotations

import numpy as np
import pytest

from rayllm.data.balancing import balanced_partition, micro_batches_by_tokens, with_num_parts

LENGTHS = np.random.default_rng(0).lognormal(5, 1, size=1003).astype(int).clip(1, 2048).tolist()


def everything(parts):
    return sorted(row for part in parts for row in part)


def test_a_partition_by_hand():
    # 9 and 7 first, then 6 to the part with 7 and 2 to the part with 9.
    assert balanced_partition([2, 7, 9, 6], 2) == [[2, 0], [1, 3]]


@pytest.mark.parametrize("num_parts", [1, 2, 3, 8, 64])
def test_parts_have_equal_rows_and_near_equal_tokens(num_parts):
    parts = balanced_partition(LENGTHS, num_parts)
    assert everything(parts) == list(range(len(LENGTHS)))
    rows = [len(part) for part in parts]
    assert max(rows) - min(rows) <= 1
    sums = [sum(LENGTHS[row] for row in part) for part in parts]
    dealt = [sum(LENGTHS[i::num_parts]) for i in range(num_parts)]
    assert max(sums) - min(sums) <= max(LENGTHS)
    assert num_parts == 1 or max(sums) - min(sums) < (max(dealt) - min(dealt)) / 3
    assert parts == balanced_partition(LENGTHS, num_parts)


def test_fewer_rows_than_parts_and_none_at_all():
    assert balanced_partition([5, 4], 3) == [[0], [1], []]
    assert balanced_partition([], 2) == [[], []]
    with pytest.raises(ValueError, match="num_parts=0"):
        balanced_partition([1], 0)


def test_micro_batches_by_hand():
    # Budget 12: 5+4 padded to 2 x 5 = 10 (a third would make 15), 3+3+2 to 3 x 3 = 9 and 1 to 4 x 3 = 12.
    assert micro_batches_by_tokens([3, 5, 1, 3, 4, 2], 12) == [[1, 4], [0, 3, 5, 2]]


@pytest.mark.parametrize("max_tokens", [1, 100, 4096, 10**9])
def test_micro_batches_stay_in_the_budget(max_tokens):
    parts = micro_batches_by_tokens(LENGTHS, max_tokens)
    assert everything(parts) == list(range(len(LENGTHS)))
    for part in parts:
        assert len(part) == 1 or len(part) * max(LENGTHS[row] for row in part) <= max_tokens
    if max_tokens == 4096:  # sorted by length, little of the budget is padding
        padded = sum(len(part) * max(LENGTHS[row] for row in part) for part in parts)
        assert padded < 1.15 * sum(LENGTHS)
    with pytest.raises(ValueError, match="max_tokens=0"):
        micro_batches_by_tokens(LENGTHS, 0)


def test_every_rank_gets_the_same_number_of_parts():
    assert with_num_parts([[1, 2, 3, 4], [5]], 4) == [[1], [2], [3, 4], [5]]
    assert with_num_parts([[1], [2]], 4) == [[1], [2], [], []]
    assert with_num_parts([], 2) == [[], []]
    assert with_num_parts([[1, 2]], 1) == [[1, 2]]
    with pytest.raises(ValueError, match="num_parts=1 is less than the 2 parts"):
        with_num_parts([[1], [2]], 1)
