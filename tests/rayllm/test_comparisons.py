import numpy as np
import pytest

from rayllm.data.comparisons import compared, judged
from rayllm.data.preferences import Ranking


def ranking(prompt: list[int], responses: list[list[int]], ranks: list[int]) -> Ranking:
    return Ranking([np.array([*prompt, *r]) for r in responses], ranks, len(prompt))


FOUR = ranking([1, 2], [[10], [11], [12, 5], [13]], [2, 0, 1, 1])
TWO = ranking([3], [[20, 6], [21]], [0, 1])


def test_all_pairs_by_hand_ties_make_none():
    found = compared(FOUR, "all")
    assert sorted(found.pairs) == [(1, 0), (1, 2), (1, 3), (2, 0), (3, 0)]
    assert len(found.sequences) == 4 and found.longest == 4 and not found.desirable and not found.mismatched


def test_best_and_worst_leave_the_others_out():
    found = compared(FOUR, "best_worst")
    assert [s.tolist() for s in found.sequences] == [[1, 2, 11], [1, 2, 10]] and found.pairs == [(0, 1)]


def test_wanted_are_those_that_beat_more_than_they_lose_to():
    four, two = judged([FOUR, TWO], "all", max_length=9)  # 12 and 13 beat one and lose to one: neither
    assert [s[-1] for s in four.sequences] == [10, 11] and four.desirable == [False, True]
    assert two.desirable == [True, False] and not two.pairs
    middle = ranking([1], [[4], [5], [6], [7]], [0, 1, 2, 3])
    assert judged([middle, TWO], "all", max_length=9)[0].desirable == [True, True, False, False]
    assert judged([middle, TWO], "best_worst", max_length=9)[0].desirable == [True, False]


def test_mismatched_responses_are_those_of_the_next_other_prompt():
    same = ranking([1, 2], [[30], [31]], [0, 1])
    four, _, two = judged([FOUR, same, TWO], "all", max_length=9)
    assert [s.tolist() for s in four.mismatched] == [[1, 2, 20, 6], [1, 2, 21]]  # not those of its own prompt
    assert [s.tolist() for s in two.mismatched] == [[3, 10], [3, 11]]
    assert [len(s) for s in judged([FOUR, TWO], "all", max_length=3)[0].mismatched] == [3, 3]
    with pytest.raises(ValueError, match="same prompt"):
        judged([FOUR, same], "all", max_length=9)
