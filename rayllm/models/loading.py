"""Model folders in Hugging Face format: create, check, load, save. Safetensors only, no code of a model's own."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from rayllm.errors import InputError

if TYPE_CHECKING:  # imported where it is used: seconds that a process without a model does not pay
    from transformers import PreTrainedModel

TRUST: dict[str, Any] = {"trust_remote_code": False}
"""For everything that is loaded: transformers' own default asks at a terminal."""

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


def check_model_dir(path: Path, *, key: str) -> None:
    """Raise InputError unless ``path`` is a local folder with a config and safetensors weights.

    Args:
        path: the model folder.
        key: the config key that named it, for the message.
    """
    if not path.is_dir():
        raise InputError(f"{key}: no model folder at {path}")
    if not (path / "config.json").is_file():
        raise InputError(f"{key}: {path} has no config.json; expected a Hugging Face model folder")
    if not any(path.glob("*.safetensors")):
        other = sorted(f.name for f in path.glob("*.bin")) + sorted(f.name for f in path.glob("*.pt"))
        hint = f" (found {other[0]}; convert it with save_pretrained, pickled weights are not read)" if other else ""
        raise InputError(f"{key}: {path} has no *.safetensors weights{hint}")
    config = _config_file(path)
    if "auto_map" in config and not _known_to_transformers(config.get("model_type")):
        raise InputError(f"{key}: {path} is a model of its own code ({config['auto_map']}), which is not run")


def _known_to_transformers(model_type: Any) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def check_tokenizer_dir(path: Path, *, key: str) -> None:
    """Raise InputError unless ``path`` holds a fast tokenizer."""
    if not (path / "tokenizer.json").is_file():
        raise InputError(f"{key}: {path} has no tokenizer.json; expected a tokenizer or model folder")


def load_tokenizer(path: Path | str) -> Any:
    """The tokenizer of a model folder.

    One without a padding token gets another special token for it, the end of sequence only where there is no other:
    here masks alone tell what is padding, but whoever trains the model elsewhere may go by the token.

    Raises:
        InputError: it has no end-of-sequence token, so no model could learn to stop; or tokens that the model in the
            same folder has no embedding for.
    """
    settings = Path(path) / "tokenizer_config.json"
    if settings.is_file() and json.loads(settings.read_text()).get("tokenizer_class") == "TokenizersBackend":
        from transformers import PreTrainedTokenizerFast  # imports a thousand modules less

        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(path))
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(path), **TRUST)
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path}: the tokenizer has no eos_token; set one in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = _other_special_token(tokenizer)
    known, largest = _embedded_tokens(Path(path)), max(tokenizer.get_vocab().values())
    if known is not None and largest >= known:
        raise InputError(
            f"{path}: the tokenizer has token {largest}, the model has embeddings for {known}: they are not of one "
            "model; copy both from the same place"
        )
    return tokenizer


def _embedded_tokens(path: Path) -> int | None:
    """Rows of the embedding as the model's config.json says, without transformers' import; None in a tokenizer's
    folder."""
    if not (path / "config.json").is_file():
        return None
    config = _config_file(path)
    found = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    return None if found is None else int(found)


def _other_special_token(tokenizer: Any) -> str:
    """To pad with: <|endoftext|> or any special token that does not end a sequence."""
    known, end = tokenizer.get_vocab(), tokenizer.eos_token
    candidates = [tokenizer.unk_token, "<|endoftext|>", *tokenizer.all_special_tokens]
    return next((token for token in candidates if token in known and token != end), end)


def check_same_tokens(model: Path, other: Path, *, key: str) -> None:
    """Raise InputError unless another model reads the tokens that the model samples as the same text. One that comes
    without a tokenizer is taken at its word.

    Args:
        model: whose tokens they are.
        other: a reward model, or a model to start a critic from.
        key: the config key that named it.
    """
    if not (other / "tokenizer.json").is_file():
        return
    if load_tokenizer(model).get_vocab() != load_tokenizer(other).get_vocab():
        raise InputError(
            f"{key}: {other} has another tokenizer than model={model}; it scores the tokens as sampled, so train it "
            "from a model with the same tokenizer"
        )


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


def is_sequence_classifier(path: Path) -> bool:
    """Whether a model folder has a score head: a reward model or a critic."""
    architectures = _config_file(path).get("architectures") or []
    return any(name.endswith("ForSequenceClassification") for name in architectures)


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


def count_stored_parameters(path: Path) -> int:
    """Parameters in a folder's safetensors files, read from their headers."""
    total = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
    return total


def vocabulary_size(path: Path) -> int:
    """Rows of the model's embedding."""
    return int(_setting(path, "vocab_size"))


def max_positions(path: Path) -> int:
    """Longest sequence that the model takes, in tokens."""
    return int(_setting(path, "max_position_embeddings"))


def _setting(path: Path, name: str) -> Any:
    """Of a model's config: as its file says, for with its defaults transformers imports what models are made of, which
    takes longer than all else that a driver imports of it."""
    config = _config_file(path)
    if config.get(name) is None or "text_config" in config:
        return getattr(model_config(path).get_text_config(), name)
    return config[name]


def _config_file(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    return config


def model_config(path: Path | str) -> Any:
    """Transformers' config of a model folder."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(path), **TRUST)
