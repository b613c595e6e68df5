import numpy as np
import pytest

from rayllm.data.comparisons import compared, judged
from rayllm.data.preferences import Feedback, Ranking


def ranking(prompt: list[int], responses: list[list[int]], ranks: list[int]) -> Ranking:
    return Ranking([np.array([*prompt, *r]) for r in responses], ranks, len(prompt))


FOUR = ranking([1, 2], [[10], [11], [12, 5], [13]], [2, 0, 1, 1])


def test_all_pairs_by_hand_ties_make_none():
    found = compared(FOUR, "all")
    assert sorted(found.pairs) == [(1, 0), (1, 2), (1, 3), (2, 0), (3, 0)]
    assert len(found.sequences) == 4 and found.longest == 4 and not found.desirable and not found.mismatched


def test_best_and_worst_leave_the_others_out():
    found = compared(FOUR, "best_worst")
    assert [s.tolist() for s in found.sequences] == [[1, 2, 11], [1, 2, 10]] and found.pairs == [(0, 1)]


def test_judged_responses_stand_alone_beside_the_next_one_to_another_prompt():
    def feedback(prompt, response, desirable):
        return Feedback(np.array([*prompt, *response]), len(prompt), desirable)

    one, same, other = feedback([1, 2], [10], True), feedback([1, 2], [30, 31], False), feedback([3], [20, 6], True)
    found = judged([one, same, other], max_length=9)
    assert [c.desirable for c in found] == [[True], [False], [True]]
    assert [c.sequences[0].tolist() for c in found] == [[1, 2, 10], [1, 2, 30, 31], [3, 20, 6]]
    assert [c.mismatched[0].tolist() for c in found] == [[1, 2, 20, 6], [1, 2, 20, 6], [3, 10]]
    assert not found[0].pairs and len(judged([one, other], max_length=3)[0].mismatched[0]) == 3
    with pytest.raises(ValueError, match="same prompt"):
        judged([one, same], max_length=9)
