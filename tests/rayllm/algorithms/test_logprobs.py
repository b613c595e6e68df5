import math

import pytest
import torch

from rayllm.algorithms import logprobs as module
from rayllm.algorithms.logprobs import token_entropy, token_logprobs


def random_batch(dtype=torch.float32, rows=3, tokens=7, vocabulary=11):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(rows, tokens, vocabulary, generator=generator)).to(dtype)
    return logits, torch.randint(vocabulary, (rows, tokens), generator=generator)


def reference_logprobs(logits, sequences, temperature):
    logp = (logits[:, :-1].float() / temperature).log_softmax(-1)
    return torch.nn.functional.pad(logp.gather(-1, sequences[:, 1:, None]).squeeze(-1), (1, 0))


def reference_entropy(logits, temperature):
    logp = (logits[:, :-1].float() / temperature).log_softmax(-1)
    return torch.nn.functional.pad(-(logp.exp() * logp).sum(-1), (1, 0))


def test_token_logprobs_by_hand():
    # Token 1 is predicted by logits[0] = (0, log 3): p = (1/4, 3/4). Token 2 by (0, 0): p = (1/2, 1/2).
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0], [9.0, 9.0]]])
    result = token_logprobs(logits, torch.tensor([[0, 1, 0]]))
    torch.testing.assert_close(result, torch.tensor([[0.0, math.log(0.75), math.log(0.5)]]))
    # Temperature 1/2 doubles the logits: (0, log 9), p = (1/10, 9/10).
    cold = token_logprobs(logits, torch.tensor([[0, 1, 0]]), temperature=0.5)
    torch.testing.assert_close(cold, torch.tensor([[0.0, math.log(0.9), math.log(0.5)]]))


def test_token_entropy_by_hand():
    # Uniform over 2: log 2. p = (1/4, 3/4): log 4 - 3/4 log 3. -inf forbids a token: one left, entropy 0.
    inf = float("inf")
    logits = torch.tensor([[[0.0, 0.0], [0.0, math.log(3)], [0.0, -inf], [5.0, 1.0]]], requires_grad=True)
    entropy = token_entropy(logits)
    expected = torch.tensor([[0.0, math.log(2), math.log(4) - 0.75 * math.log(3), 0.0]])
    torch.testing.assert_close(entropy, expected)
    entropy.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1024, 4])
def test_values_and_gradients_match_log_softmax(dtype, temperature, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    logits, sequences = random_batch(dtype)
    weights = torch.randn(sequences.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    logprobs = token_logprobs(ours, sequences, temperature=temperature)
    entropy = token_entropy(ours, temperature=temperature)
    for actual, expected in [
        (logprobs, reference_logprobs(theirs, sequences, temperature)),
        (entropy, reference_entropy(theirs, temperature)),
    ]:
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, expected)
        assert (actual[:, 0] == 0).all()
        (grad,) = torch.autograd.grad((actual * weights).sum(), ours)
        (grad_expected,) = torch.autograd.grad((expected * weights).sum(), theirs)
        assert grad.dtype == dtype
        torch.testing.assert_close(grad, grad_expected)


def test_nothing_of_the_size_of_the_logits_is_kept_for_backward():
    logits, sequences = random_batch(torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        token_logprobs(logits.requires_grad_(), sequences)
        token_entropy(logits)
    large = [t for t in kept if t.numel() >= logits.numel() // 2]
    assert large and all(t.data_ptr() == logits.data_ptr() for t in large)


@pytest.mark.parametrize("poison", [1e9, float("nan"), float("inf")])
def test_positions_without_gradient_do_not_leak(poison):
    logits, sequences = random_batch()
    keep = torch.tensor([[0, 1, 1, 1, 0, 0, 0]] * 3).bool()  # tokens 1..3, predicted by logits 0..2

    def run(x):
        x = x.clone().requires_grad_()
        outputs = [torch.where(keep, f, 0.0) for f in (token_logprobs(x, sequences), token_entropy(x))]
        return outputs, torch.autograd.grad(sum(o.sum() for o in outputs), x)[0]

    poisoned = logits.clone()
    poisoned[:, 3:] = poison
    clean_out, clean_grad = run(logits)
    dirty_out, dirty_grad = run(poisoned)
    assert all(torch.equal(a, b) for a, b in zip(clean_out, dirty_out, strict=True))
    assert torch.equal(clean_grad, dirty_grad)
    assert (dirty_grad[:, 3:] == 0).all()


@pytest.mark.parametrize("rows, tokens", [(2, 1), (0, 4)])
def test_nothing_to_predict(rows, tokens):
    logits = torch.zeros(rows, tokens, 5, requires_grad=True)
    result = token_logprobs(logits, torch.zeros(rows, tokens, dtype=torch.long)) + token_entropy(logits)
    assert result.shape == (rows, tokens) and (result == 0).all()
    result.sum().backward()


def test_rejects_bad_input():
    logits, sequences = random_batch()
    with pytest.raises(ValueError, match=r"logits \(3, 7, 11\), sequences \(3, 6\)"):
        token_logprobs(logits, sequences[:, 1:])
    with pytest.raises(ValueError, match="temperature"):
        token_entropy(logits, temperature=0.0)
    with pytest.raises(ValueError, match=r"\(B, T, V\)"):
        token_entropy(logits[0])
