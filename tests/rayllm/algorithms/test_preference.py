import math

import pytest
import torch

from rayllm.algorithms.preference import KINDS, PAIRED, kto_loss, preference_loss, reference_point, response_logprobs

# h = (-1 + 2) - (-4 + 3) = 2 and h = (-3 + 2) - (-1 + 1) = -1.
BATCH = [torch.tensor(x) for x in ([-1.0, -3.0], [-4.0, -1.0], [-2.0, -2.0], [-3.0, -1.0])]


def neg_log_sigmoid(x):
    return math.log1p(math.exp(-x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_losses_by_hand():
    # beta 0.5: beta h = 1, -0.5. ipo target 1 / (2 * 0.5) = 1: (2 - 1)^2 = 1, (-1 - 1)^2 = 4.
    # hinge: max(0, 1 - 1) = 0, 1 + 0.5 = 1.5.
    expected = {
        "dpo": (neg_log_sigmoid(1) + neg_log_sigmoid(-0.5)) / 2,
        "robust": (neg_log_sigmoid(1) + neg_log_sigmoid(-0.5)) / 2,
        "ipo": (1 + 4) / 2,
        "hinge": (0 + 1.5) / 2,
    }
    for kind, value in expected.items():
        loss, chosen, rejected = preference_loss(*BATCH, kind=kind, beta=0.5)
        assert loss.item() == pytest.approx(value)
        assert chosen.tolist() == [0.5, -0.5]  # 0.5 * (-1 + 2), 0.5 * (-3 + 2)
        assert rejected.tolist() == [-0.5, 0.0]  # 0.5 * (-4 + 3), 0.5 * (-1 + 1)


def test_simpo_by_hand_needs_no_reference():
    # beta 2, margin 1: 2 * (-1 + 4) - 1 = 5 and 2 * (-3 + 1) - 1 = -5.
    loss, chosen, rejected = preference_loss(*BATCH[:2], None, None, kind="simpo", beta=2.0, target_margin=1.0)
    assert loss.item() == pytest.approx((neg_log_sigmoid(5) + neg_log_sigmoid(-5)) / 2)
    assert chosen.tolist() == [-2.0, -6.0] and rejected.tolist() == [-8.0, -2.0]
    assert torch.equal(preference_loss(*BATCH, kind="simpo", beta=2.0, target_margin=1.0)[0], loss)


def test_orpo_by_hand():
    # p = 0.8 against 0.5: odds 4 and 1, so the odds ratio is 4 and sigmoid(log 4) = 4 / 5.
    chosen, rejected = torch.tensor([math.log(0.8)]), torch.tensor([math.log(0.5)])
    loss, chosen_rewards, _ = preference_loss(chosen, rejected, None, None, kind="orpo", beta=0.1)
    assert loss.item() == pytest.approx(-0.1 * math.log(0.8))
    assert chosen_rewards.item() == pytest.approx(0.1 * math.log(0.8))


def test_orpo_of_a_certain_response_is_finite():
    certain = torch.zeros(1, requires_grad=True)
    loss, *_ = preference_loss(certain, torch.full((1,), -200.0), None, None, kind="orpo", beta=0.1)
    loss.backward()
    assert loss.isfinite() and certain.grad.isfinite().all()


@pytest.mark.parametrize("sign", [1, -1])
def test_label_smoothing_by_hand(sign):
    # conservative DPO adds the other label's part; robust DPO takes it off and divides by 1 - 2 e.
    kind, divisor = ("dpo", 1.0) if sign == 1 else ("robust", 0.8)
    loss = preference_loss(*BATCH, kind=kind, beta=0.5, label_smoothing=0.1)[0]
    first = 0.9 * neg_log_sigmoid(1) + sign * 0.1 * neg_log_sigmoid(-1)
    second = 0.9 * neg_log_sigmoid(-0.5) + sign * 0.1 * neg_log_sigmoid(0.5)
    assert loss.item() == pytest.approx((first + second) / 2 / divisor)


def test_robust_dpo_on_flipped_labels_is_dpo_on_true_ones():
    # Labels flipped with probability e: the mean of the loss over the flips is the loss of the true label.
    e, (pc, pr, rc, rr) = 0.3, (x[:1] for x in BATCH)
    settings = {"kind": "robust", "beta": 0.5, "label_smoothing": e}
    kept, flipped = preference_loss(pc, pr, rc, rr, **settings)[0], preference_loss(pr, pc, rr, rc, **settings)[0]
    torch.testing.assert_close((1 - e) * kept + e * flipped, preference_loss(pc, pr, rc, rr, beta=0.5)[0])


def test_ipo_is_at_rest_where_the_margin_is_half_of_one_by_beta():
    chosen = torch.tensor([5.0], requires_grad=True)  # 1 / (2 * 0.1)
    loss, *_ = preference_loss(chosen, torch.zeros(1), torch.zeros(1), torch.zeros(1), kind="ipo", beta=0.1)
    loss.backward()
    assert loss.item() == 0 and chosen.grad.item() == 0


def test_kto_by_hand():
    # Log-ratios 2, -1 and 0.5; reference point 0.5; beta 0.5; the last is undesirable and weighs 3.
    policy, ref = torch.tensor([-1.0, -3.0, -2.0]), torch.tensor([-3.0, -2.0, -2.5])
    desirable = torch.tensor([True, True, False])
    loss, rewards = kto_loss(policy, ref, desirable, 0.5, beta=0.5, undesirable_weight=3.0)
    losses = [1 - sigmoid(0.75), 1 - sigmoid(-0.75), 3 * (1 - sigmoid(0.0))]
    assert loss.item() == pytest.approx(sum(losses) / 3)
    assert rewards.tolist() == [1.0, -0.5, 0.25]
    desired, _ = kto_loss(policy, ref, desirable, 0.5, beta=0.5, desirable_weight=2.0)
    assert desired.item() == pytest.approx((2 * losses[0] + 2 * losses[1] + 0.5) / 3)


def test_kto_gradient_by_hand():
    # d/dr of 1 - sigmoid(beta (r - z)) is -beta s (1 - s); of the undesirable +beta s (1 - s).
    policy = torch.tensor([1.0, 1.0], requires_grad=True)
    loss, _ = kto_loss(policy, torch.zeros(2), torch.tensor([True, False]), 0.0, beta=0.5)
    loss.backward()
    slope = 0.5 * sigmoid(0.5) * sigmoid(-0.5) / 2
    torch.testing.assert_close(policy.grad, torch.tensor([-slope, slope]))


def test_the_reference_point_is_a_mean_at_least_zero_and_carries_no_gradient():
    policy = torch.tensor([-1.0, -4.0], requires_grad=True)
    assert reference_point(policy, torch.tensor([-2.0, -6.0])).item() == 1.5  # (1 + 2) / 2
    assert reference_point(policy, torch.tensor([-2.0, -2.0])).item() == 0.0  # (1 - 2) / 2 is below 0
    assert not reference_point(policy, torch.tensor([-2.0, -6.0])).requires_grad
    kto = kto_loss(policy, torch.zeros(2), torch.tensor([True, False]), policy.sum() * 0 + 1.0, beta=0.1)[0]
    fixed = kto_loss(policy, torch.zeros(2), torch.tensor([True, False]), 1.0, beta=0.1)[0]
    assert torch.equal(torch.autograd.grad(kto, policy)[0], torch.autograd.grad(fixed, policy)[0])


def test_dpo_gradient_by_hand():
    # d loss / d policy_chosen = -beta sigmoid(-beta h) / N, and the opposite for rejected.
    chosen, rejected = BATCH[0].clone().requires_grad_(), BATCH[1].clone().requires_grad_()
    loss, chosen_rewards, rejected_rewards = preference_loss(chosen, rejected, *BATCH[2:], beta=0.5)
    loss.backward()
    expected = -0.5 * torch.sigmoid(torch.tensor([-1.0, 0.5])) / 2
    torch.testing.assert_close(chosen.grad, expected)
    torch.testing.assert_close(rejected.grad, -expected)
    assert not chosen_rewards.requires_grad and not rejected_rewards.requires_grad


@pytest.mark.parametrize("kind", PAIRED)
def test_order_of_pairs_does_not_matter_and_bf16_is_computed_in_float32(kind):
    loss = preference_loss(*BATCH, kind=kind, beta=0.3)[0]
    torch.testing.assert_close(preference_loss(*(x.flip(0) for x in BATCH), kind=kind, beta=0.3)[0], loss)
    low = preference_loss(*(x.bfloat16() for x in BATCH), kind=kind, beta=0.3)  # integers: exact
    assert all(x.dtype == torch.float32 for x in low)
    assert torch.equal(low[0], loss)


@pytest.mark.parametrize("kind", PAIRED)
def test_parts_with_weights_sum_to_the_whole_batch(kind):
    whole = preference_loss(*BATCH, kind=kind, beta=0.3)[0]
    weight = torch.tensor([0.5])
    parts = [preference_loss(*(x[i : i + 1] for x in BATCH), kind=kind, beta=0.3, weights=weight)[0] for i in (0, 1)]
    torch.testing.assert_close(sum(parts), whole)
    empty = [x[:0] for x in BATCH]
    assert preference_loss(*empty, kind=kind, beta=0.3, weights=weight[:0])[0].item() == 0


@pytest.mark.parametrize("kind", PAIRED)
def test_extreme_log_ratios_stay_finite_and_more_margin_is_never_worse(kind):
    values = []
    for gap in (-1e4, -10.0, 0.0, 1.0, 4.0):
        chosen = torch.tensor([gap - 20.0], requires_grad=True)
        zero = torch.zeros(1)
        loss, *_ = preference_loss(chosen, zero - 20.0, zero, zero, kind=kind, beta=0.1)
        loss.backward()
        assert loss.isfinite() and chosen.grad.isfinite().all() and chosen.grad.item() <= 0
        values.append(loss.item())
    assert values == sorted(values, reverse=True)


def test_response_logprobs_by_hand():
    logprobs = torch.tensor([[0.0, -1.0, -2.0, -4.0], [0.0, -3.0, -5.0, float("nan")], [0.0, -1.0, -1.0, -1.0]])
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()
    assert response_logprobs(logprobs, mask).tolist() == [-6.0, -8.0, 0.0]
    assert response_logprobs(logprobs, mask, averaged=True).tolist() == [-3.0, -4.0, 0.0]


def test_rejects_bad_input():
    with pytest.raises(ValueError, match="'kto'; known: dpo, robust, ipo, hinge, orpo, simpo"):
        preference_loss(*BATCH, kind="kto", beta=0.1)
    with pytest.raises(ValueError, match=r"ref_rejected \(1,\)"):
        preference_loss(*BATCH[:3], BATCH[3][1:], beta=0.1)
    with pytest.raises(ValueError, match="hinge needs ref_chosen"):
        preference_loss(*BATCH[:2], None, None, kind="hinge", beta=0.1)
    with pytest.raises(ValueError, match="beta"):
        preference_loss(*BATCH, beta=0.0)
    for kind, smoothing in [("dpo", 0.5), ("robust", 0.5), ("ipo", 0.1)]:
        with pytest.raises(ValueError, match="label_smoothing"):
            preference_loss(*BATCH, kind=kind, beta=0.1, label_smoothing=smoothing)
    with pytest.raises(ValueError, match="target_margin"):
        preference_loss(*BATCH, beta=0.1, target_margin=1.0)
    with pytest.raises(ValueError, match=r"desirable \(1,\)"):
        kto_loss(*BATCH[:2], torch.tensor([True]), 0.0, beta=0.1)
    assert set(KINDS) == {*PAIRED, "kto"}
