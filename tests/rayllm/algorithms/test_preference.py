import math

import pytest
import torch

from rayllm.algorithms.preference import preference_loss

# h = (-1 + 2) - (-4 + 3) = 2 and h = (-3 + 2) - (-1 + 1) = -1.
BATCH = [torch.tensor(x) for x in ([-1.0, -3.0], [-4.0, -1.0], [-2.0, -2.0], [-3.0, -1.0])]


def neg_log_sigmoid(x):
    return math.log1p(math.exp(-x))


def test_losses_by_hand():
    # beta 0.5: beta h = 1, -0.5. ipo target 1 / (2 * 0.5) = 1: (2 - 1)^2 = 1, (-1 - 1)^2 = 4.
    # hinge: max(0, 1 - 1) = 0, 1 + 0.5 = 1.5.
    expected = {
        "dpo": (neg_log_sigmoid(1) + neg_log_sigmoid(-0.5)) / 2,
        "ipo": (1 + 4) / 2,
        "hinge": (0 + 1.5) / 2,
    }
    for kind, value in expected.items():
        loss, chosen, rejected = preference_loss(*BATCH, kind=kind, beta=0.5)
        assert loss.item() == pytest.approx(value)
        assert chosen.tolist() == [0.5, -0.5]  # 0.5 * (-1 + 2), 0.5 * (-3 + 2)
        assert rejected.tolist() == [-0.5, 0.0]  # 0.5 * (-4 + 3), 0.5 * (-1 + 1)


def test_label_smoothing_by_hand():
    loss = preference_loss(*BATCH, beta=0.5, label_smoothing=0.1)[0]
    first = 0.9 * neg_log_sigmoid(1) + 0.1 * neg_log_sigmoid(-1)
    second = 0.9 * neg_log_sigmoid(-0.5) + 0.1 * neg_log_sigmoid(0.5)
    assert loss.item() == pytest.approx((first + second) / 2)


def test_dpo_gradient_by_hand():
    # d loss / d policy_chosen = -beta sigmoid(-beta h) / N, and the opposite for rejected.
    chosen, rejected = BATCH[0].clone().requires_grad_(), BATCH[1].clone().requires_grad_()
    loss, chosen_rewards, rejected_rewards = preference_loss(chosen, rejected, *BATCH[2:], beta=0.5)
    loss.backward()
    expected = -0.5 * torch.sigmoid(torch.tensor([-1.0, 0.5])) / 2
    torch.testing.assert_close(chosen.grad, expected)
    torch.testing.assert_close(rejected.grad, -expected)
    assert not chosen_rewards.requires_grad and not rejected_rewards.requires_grad


@pytest.mark.parametrize("kind", ["dpo", "ipo", "hinge"])
def test_order_of_pairs_does_not_matter_and_bf16_is_computed_in_float32(kind):
    loss = preference_loss(*BATCH, kind=kind, beta=0.3)[0]
    torch.testing.assert_close(preference_loss(*(x.flip(0) for x in BATCH), kind=kind, beta=0.3)[0], loss)
    low = preference_loss(*(x.bfloat16() for x in BATCH), kind=kind, beta=0.3)  # integers: exact
    assert all(x.dtype == torch.float32 for x in low)
    assert torch.equal(low[0], loss)


def test_rejects_bad_input():
    with pytest.raises(ValueError, match="'kto'; known: dpo, ipo, hinge"):
        preference_loss(*BATCH, kind="kto", beta=0.1)
    with pytest.raises(ValueError, match=r"ref_rejected \(1,\)"):
        preference_loss(*BATCH[:3], BATCH[3][1:], beta=0.1)
    with pytest.raises(ValueError, match="beta"):
        preference_loss(*BATCH, beta=0.0)
    for kind, smoothing in [("dpo", 0.5), ("ipo", 0.1)]:
        with pytest.raises(ValueError, match="label_smoothing"):
            preference_loss(*BATCH, kind=kind, beta=0.1, label_smoothing=smoothing)
