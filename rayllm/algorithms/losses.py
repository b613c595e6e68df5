"""Losses of the policy, the critic and the language model.

Shapes: B rows, T tokens, V vocabulary; per-token tensors are (B, T) aligned to the sequences.

Outside a mask inputs have no effect, and a batch with nothing in its mask gives 0 with zero gradient. Every
loss is a sum divided by ``normalizer``. Pass the count of the *global* batch, and the losses of micro-batches
and ranks add up to the loss of the whole batch, however it is split and padded.

The policy loss, per action token, with ratio r = exp(new_logprobs - logprobs), advantage A,
low = 1 - clip_range and high = 1 + clip_range_high (which defaults to clip_range):

ppo     -min(r A, clip(r, low, high) A)
        Source: https://arxiv.org/abs/1707.06347 eq. 7.
        clip_range_high > clip_range is DAPO's clip-higher: https://arxiv.org/abs/2503.14476 eq. 10.
        With dual_clip = c the loss is at most -c A where A < 0: https://arxiv.org/abs/1912.09729.
gspo    as ppo, with r replaced by s = exp(mean of log r over the row's action tokens). The gradient flows as
        in GSPO-token, stop(s) * pi / stop(pi): the same as GSPO when A is equal along a row, and defined when
        it is not. The paper clips at 3e-4 and 4e-4 and aggregates by sequence_mean.
        Source: https://arxiv.org/abs/2507.18071 eq. 5-7, 13-14.
cispo   -stop(clip(r, low, high)) A new_logprobs: no token loses its gradient. The paper has no lower bound,
        which is clip_range=1.
        Source: https://arxiv.org/abs/2506.13585 eq. 4-5.

log r is clamped to +-20, so that r stays finite; beyond that the ratio has no gradient.
"""

from __future__ import annotations

import torch

from rayllm.algorithms.checks import masked, require_dim, require_known, require_same_shape
from rayllm.algorithms.kinds import POLICY_KINDS
from rayllm.algorithms.logprobs import token_logprobs

AGGREGATIONS = ("token_mean", "sequence_mean", "constant")


def policy_loss(
    new_logprobs: torch.Tensor,
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    action_mask: torch.Tensor,
    *,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    kind: str = "ppo",
    aggregation: str = "token_mean",
    normalizer: float | torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Clipped policy-gradient loss; formulas and sources in the module docstring.

    Args:
        new_logprobs, logprobs: (B, T) nats under the weights being trained; before this update.
        advantages: (B, T).
        action_mask: (B, T) bool.
        clip_range: how far below 1 the ratio counts, in [0, 1].
        clip_range_high: how far above 1, >= 0; default ``clip_range``.
        dual_clip: bound c > 1 on the loss of tokens with a negative advantage; not for cispo.
        kind: "ppo", "gspo" or "cispo".
        aggregation, normalizer: see ``aggregate``.
        weights: (B, T) factor on the loss of each token, after clipping (``importance_weights``); a token of
            weight 0 still counts in the default normalizer.

    Returns:
        float32 scalar.

    Raises:
        ValueError: on shapes that differ, an unknown name or a number out of range.
    """
    require_known("kind", kind, POLICY_KINDS)
    tensors = {"new_logprobs": new_logprobs, "logprobs": logprobs, "advantages": advantages}
    require_same_shape(**tensors, action_mask=action_mask)
    high = clip_range if clip_range_high is None else clip_range_high
    if not 0 <= clip_range <= 1 or not high >= 0:
        raise ValueError(f"need 0 <= clip_range <= 1, clip_range_high >= 0: {clip_range=} {clip_range_high=}")
    if dual_clip is not None and (kind == "cispo" or not dual_clip > 1):
        raise ValueError(f"dual_clip must be > 1 and is not for cispo, got {dual_clip=} {kind=}")
    new, old, adv = (masked(tensor, action_mask) for tensor in tensors.values())
    ratio = _ratio(new, old, action_mask.bool(), per_sequence=kind == "gspo")
    clipped = ratio.clamp(1 - clip_range, 1 + high)
    if kind == "cispo":
        objective = clipped.detach() * adv * new
    else:
        objective = torch.minimum(ratio * adv, clipped * adv)
    if dual_clip is not None:
        objective = torch.where(adv < 0, torch.maximum(objective, dual_clip * adv), objective)
    if weights is not None:
        require_same_shape(weights=weights, action_mask=action_mask)
        objective = objective * masked(weights, action_mask)
    return aggregate(-objective, action_mask, aggregation=aggregation, normalizer=normalizer)


def _ratio(new: torch.Tensor, old: torch.Tensor, mask: torch.Tensor, *, per_sequence: bool) -> torch.Tensor:
    """(B, T) importance ratio of each token, or that of its row (same value in all columns)."""
    log_ratio = new - old
    if per_sequence:
        mean = log_ratio.detach().sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = mean + (new - new.detach())  # the bracket is 0: value of the mean, gradient of the token
    return log_ratio.clamp(-20.0, 20.0).exp()


def aggregate(
    per_token: torch.Tensor,
    action_mask: torch.Tensor,
    *,
    aggregation: str = "token_mean",
    normalizer: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """One number from a per-token loss; use it for KL and entropy terms that join the policy loss.

        token_mean      sum over tokens / normalizer; default: number of tokens in the mask
        sequence_mean   sum over rows of the row's mean / normalizer; default: number of rows with a token
        constant        sum over tokens / normalizer, which must be given (Dr. GRPO: rows * maximum length)

    Args:
        per_token: (B, T).
        action_mask: (B, T) bool.
        aggregation: one of ``AGGREGATIONS``.
        normalizer: > 0, the count of the global batch.

    Returns:
        float32 scalar, 0 for an empty mask.

    Raises:
        ValueError: on shapes that differ, an unknown aggregation, or a missing or non-positive normalizer.
    """
    require_known("aggregation", aggregation, AGGREGATIONS)
    require_dim(2, per_token=per_token)
    require_same_shape(per_token=per_token, action_mask=action_mask)
    if aggregation == "constant" and normalizer is None:
        raise ValueError("aggregation 'constant' needs normalizer")
    values = masked(per_token, action_mask)
    if aggregation == "sequence_mean":
        lengths = action_mask.bool().sum(1)
        return _divide((values.sum(1) / lengths.clamp(min=1)).sum(), (lengths > 0).sum(), normalizer)
    return _divide(values.sum(), action_mask.bool().sum(), normalizer)


def _divide(
    total: torch.Tensor, count: torch.Tensor, normalizer: float | torch.Tensor | None
) -> torch.Tensor:
    """``total / normalizer``, or ``total / count`` without one."""
    if normalizer is None:
        return total / count.clamp(min=1)
    # A tensor is not checked: that would wait for the device.
    if not isinstance(normalizer, torch.Tensor) and not normalizer > 0:
        raise ValueError(f"normalizer must be > 0, got {normalizer}")
    return total / normalizer


def value_loss(
    new_values: torch.Tensor,
    values: torch.Tensor,
    returns: torch.Tensor,
    action_mask: torch.Tensor,
    *,
    clip_range: float | None = None,
    normalizer: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """``0.5 * max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2)`` over action tokens.

    Args:
        new_values: (B, T) critic estimates under the weights being trained.
        values: (B, T) estimates before this update; used only with ``clip_range``.
        returns: (B, T) regression targets.
        action_mask: (B, T) bool.
        clip_range: c > 0 in units of value; None: plain squared error.
        normalizer: divides the sum; default: number of action tokens.

    Returns:
        float32 scalar, 0 for an empty mask.

    Raises:
        ValueError: on shapes that differ or a number out of range.

    Source: OpenAI baselines ppo2; Engstrom et al. 2020, https://arxiv.org/abs/2005.12729.
    """
    require_same_shape(new_values=new_values, values=values, returns=returns, action_mask=action_mask)
    if clip_range is not None and not clip_range > 0:
        raise ValueError(f"clip_range must be > 0 or None, got {clip_range}")
    new, old, target = (masked(tensor, action_mask) for tensor in (new_values, values, returns))
    error = (new - target).square()
    if clip_range is not None:
        clipped = old + (new - old).clamp(-clip_range, clip_range)
        error = torch.maximum(error, (clipped - target).square())
    return _divide(0.5 * masked(error, action_mask).sum(), action_mask.bool().sum(), normalizer)


def language_model_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    normalizer: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of the next token, in nats.

    Args:
        logits: (B, T, V) model output.
        labels: (B, T) int64, aligned to the input ids as in Hugging Face: the shift by one happens inside,
            and column 0 is never predicted.
        ignore_index: label of positions that do not count.
        normalizer: divides the sum; default: number of labels that count.

    Returns:
        float32 scalar; 0 with zero gradient if no label counts.

    Raises:
        ValueError: on shapes that do not fit or a normalizer that is not positive.
    """
    counts = labels != ignore_index
    counts = counts & (torch.arange(labels.shape[-1], device=labels.device) > 0)
    logprobs = token_logprobs(logits, torch.where(counts, labels, 0))
    return _divide(-masked(logprobs, counts).sum(), counts.sum(), normalizer)
