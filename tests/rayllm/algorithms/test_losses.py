import itertools
import math

import pytest
import torch

from rayllm.algorithms.losses import (
    AGGREGATIONS,
    POLICY_KINDS,
    aggregate,
    language_model_loss,
    policy_loss,
    value_loss,
)

ALL = list(itertools.product(POLICY_KINDS, AGGREGATIONS))


def random_batch(seed=0, rows=5, tokens=8):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, tokens, generator=generator)
    new = old + 0.4 * torch.randn(rows, tokens, generator=generator)
    advantages = torch.randn(rows, tokens, generator=generator)
    mask = torch.rand(rows, tokens, generator=generator) < 0.6
    mask[1] = False
    return new, old, advantages, mask


def policy_loop(new, old, advantages, mask, low, high, dual_clip, kind, aggregation, normalizer):
    row_sums, lengths = [], []
    for b in range(len(new)):
        columns = [t for t in range(new.shape[1]) if mask[b, t]]
        log_ratios = {t: (new[b, t] - old[b, t]).item() for t in columns}
        total = 0.0
        for t in columns:
            log_ratio = sum(log_ratios.values()) / len(columns) if kind == "gspo" else log_ratios[t]
            ratio, adv = math.exp(log_ratio), advantages[b, t].item()
            clipped = min(max(ratio, 1 - low), 1 + high)
            if kind == "cispo":
                total -= clipped * adv * new[b, t].item()
                continue
            loss = -min(ratio * adv, clipped * adv)
            total += min(loss, -dual_clip * adv) if dual_clip and adv < 0 else loss
        row_sums.append(total)
        lengths.append(len(columns))
    if aggregation == "sequence_mean":
        means = [s / n for s, n in zip(row_sums, lengths, strict=True) if n]
        return sum(means) / (normalizer or len(means))
    return sum(row_sums) / (normalizer or sum(lengths))


def one_token(log_ratio, advantage, **kwargs):
    """Loss and its gradient for one action token with old logprob -1."""
    new = torch.tensor([[0.0, -1.0 + log_ratio]], requires_grad=True)
    old, advantages = torch.tensor([[0.0, -1.0]]), torch.tensor([[0.0, advantage]])
    loss = policy_loss(new, old, advantages, torch.tensor([[False, True]]), **kwargs)
    return loss.item(), torch.autograd.grad(loss, new)[0][0, 1].item()


def test_ppo_by_hand():
    # Within the range: loss -r A, gradient d(-r A) / d log pi = -r A.
    assert one_token(math.log(1.1), 2.0) == pytest.approx((-2.2, -2.2))
    # r = 1.5 > 1.2 and A > 0: clipped, -1.2 * 2, no gradient. With clip-higher 0.6 not clipped.
    assert one_token(math.log(1.5), 2.0) == pytest.approx((-2.4, 0.0))
    assert one_token(math.log(1.5), 2.0, clip_range_high=0.6) == pytest.approx((-3.0, -3.0))
    # r = 0.5 < 0.8 and A < 0: clipped, 0.8 * 2, no gradient. With A > 0 the smaller -0.5 * 2 stays.
    assert one_token(math.log(0.5), -2.0) == pytest.approx((1.6, 0.0))
    assert one_token(math.log(0.5), 2.0) == pytest.approx((-1.0, -1.0))
    # r = 4 and A < 0: loss 8 with gradient; dual clip at 3 bounds it to 3 * 2 without.
    assert one_token(math.log(4), -2.0) == pytest.approx((8.0, 8.0))
    assert one_token(math.log(4), -2.0, dual_clip=3.0) == pytest.approx((6.0, 0.0))
    assert one_token(math.log(4), 2.0, dual_clip=3.0) == pytest.approx((-2.4, 0.0))
    # A ratio that float32 cannot hold stays finite.
    loss, grad = one_token(300.0, -2.0, dual_clip=3.0)
    assert (loss, grad) == pytest.approx((6.0, 0.0))


def test_cispo_by_hand():
    # -clip(r) A log pi with log pi = -1 + log r: r = 1.5 is clipped to 1.2 but keeps the gradient -1.2 * 2.
    loss, grad = one_token(math.log(1.5), 2.0, kind="cispo")
    assert loss == pytest.approx(-1.2 * 2 * (-1 + math.log(1.5)))
    assert grad == pytest.approx(-2.4)
    # clip_range 1 takes the lower bound away: r = 0.1.
    assert one_token(math.log(0.1), 2.0, kind="cispo", clip_range=1.0)[1] == pytest.approx(-0.2)


def test_gspo_by_hand_and_as_the_paper_writes_it():
    # log ratios 0.3 and -0.1 in one row: s = exp(0.1) for both tokens; A = 2: loss = -2 exp(0.1).
    # The gradient of s is s / 2 for each of the two tokens.
    new = torch.tensor([[0.0, -0.7, -1.1]], requires_grad=True)
    old, advantages = torch.tensor([[0.0, -1.0, -1.0]]), torch.full((1, 3), 2.0)
    mask = torch.tensor([[False, True, True]])
    loss = policy_loss(new, old, advantages, mask, kind="gspo", aggregation="sequence_mean")
    assert loss.item() == pytest.approx(-2 * math.exp(0.1))
    (grad,) = torch.autograd.grad(loss, new)
    torch.testing.assert_close(grad, -torch.tensor([[0.0, 1.0, 1.0]]) * math.exp(0.1))

    new, old, advantages, mask = random_batch()
    advantages = advantages[:, :1].expand_as(new)  # GSPO proper: one advantage a row
    new = new.requires_grad_()
    ours = policy_loss(new, old, advantages, mask, kind="gspo", aggregation="sequence_mean")
    rows = mask.any(1)
    s = (((new - old) * mask).sum(1) / mask.sum(1).clamp(min=1)).exp()
    paper = -torch.minimum(s * advantages[:, 0], s.clamp(0.8, 1.2) * advantages[:, 0])[rows].mean()
    torch.testing.assert_close(ours, paper)
    torch.testing.assert_close(*(torch.autograd.grad(x, new)[0] for x in (ours, paper)))


@pytest.mark.parametrize(
    "kind, aggregation, normalizer",
    [(*pair, n) for pair in ALL for n in (None, 13.0) if n or pair[1] != "constant"],
)
def test_policy_loss_matches_a_loop(kind, aggregation, normalizer):
    for seed, dual_clip in [(0, None), (1, None if kind == "cispo" else 1.1)]:
        batch = random_batch(seed)
        ours = policy_loss(
            *batch,
            clip_range=0.1,
            clip_range_high=0.3,
            dual_clip=dual_clip,
            kind=kind,
            aggregation=aggregation,
            normalizer=normalizer,
        )
        expected = policy_loop(*batch, 0.1, 0.3, dual_clip, kind, aggregation, normalizer)
        assert ours.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind, aggregation", ALL)
def test_policy_loss_is_the_same_after_padding_reordering_and_splitting(kind, aggregation):
    new, old, advantages, mask = random_batch()
    count = mask.any(1).sum() if aggregation == "sequence_mean" else mask.sum()

    def run(leaf, view, **kwargs):
        batch = [view(x) for x in (leaf, old, advantages, mask)]
        return policy_loss(*batch, kind=kind, aggregation=aggregation, **kwargs)

    def with_gradient(compute):
        leaf = new.clone().requires_grad_()
        loss = compute(leaf)
        return loss, torch.autograd.grad(loss, leaf)[0]

    whole = with_gradient(lambda x: run(x, lambda t: t, normalizer=count))
    pad = torch.nn.functional.pad
    order = torch.tensor([3, 0, 4, 2, 1])
    parts = [slice(0, 2), slice(2, 3), slice(3, 5)]
    others = [
        with_gradient(lambda x: run(x, lambda t: pad(t, (0, 3)), normalizer=count)),
        with_gradient(lambda x: run(x, lambda t: t[order], normalizer=count)),
        with_gradient(lambda x: sum(run(x, lambda t, p=p: t[p], normalizer=count) for p in parts)),
    ]
    if aggregation != "constant":
        others.append(with_gradient(lambda x: run(x, lambda t: t)))  # the default normalizer is the count
    for loss, grad in others:
        torch.testing.assert_close(loss, whole[0])
        torch.testing.assert_close(grad, whole[1])


def test_weights_multiply_each_tokens_loss_and_gradient_by_hand():
    # r = 1.1 and A = 2 lie inside the range, r = 1.5 is clipped to 1.2: losses -2.2 and -2.4, gradients -2.2 and 0,
    # times weights 0.5 and 3; the mean is still over two tokens.
    new = torch.tensor([[0.0, -1 + math.log(1.1), -1 + math.log(1.5)]], requires_grad=True)
    old, advantages = torch.tensor([[0.0, -1.0, -1.0]]), torch.full((1, 3), 2.0)
    mask, weights = torch.tensor([[False, True, True]]), torch.tensor([[float("nan"), 0.5, 3.0]])
    loss = policy_loss(new, old, advantages, mask, weights=weights)
    assert loss.item() == pytest.approx((0.5 * -2.2 + 3 * -2.4) / 2)
    (grad,) = torch.autograd.grad(loss, new)
    torch.testing.assert_close(grad, torch.tensor([[0.0, 0.5 * -2.2 / 2, 0.0]]))


@pytest.mark.parametrize("kind, aggregation", ALL)
def test_weights_of_one_change_nothing_and_others_match_a_loop(kind, aggregation):
    new, old, advantages, mask = random_batch()
    settings = {"kind": kind, "aggregation": aggregation, "normalizer": 7, "clip_range": 0.1}
    plain = policy_loss(new, old, advantages, mask, **settings)
    assert torch.equal(policy_loss(new, old, advantages, mask, weights=torch.ones(5, 8), **settings), plain)
    weights = torch.rand(5, 8, generator=torch.Generator().manual_seed(1))
    expected = 0.0
    for b, t in mask.nonzero().tolist():
        # The ratio of gspo needs the whole row, so the token is picked by its advantage: no advantage, no loss.
        alone = torch.zeros(5, 8)
        alone[b, t] = advantages[b, t]
        expected += weights[b, t].item() * policy_loss(new, old, alone, mask, **settings).item()
    loss = policy_loss(new, old, advantages, mask, weights=weights, **settings)
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_aggregate_by_hand():
    # Rows: (1, 2, 3) with mask 1 1 0 and (4, 5, 6) with mask 0 0 1. Tokens: (1 + 2 + 6) / 3 = 3.
    # Sequences: (1.5 + 6) / 2 = 3.75. Constant 6: 9 / 6 = 1.5.
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 1]]).bool()
    assert aggregate(values, mask).item() == 3.0
    assert aggregate(values, mask, aggregation="sequence_mean").item() == 3.75
    assert aggregate(values, mask, aggregation="constant", normalizer=6).item() == 1.5


def test_value_loss_by_hand():
    # v = 2, old 1, R = 3: 0.5 * (2 - 3)^2 = 0.5. Clipped at 0.2 to 1.2: 0.5 * 1.8^2 = 1.62, larger, flat.
    # v = 5, old 1, R = 3: 0.5 * 4 = 2; clipped again 1.62: the larger is 2. Mean of both rows: 1.81.
    new = torch.tensor([[2.0], [5.0]], requires_grad=True)
    old, returns, mask = torch.ones(2, 1), torch.full((2, 1), 3.0), torch.ones(2, 1).bool()
    assert value_loss(new, old, returns, mask).item() == pytest.approx((0.5 + 2) / 2)
    loss = value_loss(new, old, returns, mask, clip_range=0.2)
    assert loss.item() == pytest.approx((1.62 + 2) / 2)
    (grad,) = torch.autograd.grad(loss, new)
    torch.testing.assert_close(grad, torch.tensor([[0.0], [1.0]]))  # (5 - 3) / 2


@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_value_loss_matches_a_loop_and_splits(clip_range):
    new, old, returns, mask = random_batch()
    total = 0.0
    for b, t in mask.nonzero().tolist():
        v, o, r = (x[b, t].item() for x in (new, old, returns))
        error = (v - r) ** 2
        if clip_range is not None:
            error = max(error, (min(max(v, o - clip_range), o + clip_range) - r) ** 2)
        total += 0.5 * error
    count = mask.sum()
    batch = (new, old, returns, mask)
    whole = value_loss(*batch, clip_range=clip_range)
    assert whole.item() == pytest.approx(total / count.item(), abs=1e-5)
    parts = (slice(0, 2), slice(2, 5))
    split = sum(value_loss(*(x[p] for x in batch), clip_range=clip_range, normalizer=count) for p in parts)
    torch.testing.assert_close(split, whole)


@pytest.mark.scorecard("R49")
def test_empty_mask_gives_zero_and_zero_gradient():
    new, old, advantages, mask = random_batch()
    empty = torch.zeros_like(mask)
    for kind, aggregation in ALL:
        leaf = new.clone().requires_grad_()
        normalizer = 4 if aggregation == "constant" else None
        loss = policy_loss(
            leaf, old, advantages, empty, kind=kind, aggregation=aggregation, normalizer=normalizer
        )
        loss.backward()
        assert loss.item() == 0 and (leaf.grad == 0).all()
    leaf = new.clone().requires_grad_()
    value_loss(leaf, old, advantages, empty, clip_range=0.2).backward()
    assert (leaf.grad == 0).all()


def test_language_model_loss_by_hand():
    # logits[0] = (0, log 3) predicts label 1: -log 3/4. logits[1] predicts the ignored label. logits[2] is
    # uniform: log 2. Mean over two: (0.2877 + 0.6931) / 2. The label in column 0 is never predicted.
    logits = torch.tensor([[[0.0, math.log(3)], [5.0, 0.0], [0.0, 0.0], [7.0, 1.0]]])
    labels = torch.tensor([[0, 1, -100, 0]])
    expected = -math.log(0.75) + math.log(2)
    assert language_model_loss(logits, labels).item() == pytest.approx(expected / 2)
    assert language_model_loss(logits, labels, normalizer=8).item() == pytest.approx(expected / 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_language_model_loss_matches_cross_entropy(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 9, 13, generator=generator).to(dtype)
    labels = torch.randint(13, (4, 9), generator=generator)
    labels[torch.rand(4, 9, generator=generator) < 0.4] = -1
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = language_model_loss(ours, labels, ignore_index=-1)
    flat = theirs[:, :-1].float().flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=-1)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    count = (labels[:, 1:] != -1).sum()
    parts = (slice(0, 1), slice(1, 4))
    split = sum(language_model_loss(logits[p], labels[p], ignore_index=-1, normalizer=count) for p in parts)
    torch.testing.assert_close(split, loss.detach())


def test_language_model_loss_without_labels_is_zero():
    logits = torch.full((2, 3, 5), float("nan"), requires_grad=True)
    loss = language_model_loss(logits, torch.full((2, 3), -100))
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_rejects_bad_input():
    new, old, advantages, mask = random_batch()
    batch = (new, old, advantages, mask)
    with pytest.raises(ValueError, match=r"advantages \(5, 7\), action_mask \(5, 8\)"):
        policy_loss(new, old, advantages[:, 1:], mask)
    with pytest.raises(ValueError, match="'trpo'; known: ppo, gspo, cispo"):
        policy_loss(*batch, kind="trpo")
    with pytest.raises(ValueError, match="known: token_mean, sequence_mean, constant"):
        policy_loss(*batch, aggregation="mean")
    with pytest.raises(ValueError, match="needs normalizer"):
        policy_loss(*batch, aggregation="constant")
    with pytest.raises(ValueError, match="normalizer must be > 0"):
        policy_loss(*batch, normalizer=0)
    with pytest.raises(ValueError, match=r"weights \(5, 7\), action_mask \(5, 8\)"):
        policy_loss(*batch, weights=new[:, 1:])
    with pytest.raises(ValueError, match="dual_clip"):
        policy_loss(*batch, dual_clip=0.5)
    with pytest.raises(ValueError, match="clip_range"):
        policy_loss(*batch, clip_range=-0.1)
    with pytest.raises(ValueError, match=r"returns \(5, 7\)"):
        value_loss(new, old, advantages[:, 1:], mask)
    with pytest.raises(ValueError, match="clip_range"):
        value_loss(*batch, clip_range=0.0)
    with pytest.raises(ValueError, match=r"logits \(1, 3, 5\)"):
        language_model_loss(torch.zeros(1, 3, 5), torch.zeros(1, 4, dtype=torch.long))
