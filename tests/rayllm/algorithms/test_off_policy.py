import math

import pytest
import torch

from rayllm.algorithms.off_policy import WEIGHT_KINDS, importance_weights, mismatch

NAN = float("nan")
# Ratios of learner to sampler: 2, 0.25 and 1 in row 0 (column 2 is tool output); 4 in row 1; row 2 has no action.
RATIOS = torch.tensor([[NAN, 2.0, NAN, 0.25, 1.0], [NAN, 4.0, NAN, NAN, NAN], [NAN] * 5])
MASK = torch.tensor([[0, 1, 0, 1, 1], [0, 1, 0, 0, 0], [0] * 5]).bool()
SAMPLER = torch.full((3, 5), -1.0)
LEARNER = RATIOS.log() - 1


def weights_loop(learner, sampler, mask, kind, low, high):
    out = [[0.0] * len(row) for row in mask]
    for b, row in enumerate(mask):
        columns = [t for t in range(len(row)) if row[t]]
        ratios = [math.exp(learner[b][t] - sampler[b][t]) for t in columns]
        for t, ratio in zip(columns, ratios, strict=True):
            if kind == "none":
                out[b][t] = 1.0
            elif kind == "token":
                out[b][t] = min(ratio, high)
            elif kind == "sequence":
                out[b][t] = min(math.prod(ratios), high)
            elif kind == "mask":
                out[b][t] = ratio if low <= ratio <= high else 0.0
            else:
                out[b][t] = float(low <= math.prod(ratios) ** (1 / len(ratios)) <= high)
    return out


def test_importance_weights_by_hand():
    # Row 0: product 0.5, geometric mean 0.5^(1/3) = 0.79. Row 1: 4.
    expected = {  # the actions of row 0, then that of row 1
        "none": [1, 1, 1, 1],
        "token": [2, 0.25, 1, 3],
        "sequence": [0.5, 0.5, 0.5, 3],
        "mask": [2, 0, 1, 0],
        "sequence_mask": [1, 1, 1, 0],
    }
    assert tuple(expected) == WEIGHT_KINDS
    for kind, numbers in expected.items():
        weights = importance_weights(LEARNER, SAMPLER, MASK, kind=kind, low=0.5, high=3.0)
        torch.testing.assert_close(weights[MASK], torch.tensor(numbers, dtype=torch.float32))
        assert (weights[~MASK] == 0).all()
    # Nearer bounds drop row 0 by its geometric mean.
    assert (importance_weights(LEARNER, SAMPLER, MASK, kind="sequence_mask", low=0.8, high=3.0) == 0).all()


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_importance_weights_match_a_loop(kind):
    generator = torch.Generator().manual_seed(0)
    sampler = -torch.rand(6, 9, generator=generator)
    learner = sampler + 0.5 * torch.randn(6, 9, generator=generator)
    mask = torch.rand(6, 9, generator=generator) < 0.6
    mask[4] = False
    weights = importance_weights(learner, sampler, mask, kind=kind, low=0.8, high=1.3)
    expected = weights_loop(learner.tolist(), sampler.tolist(), mask.tolist(), kind, 0.8, 1.3)
    torch.testing.assert_close(weights, torch.tensor(expected))
    if kind != "none":
        assert len(weights[mask].unique()) > 1  # some tokens are bounded or dropped, and some are not


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_the_same_policy_has_weight_one_and_weights_have_no_gradient(kind):
    learner = SAMPLER.clone().requires_grad_()
    for low, high in [(0.5, 2.0), (1.0, 1.0)]:
        weights = importance_weights(learner, SAMPLER, MASK, kind=kind, low=low, high=high)
        assert torch.equal(weights, MASK.float()) and not weights.requires_grad


def test_a_ratio_that_float32_cannot_hold_is_bounded_or_dropped():
    learner = SAMPLER + 500.0
    expected = {"token": 2.0, "sequence": 2.0, "mask": 0.0, "sequence_mask": 0.0}
    for kind, weight in expected.items():
        weights = importance_weights(learner, SAMPLER, MASK, kind=kind, low=0.5, high=2.0)
        assert torch.equal(weights, weight * MASK)


def test_mismatch_by_hand():
    # |log r| = log 2, log 4, 0, log 4. k3 = r - 1 - log r: 1 - log 2, -0.75 + log 4, 0, 3 - log 4.
    result = mismatch(LEARNER, SAMPLER, MASK)
    expected = {
        "num_tokens": 4,
        "difference_sum": 5 * math.log(2),
        "difference_max": 2 * math.log(2),
        "kl_sum": 3.25 - math.log(2),
    }
    assert {name: value.item() for name, value in result.items()} == pytest.approx(expected, rel=1e-6)
    assert all(value.item() == 0 for value in mismatch(LEARNER, SAMPLER, torch.zeros_like(MASK)).values())


def test_mismatch_of_the_same_policy_is_zero_and_kl_is_that_of_sampler_against_learner():
    assert mismatch(SAMPLER, SAMPLER, MASK)["kl_sum"].item() == 0
    # All 20 tokens of a vocabulary, each as often as the sampler draws it: the k3 sum is the exact KL.
    generator = torch.Generator().manual_seed(0)
    sampler, learner = torch.randn(2, 1, 20, generator=generator).log_softmax(-1)
    exact = (sampler.exp() * (sampler - learner)).sum()
    kl = sum(
        probability * mismatch(learner[:, [i]], sampler[:, [i]], torch.ones(1, 1).bool())["kl_sum"].item()
        for i, probability in enumerate(sampler.exp()[0].tolist())
    )
    assert kl == pytest.approx(exact.item(), abs=1e-6)


def test_mismatch_joins_over_parts():
    whole = mismatch(LEARNER, SAMPLER, MASK)
    parts = [mismatch(LEARNER[[b]], SAMPLER[[b]], MASK[[b]]) for b in range(3)]
    for name, value in whole.items():
        join = max if name == "difference_max" else sum
        assert join(part[name].item() for part in parts) == pytest.approx(value.item())


def test_rejects_bad_input():
    settings = {"kind": "token", "low": 0.5, "high": 2.0}
    with pytest.raises(ValueError, match="known: none, token, sequence, mask, sequence_mask"):
        importance_weights(LEARNER, SAMPLER, MASK, **{**settings, "kind": "tis"})
    for bound in ({"low": 1.1}, {"low": -0.1}, {"high": 0.9}, {"high": math.inf}, {"high": NAN}):
        with pytest.raises(ValueError, match="need 0 <= low <= 1 <= high < inf"):
            importance_weights(LEARNER, SAMPLER, MASK, **{**settings, **bound})
    with pytest.raises(ValueError, match=r"rollout_logprobs \(3, 4\)"):
        importance_weights(LEARNER, SAMPLER[:, 1:], MASK, **settings)
    with pytest.raises(ValueError, match=r"rollout_logprobs \(3, 4\)"):
        mismatch(LEARNER, SAMPLER[:, 1:], MASK)
