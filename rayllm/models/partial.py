"""Training a part of a model: its last decoder blocks, or low-rank adapters (LoRA) beside frozen weights.

With adapters, the frozen weights keep their place in the module and get another name there
(``q_proj.base_layer.weight``); `checkpoint_name` gives the name of the Hugging Face folder back, and `adapters` tells
what to add to a weight, so that the outside sees whole weights under the names it knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from rayllm.config.common import LearnerConfig, LoraConfig
from rayllm.errors import InputError
from rayllm.models.folders import model_config
from rayllm.models.heads import ScalarModel

ADAPTER = "default"
"""Peft's name for the only adapter."""

HEAD = "score"
"""The scalar head of transformers' classifiers."""


def choose_trained(model: nn.Module, learner: LearnerConfig) -> None:
    """Freeze what the config says: nothing, all but the last blocks, or all but new adapters."""
    if learner.trainable_layers is not None:
        freeze_all_but_last(model, learner.trainable_layers)
    if learner.lora.rank is not None:
        add_adapters(model, learner.lora)


def count_trainable(model: nn.Module) -> tuple[int, int]:
    """(trained, total) numbers of the module's parameters; tied ones count once. Call it before ZeRO-3 shards it."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def plan_trained(
    path: Path | str, learner: LearnerConfig, *, scalar: bool = False, num_heads: int = 1
) -> tuple[int, int] | None:
    """`count_trainable` of a model folder under this config, None where all is trained; no weights are read.

    Args:
        path: model folder.
        learner: says what is trained.
        scalar: with a scalar head in place of the language model's.
        num_heads: of the scalar head.

    Raises:
        InputError: as `choose_trained`.
    """
    if learner.trainable_layers is None and learner.lora.rank is None:
        return None
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = model_config(path)
    with torch.device("meta"):
        model: nn.Module
        if scalar:
            config.num_labels = num_heads
            model = ScalarModel(AutoModelForSequenceClassification.from_config(config))
        else:
            model = AutoModelForCausalLM.from_config(config)
        choose_trained(model, learner)
    return count_trainable(model)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks, first to last."""
    inner: Any = _transformer(model)
    count = inner.config.num_hidden_layers
    for module in inner.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise InputError(f"{type(inner).__name__}: found no list of its {count} decoder blocks")


def freeze_all_but_last(model: nn.Module, num_layers: int) -> None:
    """Train the last ``num_layers`` decoder blocks, the norm after them and the head, unless that is the embedding.

    Raises:
        InputError: the model has fewer blocks.
    """
    layers = decoder_layers(model)
    if num_layers > len(layers):
        raise InputError(
            f"learner.trainable_layers={num_layers}: the model has {len(layers)} decoder blocks; "
            "set it to at most that many, or to null to train all"
        )
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for module in [*layers[: len(layers) - num_layers], *embeddings]:
        module.requires_grad_(False)


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Freeze all weights but a scalar head and put adapters on linear layers of the decoder blocks.

    The product of an adapter's two matrices starts at zero: the model computes what it did. The first one is drawn
    from a seed of its own, the same on every rank.

    Raises:
        InputError: ``target_modules`` names no linear layer of a block.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    assert config.rank is not None
    inner = _transformer(model)
    known = {
        name.rsplit(".", 1)[-1]
        for name, module in decoder_layers(model).named_modules()
        if isinstance(module, nn.Linear)
    }
    unknown = sorted(set(config.target_modules or ()) - known)
    if unknown or not known:
        raise InputError(
            f"learner.lora.target_modules: {unknown or type(inner).__name__}: "
            f"expected linear layers of the decoder blocks, here {sorted(known)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inject_adapter_in_model(
            PeftConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules=sorted(config.target_modules or known),
                base_model_name_or_path=inner.name_or_path,
                task_type="CAUSAL_LM" if inner is model else "SEQ_CLS",
            ),
            inner,
            adapter_name=ADAPTER,
        )
    if inner is not model:
        inner.score.requires_grad_(True)


@dataclass(frozen=True, slots=True)
class Adapter:
    """What training adds to one frozen weight: ``scaling * b @ a``."""

    a: nn.Parameter  # (rank, in)
    b: nn.Parameter  # (out, rank)
    scaling: float

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """The whole weight in its own dtype, computed in float32."""
        return torch.addmm(weight.float(), self.b.float(), self.a.float(), alpha=self.scaling).to(weight.dtype)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Checkpoint name of an adapted weight -> its adapter; empty without LoRA."""
    return {
        f"{name}.weight": Adapter(
            module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight, module.scaling[ADAPTER]
        )
        for name, module in _adapted(model).items()
    }


def is_adapter(name: str) -> bool:
    """Whether a parameter of the module belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def checkpoint_name(name: str) -> str:
    """A parameter's name in the module -> its name in the Hugging Face folder."""
    return name.replace(".base_layer.", ".")


def adapters_off(model: nn.Module) -> AbstractContextManager[None]:
    """Context in which the model computes exactly what its frozen weights say.

    The adapters still run, times zero: ZeRO-3 expects every pass to use the same modules.
    """
    from peft.helpers import rescale_adapter_scale

    return rescale_adapter_scale(model, 0)


def peft_name(name: str) -> str:
    """The name under which a peft folder holds a trained tensor of the module."""
    return "base_model.model." + name.removeprefix("classifier.").replace(f".{ADAPTER}.", ".")


def save_adapter(model: nn.Module, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write an adapter folder that plain peft loads onto the folder that the model came from.

    Args:
        model: gives the adapter's config.
        tensors: of `Engine.adapter_state_dict`.
        path: folder to write.
    """
    inner: Any = _transformer(model)
    config = inner.peft_config[ADAPTER]
    if inner is not model:
        config.modules_to_save = [HEAD]
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(path))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "adapter_model.safetensors")


def _adapted(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def _transformer(model: nn.Module) -> Any:
    """The transformers model, which a scalar model has inside."""
    return model.classifier if isinstance(model, ScalarModel) else model
