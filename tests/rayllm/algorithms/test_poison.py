"""What stands outside a mask reaches no value and no gradient, in any function that takes one."""

import pytest
import torch

from rayllm.algorithms import advantages, kl, losses, metrics, rewards

CASES = {
    "gae": (2, lambda x, y, m: torch.cat(advantages.gae(x, y, m, gamma=0.9, gae_lambda=0.8))),
    "whiten": (1, advantages.whiten),
    "whiten_scale_only": (1, lambda x, m: advantages.whiten(x, m, shift_mean=False)),
    "masked_moments": (1, advantages.masked_moments),
    "value_loss": (3, losses.value_loss),
    "value_loss_clipped": (3, lambda *a: losses.value_loss(*a, clip_range=0.2)),
    "masked_mean": (1, metrics.masked_mean),
    "explained_variance": (2, metrics.explained_variance),
    "clip_fraction": (2, lambda x, y, m: metrics.clip_fraction(x, y, m, 0.2) + 0 * x[m].sum()),
    "approx_kl": (2, metrics.approx_kl),
}
for estimator in kl.ESTIMATORS:
    CASES[f"kl_{estimator}"] = (2, lambda x, y, m, e=estimator: kl.kl_estimate(x, y, estimator=e, mask=m))
    CASES[f"rewards_{estimator}"] = (
        2,
        lambda x, y, m, e=estimator: rewards.per_token_rewards(
            torch.arange(5.0), x, y, m, kl_coef=0.1, estimator=e, clip=2.0
        ),
    )
for aggregation in losses.AGGREGATIONS:
    CASES[f"aggregate_{aggregation}"] = (
        1,
        lambda x, m, a=aggregation: losses.aggregate(x, m, aggregation=a, normalizer=7),
    )
    for kind in losses.POLICY_KINDS:
        for dual_clip in (None, 1.5) if kind != "cispo" else (None,):
            CASES[f"policy_{kind}_{aggregation}_{dual_clip}"] = (
                3,
                lambda x, y, z, m, k=kind, a=aggregation, d=dual_clip: losses.policy_loss(
                    x, y, z, m, kind=k, aggregation=a, dual_clip=d, normalizer=7
                ),
            )


def evaluate(function, inputs, mask):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves, mask)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    return out.detach(), torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)


@pytest.mark.parametrize("poison", [1e9, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_poison_outside_the_mask_has_no_effect(name, dtype, poison):
    num_inputs, function = CASES[name]
    generator = torch.Generator().manual_seed(0)
    inputs = list(torch.randn(num_inputs, 5, 7, generator=generator).to(dtype))
    mask = torch.rand(5, 7, generator=generator) < 0.5
    mask[:, 0], mask[2] = False, False
    poisoned = [x.masked_fill(~mask, poison) for x in inputs]
    value, gradients = evaluate(function, inputs, mask)
    dirty_value, dirty_gradients = evaluate(function, poisoned, mask)
    assert value.isfinite().all()
    assert torch.equal(value, dirty_value)
    if value.shape == mask.shape:
        assert (dirty_value[~mask] == 0).all()
    for gradient, dirty in zip(gradients, dirty_gradients, strict=True):
        if gradient is None:  # an input the function does not differentiate
            assert dirty is None
            continue
        assert gradient.isfinite().all()
        assert torch.equal(gradient, dirty)
        assert (dirty[~mask] == 0).all()


@pytest.mark.parametrize("poison", [1e9, float("nan"), float("inf")])
def test_score_of_a_row_without_actions_is_unused(poison):
    mask = torch.tensor([[False, True], [False, False]])
    scores = torch.tensor([1.0, poison], requires_grad=True)
    x = torch.zeros(2, 2)
    for clip in (None, 5.0):
        result = rewards.per_token_rewards(scores, x, x, mask, kl_coef=0.1, clip=clip)
        assert result.tolist() == [[0.0, 1.0], [0.0, 0.0]]
        assert torch.autograd.grad(result.sum(), scores)[0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("poison", [1e9, float("nan"), float("inf")])
def test_logits_of_ignored_labels_have_no_effect(poison):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 5, generator=generator)
    labels = torch.tensor([[-100, -100, 1, 3, -100, -100], [-100, 2, 0, -100, 4, -100]])
    used = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))  # logits[:, t] predicts label t + 1
    poisoned = torch.where(used[..., None], logits, poison)
    results = []
    for x in (logits, poisoned):
        x = x.clone().requires_grad_()
        loss = losses.language_model_loss(x, labels)
        results.append((loss, torch.autograd.grad(loss, x)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert (results[1][1][~used] == 0).all()
