"""Direct preference losses: DPO and its kin, on one log-probability a response.

Shapes: N pairs.

With h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected) and e = label_smoothing:

    dpo     -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)
            https://arxiv.org/abs/2305.18290 eq. 7; smoothing: Mitchell 2023 (conservative DPO)
    ipo     (h - 1 / (2 beta))^2                    https://arxiv.org/abs/2310.12036 eq. 17
    hinge   max(0, 1 - beta h)                      https://arxiv.org/abs/2309.06657 (hinge-norm)
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from rayllm.algorithms.checks import require_known, require_same_shape

KINDS = ("dpo", "ipo", "hinge")


def preference_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    kind: str = "dpo",
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean preference loss over pairs and the implicit rewards; formulas in the module docstring.

    Args:
        policy_chosen, policy_rejected: (N,) nats of each response under the policy, summed over its tokens
            (for ipo: averaged).
        ref_chosen, ref_rejected: (N,) the same under the reference.
        kind: "dpo", "ipo" or "hinge".
        beta: strength of the pull to the reference, > 0.
        label_smoothing: probability that a label is wrong, in [0, 0.5); dpo only.

    Returns:
        ``(loss, chosen_rewards, rejected_rewards)``: float32 scalar, and (N,) beta times the log-ratio of
        policy to reference, detached.

    Raises:
        ValueError: on an unknown kind, shapes that differ or a number out of range.
    """
    require_known("kind", kind, KINDS)
    policy = {"policy_chosen": policy_chosen, "policy_rejected": policy_rejected}
    require_same_shape(**policy, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and kind != "dpo"):
        raise ValueError(f"label_smoothing must be in [0, 0.5), and 0 unless dpo: {label_smoothing=} {kind=}")
    chosen = policy_chosen.float() - ref_chosen.float()
    rejected = policy_rejected.float() - ref_rejected.float()
    margin = chosen - rejected
    if kind == "dpo":
        losses = -logsigmoid(beta * margin)
        if label_smoothing:
            losses = (1 - label_smoothing) * losses - label_smoothing * logsigmoid(-beta * margin)
    elif kind == "ipo":
        losses = (margin - 1 / (2 * beta)).square()
    else:
        losses = (1 - beta * margin).relu()
    return losses.sum() / max(losses.numel(), 1), (beta * chosen).detach(), (beta * rejected).detach()
