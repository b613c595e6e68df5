"""New weights in a vLLM model that serves.

VLLM's own ``reload_weights`` takes every kind of model, layer by layer. On CPU it leaves a tied output head behind (see
`retie`), and for a small model its accounting takes as long as the loading and packing themselves; a `Renewal` does
these alone for the models that `renewable` knows to be plain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from typing import Any

import torch


def renewable(model: torch.nn.Module) -> bool:
    """Whether every weight is as in the checkpoint but for the linear layers and embeddings that vLLM packs on CPU: no
    quantisation, adapters, experts, nor layers of another kind that make something of theirs."""
    from vllm.lora.layers import BaseLayerWithLoRA
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    plain = {UnquantizedLinearMethod, UnquantizedEmbeddingMethod}
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None and not (type(method) in plain and hasattr(module, "cpu_linear")):
            return False
        if isinstance(module, AttentionLayerBase) and type(module) is not Attention:
            return False
        if isinstance(module, BaseLayerWithLoRA):
            return False
    return True


class Renewal:
    """The way of checkpoint weights, all of them, into a `renewable` model; vLLM's loader converts and fuses them.

    What vLLM drops once it is packed is kept from the first time on, to load the next weights into: it would be there
    at every load anyway, and new memory costs a page fault for each of its pages.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._layers = [module for module in model.modules() if getattr(module, "quant_method", None) is not None]
        self._weights: list[torch.nn.Parameter] = []

    def load(self, named: Iterable[tuple[str, torch.Tensor]], helper: Executor) -> None:
        """To be called between two steps. A failure leaves a model that cannot serve.

        Args:
            helper: packs a part of them, for a learner that waits for its weights to serve leaves a core idle.
        """
        if not self._weights:
            self._weights = [_unpacked(layer) for layer in self._layers]
        for layer, weight in zip(self._layers, self._weights, strict=True):
            layer.cpu_linear = None  # frees what is packed of the old weights
            layer.weight = weight
        self._model.load_weights(named)

        tied: dict[int, list[Any]] = {}
        for layer in self._layers:
            tied.setdefault(id(layer.weight), []).append(layer)
        largest_first = sorted((first for first, *_ in tied.values()), key=lambda layer: -layer.weight.numel())
        to_pack = iter(largest_first)  # both take the next
        helped = helper.submit(_pack, to_pack)
        _pack(to_pack)
        helped.result()
        for first, *others in tied.values():
            for layer in others:
                layer.cpu_linear = first.cpu_linear


def _unpacked(layer: Any) -> torch.nn.Parameter:
    """Its weight, or memory for one where vLLM has dropped it."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import materialize_layer, restore_layer_on_meta

    if not layer.weight.numel():
        info = get_layerwise_info(layer)
        restore_layer_on_meta(layer, info)
        materialize_layer(layer, info)
    return layer.weight


def _pack(layers: Iterator[Any]) -> None:
    for layer in layers:
        layer.quant_method.process_weights_after_loading(layer)


def retie(model: torch.nn.Module) -> None:
    """Give a tied output head what was packed of the embedding, after vLLM's own reload. On CPU only; elsewhere it
    finds nothing to do.

    On CPU vLLM packs each linear layer, and the embedding, into a oneDNN handle. A reload rebuilds the handles of the
    layers that it loads, but a tied head loads nothing itself and would go on with the old weights.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    packed = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding) and hasattr(m, "cpu_linear")]
    for head in packed:
        for embedding in packed:
            if isinstance(head, ParallelLMHead) and embedding is not head and embedding.weight is head.weight:
                head.cpu_linear = embedding.cpu_linear
