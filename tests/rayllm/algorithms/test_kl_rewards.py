import math
import statistics
from dataclasses import astuple

import pytest
import torch

from rayllm.algorithms.advantages import group_advantages
from rayllm.algorithms.kl import ESTIMATORS, kl_estimate, next_kl_coef
from rayllm.algorithms.rewards import (
    RunningMoments,
    group_normalize,
    length_penalty,
    overlong_penalty,
    per_token_rewards,
    standardize,
)


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


def test_next_kl_coef_by_hand():
    settings = {"target": 6.0, "num_samples": 500, "horizon": 10_000}
    # Errors of 0, 6.6 / 6 - 1 = 0.1, and two beyond 0.2; each times 500 / 10000 = 0.05.
    assert next_kl_coef(0.2, 6.0, **settings) == 0.2
    assert next_kl_coef(0.2, 6.6, **settings) == pytest.approx(0.2 * 1.005)
    assert next_kl_coef(0.2, 60.0, **settings) == pytest.approx(0.2 * 1.01)
    assert next_kl_coef(0.2, -1.0, **settings) == pytest.approx(0.2 * 0.99)
    # Five horizons at the bound: a factor of e.
    coef = 1.0
    for _ in range(50_000):
        coef = next_kl_coef(coef, 100.0, target=6.0, num_samples=1, horizon=10_000)
    assert coef == pytest.approx(math.e, rel=1e-4)


def test_kl_controller_reaches_its_target():
    # A policy whose KL falls as the coefficient rises: kl = 1 / coef, so that target 4 needs 0.25.
    coef = 1.0
    for _ in range(200):
        coef = next_kl_coef(coef, 1 / coef, target=4.0, num_samples=64, horizon=256)
    assert coef == pytest.approx(0.25, rel=1e-3)


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


def test_turn_rewards_stand_where_they_were_earned():
    # Turns end at 2 and 4 (3 is the environment's); kl 0.5 at action 1. The reward in column 3 is outside the mask.
    logprobs, ref = torch.zeros(1, 5), torch.tensor([[0.0, -0.5, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[0, 1, 1, 0, 1]]).bool()
    turns = torch.tensor([[float("nan"), 0.0, 7.0, 9.0, -2.0]])
    settings = {"kl_coef": 0.1, "clip": 3.0}
    result = per_token_rewards(torch.tensor([5.0]), logprobs, ref, mask, turn_rewards=turns, **settings)
    torch.testing.assert_close(result, torch.tensor([[0.0, -0.05, 7.0, 0.0, 1.0]]))  # 3 after the clip, -2
    without = per_token_rewards(torch.tensor([5.0]), logprobs, ref, mask, **settings)
    none = per_token_rewards(torch.tensor([5.0]), logprobs, ref, mask, turn_rewards=torch.zeros(1, 5), **settings)
    assert torch.equal(none, without)


def test_overlong_penalty_by_hand():
    # Limit 20, buffer 5: nothing up to 15, then a fifth a token, 1 at 20 and beyond.
    lengths = torch.tensor([0, 15, 16, 19, 20, 31])
    result = overlong_penalty(lengths, max_length=20, buffer=5)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, torch.tensor([0.0, 0.0, -0.2, -0.8, -1.0, -1.0]))


@pytest.mark.parametrize("max_length, buffer", [(20, 5), (7, 7), (9, 1)])
def test_overlong_penalty_matches_the_paper(max_length, buffer):
    def paper(length):
        if length <= max_length - buffer:
            return 0.0
        return ((max_length - buffer) - length) / buffer if length <= max_length else -1.0

    result = overlong_penalty(torch.arange(30), max_length=max_length, buffer=buffer)
    assert result.tolist() == pytest.approx([paper(length) for length in range(30)])


def test_length_penalty_by_hand():
    result = length_penalty(torch.tensor([0, 3, 10]), per_token=0.5)
    assert torch.equal(result, torch.tensor([0.0, -1.5, -5.0])) and result.dtype == torch.float32


def test_group_normalize_by_hand():
    # Prompt 7: 1 and 3, mean 2, std sqrt 2. Prompt 3: without spread.
    rewards, prompts = torch.tensor([1.0, 0.1, 3.0, 0.1]), torch.tensor([7, 3, 7, 3])
    result = group_normalize(rewards, prompts)
    torch.testing.assert_close(result, torch.tensor([-1.0, 0.0, 1.0, 0.0]) / math.sqrt(2))
    assert torch.equal(result, group_advantages(rewards, prompts, kind="grpo"))


def test_standardize_by_hand():
    result = standardize(torch.tensor([1, 3, 7]), mean=3.0, std=2.0)
    assert torch.equal(result, torch.tensor([-1.0, 0.0, 2.0])) and result.dtype == torch.float32


def test_running_moments_by_hand():
    # 1, 3: mean 2, m2 = 2. With 8: mean 4, m2 = 9 + 1 + 16 = 26, variance 26 / 3.
    moments = RunningMoments().update(torch.tensor([1.0, 3.0]))
    assert astuple(moments) == (2.0, 2.0, 2.0) and moments.std == 1.0
    moments = moments.update(torch.tensor([8.0]))
    assert astuple(moments) == pytest.approx((3.0, 4.0, 26.0))
    assert moments.std == pytest.approx(math.sqrt(26 / 3))
    assert moments.update(torch.zeros(0)) == moments
    assert RunningMoments().merge(RunningMoments()) == RunningMoments()


def test_running_moments_match_a_loop_in_batches_over_ranks_and_after_a_restart():
    rewards = 1000 + torch.randn(50, generator=torch.Generator().manual_seed(0))
    numbers = rewards.tolist()
    expected = (50, statistics.fmean(numbers), statistics.pvariance(numbers) * 50)
    batches = rewards.split([1, 20, 4, 25])
    running = RunningMoments()
    for batch in batches:
        running = RunningMoments(*astuple(running)).update(batch)
    assert astuple(running) == pytest.approx(expected)
    assert running.std == pytest.approx(statistics.pstdev(numbers))
    ranks = RunningMoments()
    for batch in reversed(batches):
        ranks = ranks.merge(RunningMoments().update(batch))
    assert astuple(ranks) == pytest.approx(expected)


@pytest.mark.scorecard("R49")
def test_rewards_without_spread_are_not_blown_up():
    moments = RunningMoments()
    for size in (3, 7, 1000):
        moments = moments.update(torch.full((size,), 0.1))
    assert moments.m2 == 0 and moments.std == 1.0
    assert standardize(torch.tensor([0.1, 1.1]), mean=moments.mean, std=moments.std).tolist() == pytest.approx([0, 1])


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
    with pytest.raises(ValueError, match=r"turn_rewards \(2, 2\)"):
        per_token_rewards(torch.zeros(2), x, x, mask, kl_coef=0.1, turn_rewards=x[:, 1:])
    settings = {"target": 6.0, "num_samples": 64, "horizon": 1000}
    for change in ({"target": 0.0}, {"horizon": 12.8}):
        with pytest.raises(ValueError, match="horizon > 0.2"):
            next_kl_coef(0.1, 1.0, **{**settings, **change})
    with pytest.raises(ValueError, match="coef > 0"):
        next_kl_coef(0.0, 1.0, **settings)
    for kl in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            next_kl_coef(0.1, kl, **settings)
    for buffer in (0, 21):
        with pytest.raises(ValueError, match="buffer"):
            overlong_penalty(x[0], max_length=20, buffer=buffer)
    with pytest.raises(ValueError, match="per_token"):
        length_penalty(x[0], per_token=-0.1)
    with pytest.raises(ValueError, match=r"prompt_ids \(2,\)"):
        group_normalize(x[0], torch.zeros(2))
    for std in (0.0, math.nan):
        with pytest.raises(ValueError, match="std"):
            standardize(x[0], mean=0.0, std=std)
