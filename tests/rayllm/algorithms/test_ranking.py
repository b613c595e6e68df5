import itertools
import math

import pytest
import torch

from rayllm.algorithms import ranking
from rayllm.algorithms.ranking import KWISE_KINDS, kwise_loss, pairwise_loss


def softplus(x):
    return math.log1p(math.exp(x))


def order_log_chance(rewards):
    """Plackett 1975: draw the best, then the best of the rest, and so on."""
    return sum(r - math.log(sum(math.exp(s) for s in rewards[i:])) for i, r in enumerate(rewards))


def kwise_loop(rewards, ranks, prompts, kind):
    per_prompt = []
    for prompt in sorted(set(prompts)):
        items = [(r, k) for r, k, p in zip(rewards, ranks, prompts, strict=True) if p == prompt]
        if kind == "all_pairs":
            terms = [softplus(b[0] - a[0]) for a, b in itertools.permutations(items, 2) if a[1] < b[1]]
            if terms:
                per_prompt.append(sum(terms) / len(terms))
        else:
            orders = [order for order in itertools.permutations(items) if [k for _, k in order] == sorted(k for _, k in items)]
            per_prompt.append(-math.log(sum(math.exp(order_log_chance([r for r, _ in order])) for order in orders)))
    return sum(per_prompt) / max(len(per_prompt), 1)


def test_pairwise_loss_by_hand():
    # Differences log 3 and 0: -log 3/4 and log 2. With margin log 3: 0 and -log 3: log 2 and log 4.
    chosen = torch.tensor([math.log(3), 1.0], requires_grad=True)
    rejected = torch.tensor([0.0, 1.0])
    loss = pairwise_loss(chosen, rejected)
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    # d/dx -log sigmoid(x) = -sigmoid(-x): -1/4 and -1/2, halved by the mean.
    (grad,) = torch.autograd.grad(loss, chosen)
    torch.testing.assert_close(grad, torch.tensor([-1 / 8, -1 / 4]))
    expected = pytest.approx((math.log(2) + math.log(4)) / 2)
    assert pairwise_loss(chosen, rejected, margin=math.log(3)).item() == expected
    assert pairwise_loss(chosen, rejected, margin=torch.full((2,), math.log(3))).item() == expected
    assert pairwise_loss(chosen[:0], rejected[:0]).item() == 0


def test_all_pairs_by_hand():
    # Prompt 0: scores 2, 1, 1 with ranks 0, 1, 1: pairs (2, 1) twice, the tie makes none: softplus(-1).
    # Prompt 1: scores 0, 3 with ranks 1, 0: softplus(-3). Prompt 2: tie only, left out of the mean.
    rewards = torch.tensor([2.0, 0.0, 1.0, 3.0, 1.0, 5.0, 6.0])
    ranks = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    prompts = torch.tensor([0, 1, 0, 1, 0, 2, 2])
    expected = (softplus(-1) + softplus(-3)) / 2
    assert kwise_loss(rewards, ranks, prompts, kind="all_pairs").item() == pytest.approx(expected)


def test_plackett_luce_by_hand():
    # Weights e^r = 3, 2, 1 in rank order: P = 3/6 * 2/3 * 1/1 = 1/3.
    rewards = torch.tensor([1.0, 3.0, 2.0]).log()
    same = torch.zeros(3, dtype=torch.long)
    order = kwise_loss(rewards, torch.tensor([2, 0, 1]), same, kind="plackett_luce")
    assert order.item() == pytest.approx(math.log(3))
    # The first two tied (weights 3 and 2), in either order: 3/6 * 2/3 + 2/6 * 3/4 = 7/12.
    tied = kwise_loss(rewards, torch.tensor([1, 0, 0]), same, kind="plackett_luce")
    assert tied.item() == pytest.approx(math.log(12 / 7))
    # The last two tied (weights 1 and 3): only the first draw counts, 2/6.
    tied = kwise_loss(rewards, torch.tensor([1, 1, 0]), same, kind="plackett_luce")
    assert tied.item() == pytest.approx(math.log(3))
    # A second prompt with a single response has likelihood 1 and halves the mean.
    with_single = kwise_loss(
        torch.cat([rewards, torch.ones(1)]),
        torch.tensor([2, 0, 1, 0]),
        torch.tensor([0, 0, 0, 1]),
        kind="plackett_luce",
    )
    assert with_single.item() == pytest.approx(math.log(3) / 2)


def test_plackett_luce_probabilities_of_all_orders_add_up_to_one():
    rewards = torch.tensor([0.3, -1.2, 2.0, 0.7])
    prompts = torch.zeros(4, dtype=torch.long)
    total = 0.0
    for order in itertools.permutations(range(4)):
        total += math.exp(-kwise_loss(rewards, torch.tensor(order), prompts, kind="plackett_luce").item())
    assert total == pytest.approx(1.0)


@pytest.mark.parametrize("ranks", [ranks for ranks in itertools.product(range(3), repeat=3)])
def test_plackett_luce_of_three_is_the_sum_over_the_orders_that_the_ranks_allow(ranks):
    rewards = [0.4, -1.3, 2.1]
    chance = 0.0
    for order in itertools.permutations(range(3)):
        if all(ranks[a] <= ranks[b] for a, b in itertools.pairwise(order)):
            chance += math.exp(order_log_chance([rewards[i] for i in order]))
    found = kwise_loss(torch.tensor(rewards), torch.tensor(ranks), torch.zeros(3).long(), kind="plackett_luce")
    assert found.item() == pytest.approx(-math.log(chance), abs=1e-6)


@pytest.mark.scorecard("R48")
def test_a_tie_of_all_teaches_nothing():
    rewards = torch.tensor([5.0, -5.0, 1.0], requires_grad=True)
    zeros = torch.zeros(3, dtype=torch.long)
    loss = kwise_loss(rewards, zeros, zeros, kind="plackett_luce")
    assert loss.item() == 0 and (torch.autograd.grad(loss, rewards)[0] == 0).all()


def test_a_tie_too_large_to_sum_over_is_exact_for_equal_rewards_and_near_otherwise(monkeypatch):
    ranks, zeros = torch.tensor([0, 0, 0, 0, 1]), torch.zeros(5, dtype=torch.long)

    def both(rewards):
        exact = kwise_loss(rewards, ranks, zeros, kind="plackett_luce").item()
        with monkeypatch.context() as patch:
            patch.setattr(ranking, "MAX_EXACT_TIE", 3)
            return exact, kwise_loss(rewards, ranks, zeros, kind="plackett_luce").item()

    # Four equal ones before the last: 4/5 * 3/4 * 2/3 * 1/2 = 1/5.
    assert both(torch.zeros(5)) == (pytest.approx(math.log(5)), pytest.approx(math.log(5)))
    exact, efron = both(torch.tensor([0.1, -0.1, 0.05, 0.2, -0.2]))
    assert efron == pytest.approx(exact, rel=0.02) and efron != exact


def test_label_smoothing_by_hand():
    # Difference log 3: 0.9 * log 4/3 + 0.1 * log 4. With margin log 3: 0.9 * log 2 + 0.1 * log 10.
    chosen, rejected = torch.tensor([math.log(3)]), torch.zeros(1)
    smooth = pairwise_loss(chosen, rejected, label_smoothing=0.1).item()
    assert smooth == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4))
    smooth = pairwise_loss(chosen, rejected, label_smoothing=0.1, margin=math.log(3)).item()
    assert smooth == pytest.approx(0.9 * math.log(2) + 0.1 * math.log(10))
    # Its best difference is log 0.9 / 0.1, not infinity.
    best = torch.tensor([math.log(9)], requires_grad=True)
    pairwise_loss(best, rejected, label_smoothing=0.1).backward()
    assert best.grad.item() == pytest.approx(0, abs=1e-7)


def test_margins_of_all_pairs_are_differences_of_scores():
    # Pairs (0, 1), (0, 2), (1, 2) with margins 1, 3, 2; the second prompt's scores contradict its ranks: margin 0.
    rewards = torch.tensor([2.0, 1.0, 0.0, 1.0, 0.0])
    ranks, prompts = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0, 0, 0, 1, 1])
    scores = torch.tensor([3.0, 2.0, 0.0, 1.0, 4.0])
    expected = ((softplus(1 - 1) + softplus(3 - 2) + softplus(2 - 1)) / 3 + softplus(-1)) / 2
    assert kwise_loss(rewards, ranks, prompts, scores=scores).item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", KWISE_KINDS)
def test_a_weight_multiplies_its_prompts_loss(kind):
    rewards, ranks = torch.tensor([2.0, 1.0, 0.0, 3.0, 1.0]), torch.tensor([0, 0, 1, 1, 0])
    prompts, weights = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0.5, 0.5, 0.5, 3.0, 3.0])
    alone = [kwise_loss(rewards[part], ranks[part], prompts[part], kind=kind) for part in (slice(3), slice(3, 5))]
    found = kwise_loss(rewards, ranks, prompts, kind=kind, weights=weights)
    torch.testing.assert_close(found, (0.5 * alone[0] + 3 * alone[1]) / 2)


@pytest.mark.parametrize("kind", KWISE_KINDS)
def test_kwise_loss_matches_a_loop_in_any_order(kind):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(30, generator=generator)
    ranks = torch.randint(4, (30,), generator=generator)
    prompts = torch.randint(8, (30,), generator=generator)
    expected = kwise_loop(rewards.tolist(), ranks.tolist(), prompts.tolist(), kind)
    leaf = rewards.clone().requires_grad_()
    loss = kwise_loss(leaf, ranks, prompts, kind=kind)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    order = torch.randperm(30, generator=generator)
    shuffled = kwise_loss(leaf[order], ranks[order], prompts[order], kind=kind)
    torch.testing.assert_close(shuffled, loss)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaf)[0] for x in (shuffled, loss)))


@pytest.mark.parametrize("kind", KWISE_KINDS)
@pytest.mark.scorecard("R48")
def test_two_responses_are_a_pair_and_one_is_nothing(kind):
    rewards = torch.tensor([0.3, 1.1], requires_grad=True)
    pair = kwise_loss(rewards, torch.tensor([1, 0]), torch.tensor([4, 4]), kind=kind)
    torch.testing.assert_close(pair, pairwise_loss(rewards[1:], rewards[:1]))
    alone = kwise_loss(rewards, torch.tensor([1, 0]), torch.tensor([4, 5]), kind=kind)
    assert alone.item() == 0
    assert (torch.autograd.grad(alone, rewards)[0] == 0).all()


def test_rejects_bad_input():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=r"chosen_rewards \(3,\), rejected_rewards \(2,\)"):
        pairwise_loss(x, x[1:])
    with pytest.raises(ValueError, match=r"margin \(2,\)"):
        pairwise_loss(x, x, margin=x[1:])
    with pytest.raises(ValueError, match="known: all_pairs, plackett_luce"):
        kwise_loss(x, x, x, kind="pairs")
    with pytest.raises(ValueError, match=r"ranks \(2,\)"):
        kwise_loss(x, x[1:], x)
    with pytest.raises(ValueError, match=r"weights \(2,\)"):
        kwise_loss(x, x, x, weights=x[1:])
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0.5\), got 0.5"):
        pairwise_loss(x, x, label_smoothing=0.5)
    for setting in ({"label_smoothing": 0.1}, {"scores": x}):
        with pytest.raises(ValueError, match="'plackett_luce' has neither"):
            kwise_loss(x, x, x, kind="plackett_luce", **setting)
