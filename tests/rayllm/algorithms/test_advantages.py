import itertools
import math
import statistics

import pytest
import torch

from rayllm.algorithms.advantages import (
    ADVANTAGES,
    GROUP_KINDS,
    estimate,
    gae,
    group_advantages,
    has_signal,
    masked_moments,
    whiten,
)
from rayllm.algorithms.kinds import ADVANTAGE_KINDS

NAN = float("nan")


def gae_loop(rewards, values, mask, gamma, gae_lambda):
    """Textbook GAE over the list of action tokens of one row."""
    columns = [t for t in range(len(mask)) if mask[t]]
    advantages = [0.0] * len(mask)
    for i, t in enumerate(columns):
        total, factor = 0.0, 1.0
        for j in range(i, len(columns)):
            following = values[columns[j + 1]] if j + 1 < len(columns) else 0.0
            total += factor * (rewards[columns[j]] + gamma * following - values[columns[j]])
            factor *= gamma * gae_lambda
        advantages[t] = total
    return advantages


def test_gae_by_hand():
    # Actions at 1 and 3 (2 is tool output), gamma 1, lambda 0.5.
    # t=3: delta = 2 - 1 = 1,          A = 1,               R = 1 + 1 = 2
    # t=1: delta = 0 + 1 - 0.5 = 0.5,  A = 0.5 + 0.5*1 = 1, R = 1 + 0.5 = 1.5
    nan = float("nan")
    rewards = torch.tensor([[nan, 0.0, nan, 2.0, nan]])
    values = torch.tensor([[nan, 0.5, nan, 1.0, nan]])
    mask = torch.tensor([[0, 1, 0, 1, 0]]).bool()
    advantages, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.5)
    assert torch.equal(advantages, torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0]]))
    assert torch.equal(returns, torch.tensor([[0.0, 1.5, 0.0, 2.0, 0.0]]))


def test_gae_matches_a_loop_and_lambda_one_gives_the_discounted_sum():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 4, 12, generator=generator)
    mask = torch.rand(4, 12, generator=generator) < 0.6
    mask[2] = False
    for gamma, gae_lambda in [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (1.0, 0.0)]:
        advantages, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
        for b in range(4):
            expected = gae_loop(rewards[b].tolist(), values[b].tolist(), mask[b].tolist(), gamma, gae_lambda)
            assert advantages[b].tolist() == pytest.approx(expected, abs=1e-5)
        torch.testing.assert_close(returns, advantages + values * mask)
    _, returns = gae(rewards, values, mask, gamma=0.9, gae_lambda=1.0)
    kept = rewards[0][mask[0]].tolist()
    assert returns[0][mask[0]][0].item() == pytest.approx(
        sum(0.9**i * r for i, r in enumerate(kept)), abs=1e-5
    )


def test_gae_is_the_same_after_padding_and_reordering():
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, 3, 6, generator=generator)
    mask = torch.rand(3, 6, generator=generator) < 0.7
    short = gae(rewards, values, mask, gamma=0.9, gae_lambda=0.8)
    pad = torch.nn.functional.pad
    padded = (pad(rewards, (2, 3), value=1e9), pad(values, (2, 3), value=1e9), pad(mask, (2, 3)))
    long = gae(*padded, gamma=0.9, gae_lambda=0.8)
    order = torch.tensor([2, 0, 1])
    shuffled = gae(rewards[order], values[order], mask[order], gamma=0.9, gae_lambda=0.8)
    for a, b, c in zip(short, long, shuffled, strict=True):
        assert torch.equal(pad(a, (2, 3)), b)
        assert torch.equal(a[order], c)


def test_group_advantages_by_hand():
    # Prompt 7: rewards 1, 2, 6, mean 3, deviations -2, -1, 3, std = sqrt((4 + 1 + 9) / 2) = sqrt 7.
    # Leave-one-out baselines: (2+6)/2 = 4, (1+6)/2 = 3.5, (1+2)/2 = 1.5, so rloo gives -3, -1.5, 4.5.
    # Prompt 3: equal rewards, and prompt 5: alone; both 0.
    rewards = torch.tensor([1.0, 0.1, 2.0, 0.1, 6.0, 8.0, 0.1])
    prompts = torch.tensor([7, 3, 7, 3, 7, 5, 3])
    std = math.sqrt(7) + 1e-6
    expected = {
        "grpo": [-2 / std, 0, -1 / std, 0, 3 / std, 0, 0],
        "dr_grpo": [-2, 0, -1, 0, 3, 0, 0],
        "reinforce_baseline": [-2, 0, -1, 0, 3, 0, 0],
        "rloo": [-3, 0, -1.5, 0, 4.5, 0, 0],
    }
    assert set(expected) == set(GROUP_KINDS)
    for kind, values in expected.items():
        result = group_advantages(rewards, prompts, kind=kind)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, torch.tensor(values, dtype=torch.float32))
        assert (result[[1, 3, 5, 6]] == 0).all()


@pytest.mark.parametrize("kind", GROUP_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.scorecard("R49")
def test_groups_without_spread_are_exactly_zero(kind, dtype):
    generator = torch.Generator().manual_seed(0)
    levels = torch.randn(50, generator=generator, dtype=torch.float64).to(dtype)
    prompts = torch.randint(50, (2000,), generator=generator)
    assert (group_advantages(levels[prompts], prompts, kind=kind) == 0).all()


@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_group_advantages_match_a_loop_in_any_order(kind):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(40, generator=generator)
    prompts = torch.randint(-3, 9, (40,), generator=generator)
    result = group_advantages(rewards, prompts, kind=kind)
    for i in range(40):
        group = [rewards[j].item() for j in range(40) if prompts[j] == prompts[i]]
        r = rewards[i].item()
        if len(group) == 1:
            expected = 0.0
        elif kind == "rloo":
            expected = r - (sum(group) - r) / (len(group) - 1)
        else:
            expected = r - statistics.mean(group)
            expected /= statistics.stdev(group) + 1e-6 if kind == "grpo" else 1.0
        assert result[i].item() == pytest.approx(expected, abs=1e-5)
    order = torch.randperm(40, generator=generator)
    torch.testing.assert_close(group_advantages(rewards[order], prompts[order], kind=kind), result[order])
    assert group_advantages(rewards[:0], prompts[:0], kind=kind).shape == (0,)


def test_has_signal_by_hand():
    # Prompt 7: 0, 1, 0; prompt 3: equal; prompt 5: alone; prompt 9: two levels that bfloat16 would merge.
    rewards = torch.tensor([0.0, 0.1, 1.0, 0.1, 0.0, 8.0, 1.0, 1.001])
    prompts = torch.tensor([7, 3, 7, 3, 7, 5, 9, 9])
    assert has_signal(rewards, prompts).tolist() == [True, False, True, False, True, False, True, True]
    assert has_signal(rewards.bfloat16(), prompts)[-2:].tolist() == [False, False]
    assert has_signal(rewards[:0], prompts[:0]).shape == (0,)


def test_has_signal_where_and_only_where_a_group_has_an_advantage():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(2, (60,), generator=generator)
    prompts = torch.randint(20, (60,), generator=generator)
    expected = [len({rewards[j].item() for j in range(60) if prompts[j] == prompts[i]}) > 1 for i in range(60)]
    assert has_signal(rewards, prompts).tolist() == expected
    assert True in expected and False in expected
    for kind in GROUP_KINDS:
        assert (group_advantages(rewards, prompts, kind=kind)[~torch.tensor(expected)] == 0).all()


def test_whiten_by_hand():
    # 1, 3 inside the mask: mean 2, population variance 1, so -1 and 1; with the mean back: 1 and 3.
    values = torch.tensor([[float("nan"), 1.0, 3.0, 1e9]])
    mask = torch.tensor([[0, 1, 1, 0]]).bool()
    torch.testing.assert_close(whiten(values, mask), torch.tensor([[0.0, -1.0, 1.0, 0.0]]))
    kept = whiten(2 * values, mask, shift_mean=False)  # 2, 6: mean 4, deviations -1 and 1 after scaling
    torch.testing.assert_close(kept, torch.tensor([[0.0, 3.0, 5.0, 0.0]]))
    assert masked_moments(values, mask).tolist() == [2.0, 4.0, 10.0]
    assert torch.equal(whiten(values, torch.zeros_like(mask)), torch.zeros(1, 4))
    assert whiten(torch.full((1, 3), 0.1), torch.ones(1, 3).bool()).abs().max() < 1e-4


@pytest.mark.parametrize("shift_mean", [True, False])
def test_ranks_whiten_with_the_moments_of_the_global_batch(shift_mean):
    generator = torch.Generator().manual_seed(0)
    values = 1000 + torch.randn(6, 8, generator=generator)  # a large mean: float32 squares would lose it
    mask = torch.rand(6, 8, generator=generator) < 0.5
    whole = whiten(values, mask, shift_mean=shift_mean)
    parts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    moments = sum(masked_moments(values[p], mask[p]) for p in parts)
    split = torch.cat([whiten(values[p], mask[p], shift_mean=shift_mean, moments=moments) for p in parts])
    torch.testing.assert_close(split, whole)
    kept = whole[mask].double()
    assert kept.std(unbiased=False).item() == pytest.approx(1.0, abs=1e-4)
    assert kept.mean().item() == pytest.approx(0.0 if shift_mean else values[mask].mean().item(), abs=1e-3)


def test_registry_by_hand():
    # One prompt, gamma and lambda 0.5. Row 0: rewards 1 and 2 at actions 1 and 3, score 3. Row 1: 0 and 1 at actions
    # 1 and 2, score 1. Row 2 has no action and is in no group: mean 2, std sqrt 2.
    token_rewards = torch.tensor([[NAN, 1.0, NAN, 2.0], [NAN, 0.0, 1.0, NAN], [9.0, NAN, 9.0, 9.0]])
    mask = torch.tensor([[0, 1, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()
    values = torch.tensor([[NAN, 0.5, NAN, 1.0], [NAN, 0.0, 0.0, NAN], [NAN] * 4])
    z = 1 / (math.sqrt(2) + 1e-6)
    scores = (3, 3, 1, 1)
    expected = {  # the four actions in order: advantages, returns
        # Row 0, action 3: 2 - 1 = 1; action 1: delta = 1 + 0.5 - 0.5 = 1, plus 0.25 * 1. Row 1: 1, then 0 + 0.25 * 1.
        "gae": ((1.25, 1.0, 0.25, 1.0), (1.75, 2.0, 0.25, 1.0)),
        "reinforce_pp": ((2.0, 2.0, 0.5, 1.0), (2.0, 2.0, 0.5, 1.0)),  # 1 + 0.5 * 2, 2; 0 + 0.5 * 1, 1
        "grpo": ((z, z, -z, -z), scores),
        "dr_grpo": ((1, 1, -1, -1), scores),
        "reinforce_baseline": ((1, 1, -1, -1), scores),
        "rloo": ((2, 2, -2, -2), scores),  # 3 - 1, 1 - 3
        "remax": ((1, 1, -4, -4), scores),  # 3 - 2, 1 - 5
    }
    assert set(expected) == set(ADVANTAGES)
    for name, pair in expected.items():
        result = estimate(
            name,
            token_rewards,
            mask,
            values=values,
            prompt_ids=torch.full((3,), 5),
            baseline=torch.tensor([2.0, 5.0, NAN]),
            gamma=0.5,
            gae_lambda=0.5,
        )
        for tensor, numbers in zip(result, pair, strict=True):
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor[mask], torch.tensor(numbers, dtype=torch.float32))
            assert (tensor[~mask] == 0).all()


def registry_loop(name, token_rewards, mask, values, prompts, baseline, gamma, gae_lambda):
    """Advantages of one estimator as nested lists, from Python floats."""
    columns = [[t for t in range(len(row)) if row[t]] for row in mask]
    scores = [sum(r[t] for t in kept) for r, kept in zip(token_rewards, columns, strict=True)]
    out = [[0.0] * len(row) for row in mask]
    for b, kept in enumerate(columns):
        group = [scores[j] for j in range(len(mask)) if prompts[j] == prompts[b] and columns[j]]
        for i, t in enumerate(kept):
            if name == "gae":
                out[b][t] = gae_loop(token_rewards[b], values[b], mask[b], gamma, gae_lambda)[t]
            elif name == "reinforce_pp":
                out[b][t] = sum(gamma**k * token_rewards[b][u] for k, u in enumerate(kept[i:]))
            elif name == "remax":
                out[b][t] = scores[b] - baseline[b]
            elif len(group) == 1:
                out[b][t] = 0.0
            elif name == "rloo":
                out[b][t] = scores[b] - (sum(group) - scores[b]) / (len(group) - 1)
            else:
                out[b][t] = scores[b] - statistics.mean(group)
                out[b][t] /= statistics.stdev(group) + 1e-6 if name == "grpo" else 1.0
    return out


@pytest.mark.parametrize("name", ADVANTAGES)
def test_registry_matches_a_loop_whatever_the_padding_and_order(name):
    generator = torch.Generator().manual_seed(0)
    token_rewards, values = torch.randn(2, 12, 9, generator=generator)
    baseline = torch.randn(12, generator=generator)
    prompts = torch.randint(4, (12,), generator=generator)
    mask = torch.rand(12, 9, generator=generator) < 0.5
    mask[3] = False
    inputs = {"values": values, "prompt_ids": prompts, "baseline": baseline}
    factors = {"gamma": 0.9, "gae_lambda": 0.8}
    advantages, returns = estimate(name, token_rewards, mask, **inputs, **factors)
    lists = [x.tolist() for x in (token_rewards, mask, values, prompts, baseline)]
    torch.testing.assert_close(advantages, torch.tensor(registry_loop(name, *lists, *factors.values())))

    order = torch.randperm(12, generator=generator)
    moved = {key: tensor[order] for key, tensor in inputs.items()}
    moved["values"] = torch.nn.functional.pad(moved["values"], (0, 4), value=NAN)
    padded = torch.nn.functional.pad(token_rewards[order], (0, 4), value=NAN)
    again = estimate(name, padded, torch.nn.functional.pad(mask[order], (0, 4)), **moved, **factors)
    for ours, theirs in zip(again, (advantages, returns), strict=True):
        torch.testing.assert_close(ours, torch.nn.functional.pad(theirs[order], (0, 4)))


@pytest.mark.parametrize("name", [name for name, kind in ADVANTAGE_KINDS.items() if kind.needs_groups])
def test_equal_scores_from_turns_at_other_tokens_have_no_advantage(name):
    token_rewards = torch.tensor(list(itertools.permutations([0.1, 0.2, 0.3, 0.7])))
    assert len(token_rewards.sum(1).unique()) > 1  # in float32 the order matters
    mask, prompts = torch.ones(24, 4).bool(), torch.zeros(24)
    advantages, _ = estimate(name, token_rewards, mask, prompt_ids=prompts, gamma=1.0, gae_lambda=1.0)
    assert (advantages == 0).all()


def test_registry_says_what_an_estimator_needs():
    x, mask = torch.ones(2, 3), torch.ones(2, 3).bool()
    given = {"values": x, "prompt_ids": torch.tensor([0, 0]), "baseline": torch.ones(2)}
    factors = {"gamma": 1.0, "gae_lambda": 1.0}
    assert list(ADVANTAGE_KINDS) == list(ADVANTAGES)
    for estimator, kind in ADVANTAGE_KINDS.items():
        needs = (kind.needs_critic, kind.needs_groups, kind.needs_greedy_baseline)
        needed = {name: given[name] for name, flag in zip(given, needs, strict=True) if flag}
        assert estimate(estimator, x, mask, **needed, **factors)[0].shape == (2, 3)
        for name in needed:
            with pytest.raises(ValueError, match=f"{estimator} needs {name}"):
                estimate(estimator, x, mask, **{key: given[key] for key in given if key != name}, **factors)
            with pytest.raises(ValueError, match=rf"{name} \("):
                estimate(estimator, x, mask, **{**needed, name: given[name][1:]}, **factors)
        with pytest.raises(ValueError, match=r"token_rewards \(2, 3\), action_mask \(2, 2\)"):
            estimate(estimator, x, mask[:, 1:], **needed, **factors)
    whitened = [name for name, kind in ADVANTAGE_KINDS.items() if kind.whitens]
    assert whitened == ["gae", "reinforce_pp", "reinforce_baseline"]


def test_rejects_bad_input():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3).bool()
    with pytest.raises(ValueError, match=r"rewards \(2, 3\), values \(2, 2\), action_mask \(2, 3\)"):
        gae(x, x[:, 1:], mask, gamma=1.0, gae_lambda=1.0)
    with pytest.raises(ValueError, match="gae_lambda"):
        gae(x, x, mask, gamma=1.0, gae_lambda=1.5)
    with pytest.raises(ValueError, match="known: grpo, dr_grpo, rloo, reinforce_baseline"):
        group_advantages(x[0], torch.zeros(3), kind="ppo")
    with pytest.raises(ValueError, match=r"prompt_ids \(2,\)"):
        group_advantages(x[0], torch.zeros(2))
    with pytest.raises(ValueError, match=r"prompt_ids \(2,\)"):
        has_signal(x[0], torch.zeros(2))
    with pytest.raises(ValueError, match=r"values \(2, 3\), mask \(2, 2\)"):
        whiten(x, mask[:, 1:])
    with pytest.raises(ValueError, match="moments"):
        whiten(x, mask, moments=torch.zeros(2))
