"""Per-token log-probabilities and entropies from logits; the only place that shifts by one.

Shapes: B rows, T tokens, V vocabulary. ``logits[:, t]`` predicts ``sequences[:, t + 1]``, outputs are (B, T)
aligned to ``sequences``, and column 0 is exactly 0 because the first token has no predecessor.

Logits are the largest tensor of an update (B x T x V), so nothing of that size is kept beside them: they are
worked through ``CHUNK`` tokens at a time in float32, and the backward pass recomputes the softmax of a chunk
from the logits in their own dtype. A position whose incoming gradient is 0 gets gradient exactly 0, whatever
its logits are; NaN logits on padding therefore do not leak into the update.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

CHUNK = 1024


def token_logprobs(
    logits: torch.Tensor, sequences: torch.Tensor, *, temperature: float = 1.0
) -> torch.Tensor:
    """Log-probability of every token given the tokens before it.

    Args:
        logits: (B, T, V) model output, any float dtype.
        sequences: (B, T) int64 token ids.
        temperature: sampling temperature the policy is trained under, > 0.

    Returns:
        (B, T) float32 nats; column 0 is 0.0. Differentiable once in ``logits``.

    Raises:
        ValueError: if the shapes do not fit or ``temperature`` is not positive.
    """
    _check(logits, temperature)
    if logits.shape[:2] != sequences.shape:
        raise ValueError(f"shapes differ: logits {tuple(logits.shape)}, sequences {tuple(sequences.shape)}")
    return _TokenLogprobs.apply(logits, sequences, temperature)


def token_entropy(logits: torch.Tensor, *, temperature: float = 1.0) -> torch.Tensor:
    """Entropy of the distribution that predicts each token.

    Args:
        logits: (B, T, V) model output, any float dtype; -inf (a forbidden token) is allowed.
        temperature: sampling temperature, > 0.

    Returns:
        (B, T) float32 nats in [0, log V]; column t belongs to ``logits[:, t - 1]``, column 0 is 0.0.
        Differentiable once in ``logits``.

    Raises:
        ValueError: if ``logits`` is not (B, T, V) or ``temperature`` is not positive.
    """
    _check(logits, temperature)
    return _TokenEntropy.apply(logits, temperature)


def _check(logits: torch.Tensor, temperature: float) -> None:
    if logits.dim() != 3:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected (B, T, V)")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")


def _chunks(logits: torch.Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Rows and column ranges that cover all predictions: (row, columns of logits, columns they predict)."""
    rows, tokens = logits.shape[:2]
    for row in range(rows):
        for start in range(0, tokens - 1, CHUNK):
            stop = min(start + CHUNK, tokens - 1)
            yield row, slice(start, stop), slice(start + 1, stop + 1)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: torch.Tensor, sequences: torch.Tensor, temperature: float) -> torch.Tensor:
        out = torch.zeros(sequences.shape, dtype=torch.float32, device=logits.device)
        for row, source, target in _chunks(logits):
            scaled = logits[row, source].float() / temperature
            picked = scaled.gather(-1, sequences[row, target, None]).squeeze(-1)
            out[row, target] = picked - scaled.logsumexp(-1)
        ctx.save_for_backward(logits, sequences)
        ctx.temperature = temperature
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, sequences = ctx.saved_tensors
        grad_logits = torch.zeros_like(logits)
        for row, source, target in _chunks(logits):
            upstream = grad[row, target, None] / ctx.temperature
            # d log p_k / d x_j = [j = k] - p_j
            local = (logits[row, source].float() / ctx.temperature).softmax(-1).neg_()
            local.scatter_add_(-1, sequences[row, target, None], torch.ones_like(upstream))
            grad_logits[row, source] = local.mul_(upstream).masked_fill_(upstream == 0, 0.0).to(logits.dtype)
        return grad_logits, None, None


class _TokenEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        out = torch.zeros(logits.shape[:2], dtype=torch.float32, device=logits.device)
        for row, source, target in _chunks(logits):
            logp = (logits[row, source].float() / temperature).log_softmax(-1)
            out[row, target] = -_plogp(logp).sum(-1)
        ctx.save_for_backward(logits, out)
        ctx.temperature = temperature
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, entropy = ctx.saved_tensors
        grad_logits = torch.zeros_like(logits)
        for row, source, target in _chunks(logits):
            upstream = grad[row, target, None] / ctx.temperature
            logp = (logits[row, source].float() / ctx.temperature).log_softmax(-1)
            # d H / d x_j = -p_j (log p_j + H)
            local = -(_plogp(logp) + logp.exp() * entropy[row, target, None])
            grad_logits[row, source] = local.mul_(upstream).masked_fill_(upstream == 0, 0.0).to(logits.dtype)
        return grad_logits, None


def _plogp(logp: torch.Tensor) -> torch.Tensor:
    """p log p with its limit 0 at p = 0."""
    return (logp.exp() * logp).masked_fill_(logp == float("-inf"), 0.0)
