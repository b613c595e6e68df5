import math

import pytest
import torch

from rayllm.algorithms.metrics import approx_kl, clip_fraction, explained_variance, masked_mean

NAN = float("nan")
MASK = torch.tensor([[False, True, True, True, True]])
EMPTY = torch.zeros_like(MASK)


def test_masked_mean_by_hand():
    assert masked_mean(torch.tensor([[NAN, 1.0, 2.0, 3.0, 6.0]]), MASK).item() == 3.0
    assert masked_mean(torch.full((1, 5), NAN), EMPTY).item() == 0.0


def test_explained_variance_by_hand():
    # Returns 0, 2, 4, 6: variance (9 + 1 + 1 + 9) / 4 = 5. Errors R - V = 1, -1, 1, -1: variance 1. 1 - 1/5.
    returns = torch.tensor([[NAN, 0.0, 2.0, 4.0, 6.0]])
    values = torch.tensor([[NAN, -1.0, 3.0, 3.0, 7.0]])
    assert explained_variance(values, returns, MASK).item() == pytest.approx(0.8)
    assert explained_variance(returns, returns, MASK).item() == 1.0
    assert explained_variance(torch.full((1, 5), 9.0), returns, MASK).item() == 0.0
    assert explained_variance(values, returns, EMPTY).item() == 0.0
    for level in (0.1, 0.3, 0.7):  # a mean that rounds would leave a tiny variance
        values, constant = torch.arange(77.0).view(7, 11), torch.full((7, 11), level)
        assert explained_variance(values, constant, torch.ones(7, 11).bool()).item() == 0.0


def test_clip_fraction_by_hand():
    # Ratios 0.7, 0.9, 1.1, 1.3: two of four outside [0.8, 1.2], one outside [0.8, 1.4].
    new = torch.tensor([[NAN, 0.7, 0.9, 1.1, 1.3]]).log()
    old = torch.tensor([[NAN, 0.0, 0.0, 0.0, 0.0]])
    assert clip_fraction(new, old, MASK, 0.2).item() == 0.5
    assert clip_fraction(new, old, MASK, 0.2, 0.4).item() == 0.25
    assert clip_fraction(new, old, EMPTY, 0.2).item() == 0.0


def test_approx_kl_by_hand():
    # Ratios new / old of 2 and 1/2, then 1 and 1: (2 - 1 - log 2) + (1/2 - 1 + log 2) = 1/2, by 4 tokens.
    new = torch.tensor([[NAN, math.log(2), -math.log(2), 0.0, 0.0]])
    old = torch.tensor([[NAN, 0.0, 0.0, 0.0, 0.0]])
    assert approx_kl(new, old, MASK).item() == pytest.approx(0.125)
    assert approx_kl(new, old, EMPTY).item() == 0.0


def test_rejects_bad_input():
    x = torch.zeros(1, 5)
    for call in (
        lambda: masked_mean(x[:, 1:], MASK),
        lambda: explained_variance(x, x[:, 1:], MASK),
        lambda: clip_fraction(x, x[:, 1:], MASK, 0.2),
        lambda: approx_kl(x[:, 1:], x, MASK),
    ):
        with pytest.raises(ValueError, match=r"mask \(1, 5\)"):
            call()
