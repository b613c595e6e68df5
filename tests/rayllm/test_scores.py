"""What sources gave, joined by id, mixed and counted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rayllm.data.rollout import Rollout, collate
from rayllm.data.samples import Failed, checked_scores
from rayllm.data.scores import Scores, joined, mixed, sample_ids_of, stats, teaches

IDS = ("3/0", "3/1", "8/0")
NAN = math.nan


def scores(source: str, values: list[float], sample_ids=IDS, **more) -> Scores:
    return Scores(source, sample_ids, torch.tensor(values), **more)


def test_a_sample_is_its_prompt_and_the_number_of_its_response():
    assert sample_ids_of(torch.tensor([3, 8, 3, 3, 8])) == ("3/0", "8/0", "3/1", "3/2", "8/1")


def test_sources_are_joined_by_id_and_not_by_place():
    one = scores("a", [1.0, 2.0, 3.0])
    other = scores("b", [30.0, 10.0, 20.0], ("8/0", "3/0", "3/1"))
    assert joined([one, other], IDS).tolist() == [[1, 10], [2, 20], [3, 30]]


@pytest.mark.parametrize("ids", [("3/0", "3/1", "9/0"), ("3/0", "3/1")])
def test_scores_of_other_responses_are_refused(ids):
    with pytest.raises(RuntimeError, match="reward source b scored other responses than it was asked about"):
        joined([scores("a", [1.0, 2.0, 3.0]), scores("b", [1.0] * len(ids), ids)], IDS)


def test_a_reward_is_the_weighted_sum_of_normalised_scores():
    parts = [scores("a", [1.0, 2.0, 4.0]), scores("b", [1.0, NAN, 0.0])]
    rollouts = [
        Rollout(prompt_id=i, prompt_token_ids=(5,), token_ids=(6,), logprobs=(0.0,), finish_reason="stop",
                policy_versions=(0,))
        for i in (3, 3, 8)
    ]  # fmt: skip
    shard = collate(rollouts, pad_token_id=0)
    rewards = mixed(shard, parts, {"a": (2.0, 0.5, 1.0), "b": (0.0, 1.0, -3.0)})
    assert rewards[[0, 2]].tolist() == [-2 - 3, 4] and rewards[1].isnan()


def test_stats_leave_out_what_failed():
    found = stats([scores("a", [1.0, 3.0, NAN], num_failures=1, problem="p"), scores("b", [NAN, 5.0, 5.0])])
    a, b = found.sources["a"], found.sources["b"]
    assert (a.moments.mean, a.moments.std, a.num_failures, a.problem) == (2.0, 1.0, 1, "p")
    assert (b.moments.count, b.moments.mean, found.num_kept) == (2, 5.0, 1)


def test_a_prompt_teaches_when_one_source_tells_its_responses_apart():
    prompt_ids = torch.tensor([1, 1, 2, 2, 3, 3, 4, 4])
    ids = sample_ids_of(prompt_ids)
    a = Scores("a", ids, torch.tensor([0.0, 0, 0, 1, 5, 5, 0, NAN]))
    b = Scores("b", ids, torch.tensor([1.0, 2, 0, 0, 5, 5, 1, 3]))
    assert teaches([a, b], prompt_ids).tolist() == [True] * 4 + [False] * 4
    turns = torch.zeros(8, 2)
    turns[4, 1] = 1.0
    assert teaches([a, b], prompt_ids, turns).tolist() == [True] * 6 + [False] * 2


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([1.0, 2.0], r"returned 2 values, expected a sequence of 3 finite numbers, one a response"),
        (np.ones(2), r"returned the shape \(2,\), expected"),
        (1.0, r"returned 1.0, expected"),
        (torch.ones(3, 1), r"returned the shape \(3, 1\), expected"),
        ([[1.0]] * 3, r"returned \[1.0\] among its values, expected"),
        (None, r"returned None, expected"),
        ("123", r"returned '123', expected"),
        ([1.0, None, 2.0], r"returned None among its values, expected"),
        ([1.0, "2", 2.0], r"returned '2' among its values, expected"),
        ({"3/0": 1, "3/1": 2}, r"returned no value for 8/0 \(1 missing, 0 unknown of 3 responses\)"),
        ({"3/0": 1, "3/1": 2, "8/0": 3, "8/1": 4}, r"returned a value for 8/1, which was not asked for"),
    ],
)
@pytest.mark.scorecard("R50")
def test_what_is_not_one_number_a_response_is_refused(found, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        checked_scores(found, IDS)


@pytest.mark.parametrize(
    "found",
    [[1, True, 2.5], (1, 1, 2.5), np.array([1, 1, 2.5]), torch.tensor([1.0, 1.0, 2.5]), [np.float32(1), torch.tensor(1), 2.5],
     {"8/0": 2.5, "3/1": 1, "3/0": 1}],
)  # fmt: skip
def test_numbers_of_any_kind_are_taken_and_mappings_by_id(found):
    assert checked_scores(found, IDS) == [1.0, 1.0, 2.5]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.scorecard("R50")
def test_a_number_that_is_not_finite_fails_its_own_response_alone(value):
    first, second, third = checked_scores([1.0, value, 2.0], IDS)
    assert (first, third) == (1.0, 2.0)
    assert isinstance(second, Failed) and second.reason == f"returned {value}, expected a finite number"
