import math

import pytest
import torch

from rayllm.algorithms.kl import ESTIMATORS, kl_estimate
from rayllm.algorithms.rewards import per_token_rewards


def test_kl_estimate_by_hand():
    # log r = ref - policy = log 2: k1 = -log 2, k2 = (log 2)^2 / 2, k3 = 2 - 1 - log 2.
    policy, ref = torch.tensor([-1.0]), torch.tensor([-1.0 + math.log(2)])
    expected = {"k1": -math.log(2), "k2": math.log(2) ** 2 / 2, "k3": 1 - math.log(2)}
    for estimator, value in expected.items():
        actual = kl_estimate(policy, ref, estimator=estimator)
        torch.testing.assert_close(actual, torch.tensor([value]))


def test_k1_and_k3_have_the_true_kl_as_expectation():
    generator = torch.Generator().manual_seed(0)
    policy, ref = torch.randn(2, 20, generator=generator).log_softmax(-1)
    exact = (policy.exp() * (policy - ref)).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close(
            (policy.exp() * kl_estimate(policy, ref, estimator=estimator)).sum(), exact
        )
    assert (kl_estimate(policy, ref, estimator="k3") >= 0).all()


def test_gradients_of_the_estimators_are_as_documented():
    generator = torch.Generator().manual_seed(0)
    logits, ref = torch.randn(2, 20, generator=generator)
    ref = ref.log_softmax(-1)

    def gradient(loss):
        x = logits.clone().requires_grad_()
        return torch.autograd.grad(loss(x.log_softmax(-1)), x)[0]

    def expected_loss(estimator):  # expectation over the sampled token, which has no gradient itself
        return lambda logp: (logp.exp().detach() * kl_estimate(logp, ref, estimator=estimator)).sum()

    policy_ref = gradient(lambda logp: (logp.exp() * (logp - ref)).sum())
    ref_policy = gradient(lambda logp: (ref.exp() * (ref - logp)).sum())
    torch.testing.assert_close(gradient(expected_loss("k1")), torch.zeros(20), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient(expected_loss("k2")), policy_ref, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient(expected_loss("k3")), ref_policy, atol=1e-6, rtol=1e-5)


def test_per_token_rewards_by_hand():
    # Row 0: actions 1, 2, 4 (3 is tool output). kl k1 = logprob - ref = 0.5, -1, 2; kl_coef 0.1.
    #        -0.05, +0.1, -0.2 + score 3 = 2.8.
    # Row 1: one action with kl 0: score alone. Row 2: no action: nothing.
    logprobs = torch.tensor([[7.0, -1.0, -2.0, 7.0, -1.0], [7.0, -1.0, 7.0, 7.0, 7.0], [7.0] * 5])
    ref = torch.tensor([[0.0, -1.5, -1.0, 0.0, -3.0], [0.0, -1.0, 0.0, 0.0, 0.0], [0.0] * 5])
    mask = torch.tensor([[0, 1, 1, 0, 1], [0, 1, 0, 0, 0], [0] * 5]).bool()
    result = per_token_rewards(torch.tensor([3.0, -5.0, 9.0]), logprobs, ref, mask, kl_coef=0.1)
    expected = torch.tensor([[0.0, -0.05, 0.1, 0.0, 2.8], [0.0, -5.0, 0.0, 0.0, 0.0], [0.0] * 5])
    torch.testing.assert_close(result, expected)
    # Clip at 2: scores 2 and -2; the KL term stays.
    clipped = per_token_rewards(torch.tensor([3.0, -5.0, 9.0]), logprobs, ref, mask, kl_coef=0.1, clip=2.0)
    expected[0, 4], expected[1, 1] = 1.8, -2.0
    torch.testing.assert_close(clipped, expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_per_token_rewards_matches_a_loop(estimator):
    generator = torch.Generator().manual_seed(0)
    logprobs, ref = -torch.rand(2, 5, 9, generator=generator)
    scores = torch.randn(5, generator=generator)
    mask = torch.rand(5, 9, generator=generator) < 0.5
    mask[3] = False
    result = per_token_rewards(scores, logprobs, ref, mask, kl_coef=0.3, estimator=estimator, clip=0.5)
    for b in range(5):
        columns = [t for t in range(9) if mask[b, t]]
        for t in range(9):
            x = (ref[b, t] - logprobs[b, t]).item()
            kl = {"k1": -x, "k2": x * x / 2, "k3": math.exp(x) - 1 - x}[estimator]
            expected = -0.3 * kl if t in columns else 0.0
            if columns and t == columns[-1]:
                expected += max(-0.5, min(0.5, scores[b].item()))
            assert result[b, t].item() == pytest.approx(expected, abs=1e-6)


def test_total_reward_does_not_depend_on_padding():
    mask = torch.tensor([[0, 1, 1]]).bool()
    inputs = torch.tensor([[0.0, -1.0, -2.0]]), torch.tensor([[0.0, -2.0, -2.5]])
    short = per_token_rewards(torch.tensor([1.0]), *inputs, mask, kl_coef=0.1)
    pad = torch.nn.functional.pad
    padded = [pad(x, (0, 4), value=float("nan")) for x in inputs]
    long = per_token_rewards(torch.tensor([1.0]), *padded, pad(mask, (0, 4)), kl_coef=0.1)
    assert torch.equal(long, pad(short, (0, 4)))


def test_rejects_bad_input():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3).bool()
    with pytest.raises(ValueError, match="'k4'; known: k1, k2, k3"):
        kl_estimate(x, x, estimator="k4")
    with pytest.raises(ValueError, match=r"logprobs \(2, 3\), ref_logprobs \(2, 2\)"):
        kl_estimate(x, x[:, 1:])
    with pytest.raises(ValueError, match=r"rewards \(3,\), logprobs \(2, 3\)"):
        per_token_rewards(torch.zeros(3), x, x, mask, kl_coef=0.1)
    with pytest.raises(ValueError, match="clip"):
        per_token_rewards(torch.zeros(2), x, x, mask, kl_coef=0.1, clip=0.0)
