"""Model folders in Hugging Face format: create, load, save. Safetensors only, no code of a model's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rayllm.errors import InputError
from rayllm.models.folders import TRUST, is_sequence_classifier

if TYPE_CHECKING:  # imported where it is used: seconds that a process without a model does not pay
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def create_causal_lm(architecture: str, tokenizer: Any, shape: dict[str, Any], *, seed: int) -> PreTrainedModel:
    """A decoder with random weights.

    Args:
        architecture: transformers ``model_type`` such as "qwen3" or "llama".
        tokenizer: gives the vocabulary size and the special token ids.
        shape: fields of the architecture's own config (``hidden_size``, ``num_hidden_layers``, ...).
        seed: of the initial weights.

    Raises:
        InputError: a field that the architecture does not know, or heads that do not divide.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(architecture)
    unknown = [name for name in shape if not hasattr(config, name)]
    if unknown:
        raise InputError(f"model.{unknown[0]}: the architecture {architecture!r} has no such field")
    config = AutoConfig.for_model(
        architecture,
        **shape,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if config.num_attention_heads % config.num_key_value_heads:
        raise InputError(
            f"model.num_key_value_heads={config.num_key_value_heads} must divide "
            f"model.num_attention_heads={config.num_attention_heads}"
        )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def load_causal_lm(path: Path | str, *, dtype: str = "float32") -> PreTrainedModel:
    """A decoder from a local folder or the hub, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(path), dtype=DTYPES[dtype], use_safetensors=True, **TRUST)
    return model.eval()


def load_sequence_classifier(
    path: Path | str, *, num_labels: int | None = None, dtype: str = "float32"
) -> PreTrainedModel:
    """A model that scores sequences, from a classifier's or a decoder's folder.

    With ``num_labels``, and from a decoder, the score head is new and random. Null: the classifier's own head; one
    label for a decoder.
    """
    from transformers import AutoModelForSequenceClassification

    own = num_labels is None and is_sequence_classifier(Path(path))
    labels = {} if own else {"num_labels": num_labels or 1, "ignore_mismatched_sizes": True}
    model = AutoModelForSequenceClassification.from_pretrained(
        str(path), dtype=DTYPES[dtype], use_safetensors=True, **TRUST, **labels
    )
    return model.eval()


def save_model(
    model: PreTrainedModel, tokenizer: Any, path: Path, *, state_dict: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write weights, config, tokenizer and chat template as one Hugging Face folder.

    Args:
        model: gives the config, and the weights unless ``state_dict`` does (a sharded model's cannot be read off it).
        tokenizer: goes along.
        path: folder to write.
        state_dict: full weights under their checkpoint names.
    """
    path.mkdir(parents=True, exist_ok=True)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = model.config.eos_token_id
        model.generation_config.pad_token_id = model.config.pad_token_id
    model.save_pretrained(path, state_dict=None if state_dict is None else dict(state_dict))
    tokenizer.save_pretrained(path)


def num_parameters(model: torch.nn.Module) -> int:
    """Distinct parameters; tied ones count once."""
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
