import math

import pytest
import torch

from rayllm.algorithms.ensembles import ENSEMBLE_KINDS, combine_ensemble

REWARDS = torch.tensor([[1.0, 3.0], [2.0, 2.0], [-1.0, 0.0]])


@pytest.mark.parametrize(
    ("kind", "coef", "expected"),
    [
        ("none", 1.0, [2.0, 2.0, -0.5]),
        ("mean_std", 1.0, [1.0, 2.0, -1.0]),
        ("mean_std", 0.5, [1.5, 2.0, -0.75]),
        ("worst", 1.0, [1.0, 2.0, -1.0]),
    ],
)
def test_by_hand(kind, coef, expected):
    rewards, spread = combine_ensemble(REWARDS, kind=kind, coef=coef)
    assert rewards.tolist() == expected and spread.tolist() == [1.0, 0.0, 0.5]


def test_the_deviation_is_that_of_the_members_at_hand():
    _, spread = combine_ensemble(torch.tensor([[0.0, 1.0, 5.0]]))
    assert spread.item() == pytest.approx(math.sqrt((4 + 1 + 9) / 3))


@pytest.mark.parametrize("kind", ENSEMBLE_KINDS)
def test_one_member_is_taken_at_its_word(kind):
    rewards, spread = combine_ensemble(REWARDS[:, :1], kind=kind, coef=2.0)
    assert rewards.tolist() == REWARDS[:, 0].tolist() and spread.tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", ENSEMBLE_KINDS)
def test_the_order_of_the_members_does_not_matter(kind):
    rewards = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    for found, again in zip(
        combine_ensemble(rewards, kind=kind), combine_ensemble(rewards[:, [2, 0, 3, 1]], kind=kind), strict=True
    ):
        torch.testing.assert_close(found, again)


def test_rejects_bad_input():
    with pytest.raises(ValueError, match="known: none, mean_std, worst"):
        combine_ensemble(REWARDS, kind="best")
    with pytest.raises(ValueError, match=r"rewards has shape \(3,\)"):
        combine_ensemble(REWARDS[:, 0])
    with pytest.raises(ValueError, match="coef must be >= 0, got -1"):
        combine_ensemble(REWARDS, coef=-1)
