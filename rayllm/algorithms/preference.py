"""Direct preference losses: DPO and its kin, on one log-probability a response.

Shapes: N pairs (or N responses, for `kto_loss`); B rows of T tokens.

With h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected), e = label_smoothing, and log-probabilities
summed over a response's tokens, or averaged where `KINDS` says so:

    dpo      -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)
             https://arxiv.org/abs/2305.18290 eq. 7; smoothing: Mitchell 2023 (conservative DPO)
    robust   (-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e)
             https://arxiv.org/abs/2403.00409 eq. 12: unbiased when labels are flipped with probability e
    ipo      (h - 1 / (2 beta))^2, averaged          https://arxiv.org/abs/2310.12036 eq. 17
    hinge    max(0, 1 - beta h)                      https://arxiv.org/abs/2309.06657 (hinge-norm), SLiC
    simpo    -log sigmoid(beta (policy_chosen - policy_rejected) - target_margin), averaged, no reference
             https://arxiv.org/abs/2405.14734 eq. 6
    orpo     -beta log sigmoid(log odds_chosen - log odds_rejected), odds = p / (1 - p), averaged, no reference
             https://arxiv.org/abs/2403.07691 eq. 7, without its first term, the loss of SFT on the chosen response
    kto      see `kto_loss`: no pairs, but responses that are wanted or not
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from rayllm.algorithms.checks import masked, require_known, require_same_shape


@dataclass(frozen=True, slots=True)
class Kind:
    """What a loss asks for."""

    paired: bool = True
    """Compares two responses to one prompt; else each response is wanted or not."""

    reference: bool = True
    """Takes log-probabilities under a reference."""

    averaged: bool = False
    """A response's log-probability is the mean over its tokens, not the sum."""


KINDS = {
    "dpo": Kind(),
    "robust": Kind(),
    "ipo": Kind(averaged=True),
    "hinge": Kind(),
    "kto": Kind(paired=False),
    "orpo": Kind(reference=False, averaged=True),
    "simpo": Kind(reference=False, averaged=True),
}
PAIRED = tuple(name for name, kind in KINDS.items() if kind.paired)
SMOOTHED = ("dpo", "robust")


def response_logprobs(logprobs: torch.Tensor, action_mask: torch.Tensor, *, averaged: bool = False) -> torch.Tensor:
    """(B,) log-probability of each row's response: the sum over its tokens, or their mean.

    Args:
        logprobs: (B, T) of `token_logprobs`.
        action_mask: (B, T) True on the response.
        averaged: take the mean; 0 for a row without a response.
    """
    require_same_shape(logprobs=logprobs, action_mask=action_mask)
    sums = masked(logprobs, action_mask).sum(1)
    return sums / action_mask.sum(1).clamp(min=1) if averaged else sums


def preference_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    ref_chosen: torch.Tensor | None,
    ref_rejected: torch.Tensor | None,
    *,
    kind: str = "dpo",
    beta: float,
    label_smoothing: float = 0.0,
    target_margin: float = 0.0,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean preference loss over pairs and the implicit rewards; formulas in the module docstring.

    Args:
        policy_chosen, policy_rejected: (N,) nats of each response under the policy, summed over its tokens
            (for ipo, orpo and simpo: averaged).
        ref_chosen, ref_rejected: (N,) the same under the reference; not used, and may be None, for orpo and simpo.
        kind: one of `PAIRED`.
        beta: strength of the pull to the reference, > 0; for simpo the scale of the reward, for orpo the weight.
        label_smoothing: probability that a label is wrong, in [0, 0.5); dpo and robust only.
        target_margin: by how much the chosen reward should be larger; simpo only.
        weights: (N,) of each pair, for a part of a larger batch: the loss is then their sum. Default: 1 / N.

    Returns:
        ``(loss, chosen_rewards, rejected_rewards)``: float32 scalar, and (N,) beta times the log-ratio of
        policy to reference (without one: times the policy's log-probability), detached.

    Raises:
        ValueError: on an unknown kind, shapes that differ or a number out of range.
    """
    require_known("kind", kind, PAIRED)
    _require_numbers(kind, beta, label_smoothing, target_margin)
    chosen, rejected = policy_chosen.float(), policy_rejected.float()
    require_same_shape(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    if KINDS[kind].reference:
        if ref_chosen is None or ref_rejected is None:
            raise ValueError(f"{kind} needs ref_chosen and ref_rejected")
        require_same_shape(policy_chosen=policy_chosen, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
        chosen, rejected = chosen - ref_chosen.float(), rejected - ref_rejected.float()
    margin = beta * (chosen - rejected)
    if kind == "ipo":
        losses = (chosen - rejected - 1 / (2 * beta)).square()
    elif kind == "hinge":
        losses = (1 - margin).relu()
    elif kind == "orpo":
        losses = -beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    else:
        losses = -logsigmoid(margin - target_margin)
        if kind == "robust":  # what a wrong label adds on average is taken off again
            right, wrong = (1 - label_smoothing) * losses, -label_smoothing * logsigmoid(-margin)
            losses = (right - wrong) / (1 - 2 * label_smoothing)
        elif label_smoothing:
            losses = (1 - label_smoothing) * losses - label_smoothing * logsigmoid(-margin)
    return _reduced(losses, weights), (beta * chosen).detach(), (beta * rejected).detach()


def kto_loss(
    policy: torch.Tensor,
    ref: torch.Tensor,
    desirable: torch.Tensor,
    kl: torch.Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KTO on responses without a partner: with r the log-ratio of policy to reference, the mean of
    ``w_d (1 - sigmoid(beta (r - kl)))`` for desirable ones and ``w_u (1 - sigmoid(beta (kl - r)))`` for the others.

    Args:
        policy, ref: (N,) nats of each response, summed over its tokens.
        desirable: (N,) bool.
        kl: the reference point, of `reference_point` over the whole batch.
        beta: aversion to risk, > 0.
        desirable_weight, undesirable_weight: w_d and w_u. The paper keeps w_d times the number of desirable responses
            within 1 to 4/3 of w_u times that of the others.
        weights: as in `preference_loss`.

    Returns:
        ``(loss, rewards)``: float32 scalar, and (N,) beta times the log-ratio, detached.

    Source: Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, eq. 8.
    """
    require_same_shape(policy=policy, ref=ref, desirable=desirable)
    _require_numbers("kto", beta, 0.0, 0.0)
    ratio = policy.float() - ref.float()
    kl = torch.as_tensor(kl, dtype=torch.float32, device=ratio.device).detach()
    gain = torch.where(desirable.bool(), ratio - kl, kl - ratio)
    scale = torch.where(desirable.bool(), desirable_weight, undesirable_weight)
    return _reduced(scale * torch.sigmoid(-beta * gain), weights), (beta * ratio).detach()


def reference_point(policy: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """KTO's estimate of the KL from reference to policy: the mean log-ratio of responses to *other* prompts, at least
    0, detached.

    Args:
        policy, ref: (N,) nats of each prompt followed by another prompt's response, summed over the response.

    Source: Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, section 4.1.
    """
    require_same_shape(policy=policy, ref=ref)
    ratio = (policy.float() - ref.float()).detach()
    return (ratio.sum() / max(ratio.numel(), 1)).clamp(min=0)


def _log_odds(logprobs: torch.Tensor) -> torch.Tensor:
    """``log(p / (1 - p))``; a certain response (p = 1) stands just below certainty."""
    logprobs = logprobs.clamp(max=-1e-6)
    return logprobs - torch.log(-torch.expm1(logprobs))


def _reduced(losses: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    if weights is None:
        return losses.sum() / max(losses.numel(), 1)
    require_same_shape(losses=losses, weights=weights)
    return (losses * weights.float()).sum()


def _require_numbers(kind: str, beta: float, label_smoothing: float, target_margin: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and kind not in SMOOTHED):
        raise ValueError(
            f"label_smoothing must be in [0, 0.5), and 0 unless {' or '.join(SMOOTHED)}: {label_smoothing=} {kind=}"
        )
    if target_margin and kind != "simpo":
        raise ValueError(f"target_margin must be 0 unless simpo: {target_margin=} {kind=}")
