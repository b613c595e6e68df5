"""What stands outside a mask reaches no value and no gradient, in any public function of the package.

Every function that takes a mask has a row in ``CASES``; one that takes none is in ``WITHOUT_MASK`` with the reason.
"""

import importlib
import inspect
import pkgutil
from functools import partial

import pytest
import torch
from torch.nn.functional import pad

from rayllm import algorithms
from rayllm.algorithms import advantages, checks, kl, logprobs, losses, metrics, off_policy, preference, rewards

B, T, V = 5, 7, 6
PROMPT_IDS = torch.tensor([4, 4, 9, 9, 9])
TOKEN_IDS = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))

INPUT_SHAPES = {"token": (B, T), "row": (B,), "logits": (B, T, V)}


def kept_inputs(mask):
    """For each kind of input, a mask of its shape that is True where the function may look."""
    predicts = pad(mask[:, 1:], (0, 1))  # logits[:, t] predict token t + 1
    return {"token": mask, "row": mask.any(1), "logits": predicts[..., None].expand(B, T, V)}


def labels(mask):
    return torch.where(mask, TOKEN_IDS, -100)


def advantage(name, token_rewards, values, baseline, mask):
    inputs = {"values": values, "prompt_ids": PROMPT_IDS, "baseline": baseline}
    return torch.stack(advantages.estimate(name, token_rewards, mask, **inputs, gamma=0.9, gae_lambda=0.8))


# "module.function" or "module.function[variant]" -> (kinds of the inputs, function of the inputs and the mask).
CASES = {
    "advantages.gae": (
        ["token", "token"],
        lambda x, y, m: torch.stack(advantages.gae(x, y, m, gamma=0.9, gae_lambda=0.8)),
    ),
    "advantages.masked_moments": (["token"], advantages.masked_moments),
    "advantages.whiten": (["token"], advantages.whiten),
    "advantages.whiten[scale]": (["token"], partial(advantages.whiten, shift_mean=False)),
    "advantages.whiten[moments]": (
        ["token"],
        partial(advantages.whiten, moments=torch.tensor([10.0, 5.0, 20.0])),
    ),
    "checks.masked": (["token"], checks.masked),
    "logprobs.token_logprobs": (
        ["logits"],
        lambda x, m: checks.masked(logprobs.token_logprobs(x, TOKEN_IDS), m),
    ),
    "logprobs.token_entropy": (["logits"], lambda x, m: checks.masked(logprobs.token_entropy(x), m)),
    "losses.language_model_loss": (["logits"], lambda x, m: losses.language_model_loss(x, labels(m))),
    "losses.value_loss": (["token"] * 3, losses.value_loss),
    "losses.value_loss[clip]": (["token"] * 3, partial(losses.value_loss, clip_range=0.2)),
    "metrics.approx_kl": (["token"] * 2, metrics.approx_kl),
    "metrics.clip_fraction": (["token"] * 2, partial(metrics.clip_fraction, clip_range=0.2)),
    "metrics.explained_variance": (["token"] * 2, metrics.explained_variance),
    "metrics.masked_mean": (["token"], metrics.masked_mean),
    "off_policy.mismatch": (["token"] * 2, lambda x, y, m: torch.stack([*off_policy.mismatch(x, y, m).values()])),
}
for averaged in (False, True):
    CASES[f"preference.response_logprobs[{averaged}]"] = (
        ["token"],
        partial(preference.response_logprobs, averaged=averaged),
    )
for name in advantages.ADVANTAGES:
    CASES[f"advantages.estimate[{name}]"] = (["token", "token", "row"], partial(advantage, name))
for kind in off_policy.WEIGHT_KINDS:
    CASES[f"off_policy.importance_weights[{kind}]"] = (
        ["token"] * 2,
        partial(off_policy.importance_weights, kind=kind, low=0.5, high=2.0),
    )
for estimator in kl.ESTIMATORS:
    CASES[f"kl.kl_estimate[{estimator}]"] = (
        ["token"] * 2,
        lambda x, y, m, e=estimator: kl.kl_estimate(x, y, estimator=e, mask=m),
    )
    for clip in (None, 2.0):
        CASES[f"rewards.per_token_rewards[{estimator}-{clip}]"] = (
            ["row", "token", "token"],
            partial(rewards.per_token_rewards, kl_coef=0.1, estimator=estimator, clip=clip),
        )
CASES["rewards.per_token_rewards[turns]"] = (
    ["row", "token", "token", "token"],
    lambda r, x, y, z, m: rewards.per_token_rewards(r, x, y, m, kl_coef=0.1, turn_rewards=z),
)
for aggregation in losses.AGGREGATIONS:
    settings = {"aggregation": aggregation, "normalizer": 7}
    CASES[f"losses.aggregate[{aggregation}]"] = (["token"], partial(losses.aggregate, **settings))
    for kind in losses.POLICY_KINDS:
        for dual_clip in (None, 1.5) if kind != "cispo" else (None,):
            loss = partial(losses.policy_loss, kind=kind, dual_clip=dual_clip, **settings)
            variant = f"{kind}-{aggregation}-{dual_clip}"
            CASES[f"losses.policy_loss[{variant}]"] = (["token"] * 3, loss)
            CASES[f"losses.policy_loss[{variant}-weights]"] = (
                ["token"] * 4,
                lambda x, y, z, w, m, loss=loss: loss(x, y, z, m, weights=w),
            )

SCORES = "one number a response, no token"
SHAPES = "reads shapes or names, no value"
WITHOUT_MASK = {
    "alarms.alarms": "one number a step",
    "advantages.group_advantages": SCORES,
    "advantages.has_signal": SCORES,
    "checks.require_dim": SHAPES,
    "checks.require_known": SHAPES,
    "checks.require_same_shape": SHAPES,
    "ensembles.combine_ensemble": SCORES,
    "kinds.AdvantageKind": "facts, no number",
    "kl.next_kl_coef": "one number a step",
    "preference.Kind": SHAPES,
    "preference.kto_loss": SCORES,
    "preference.preference_loss": SCORES,
    "preference.reference_point": SCORES,
    "ranking.kwise_loss": SCORES,
    "ranking.pairwise_loss": SCORES,
    "rewards.RunningMoments": SCORES,
    "rewards.clip_rewards": SCORES,
    "rewards.group_normalize": SCORES,
    "rewards.length_penalty": SCORES,
    "rewards.overlong_penalty": SCORES,
    "rewards.standardize": SCORES,
    **{
        f"verifiers.{name}": "text, no tensors"
        for name in (
            "choice", "exact", "final_answer", "has_length", "matches_format", "math", "regex", "response_code",
        )
    },
}  # fmt: skip


def evaluate(function, inputs, mask):
    """The value, and the gradient of a random weighting of it in every input."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves, mask)
    if not out.requires_grad:
        return out, [None] * len(leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    return out.detach(), torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)


def check(kinds, function, dtype, poison):
    """Assert that ``poison`` outside the mask changes no bit."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(B, T, generator=generator) < 0.5
    mask[:, 0], mask[2] = False, False
    kept = [kept_inputs(mask)[kind] for kind in kinds]
    inputs = [torch.randn(INPUT_SHAPES[kind], generator=generator).to(dtype) for kind in kinds]
    poisoned = [x.masked_fill(~keep, poison) for x, keep in zip(inputs, kept, strict=True)]
    value, gradients = evaluate(function, inputs, mask)
    dirty_value, dirty_gradients = evaluate(function, poisoned, mask)
    assert value.isfinite().all()
    assert torch.equal(value, dirty_value)
    if value.shape[-2:] == mask.shape:
        assert (dirty_value[..., ~mask] == 0).all()
    for gradient, dirty, keep in zip(gradients, dirty_gradients, kept, strict=True):
        if gradient is None:  # an input the function does not differentiate
            assert dirty is None
            continue
        assert gradient.isfinite().all()
        assert torch.equal(gradient, dirty)
        assert (dirty[~keep] == 0).all()


@pytest.mark.parametrize("poison", [1e9, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_poison_outside_the_mask_has_no_effect(name, dtype, poison):
    check(*CASES[name], dtype, poison)


def multiplied(x, mask):
    return (x * mask).sum()


def masked_too_late(x, mask):
    return torch.where(mask, x.square().exp(), 0.0).sum()


@pytest.mark.parametrize("wrong", [multiplied, masked_too_late])
def test_the_check_itself_finds_a_wrong_mask(wrong):
    with pytest.raises(AssertionError):
        check(["token"], wrong, torch.float32, float("nan"))


def public_names():
    """Every function and class that a module of the package defines and does not hide."""
    for module_info in pkgutil.iter_modules(algorithms.__path__):
        module = importlib.import_module(f"{algorithms.__name__}.{module_info.name}")
        for name, item in vars(module).items():
            defined = (inspect.isfunction(item) or inspect.isclass(item)) and item.__module__ == module.__name__
            if defined and not name.startswith("_"):
                yield f"{module_info.name}.{name}"


def test_every_public_function_is_poisoned_or_has_a_reason_not_to_be():
    tested = {name.split("[")[0] for name in CASES}
    assert sorted(tested | WITHOUT_MASK.keys()) == sorted(public_names())
    assert not tested & WITHOUT_MASK.keys()
    for name in WITHOUT_MASK:
        module, _, function = name.partition(".")
        item = getattr(importlib.import_module(f"{algorithms.__name__}.{module}"), function)
        assert not any("mask" in parameter for parameter in inspect.signature(item).parameters), name
