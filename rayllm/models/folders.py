"""What the files of a model's folder say, its weights left alone: sizes, tokenizer, what is missing. No torch."""

from __future__ import annotations

import json
import math
from filecmp import cmpfiles
from pathlib import Path
from typing import Any

from safetensors import safe_open

from rayllm.errors import InputError

TRUST: dict[str, Any] = {"trust_remote_code": False}
"""For everything that is loaded: transformers' own default asks at a terminal."""


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
    if _same_tokenizer_files(model, other) and _embedded_tokens(model) == _embedded_tokens(other):
        return  # whoever reads the one learns what holds for both
    if load_tokenizer(model).get_vocab() != load_tokenizer(other).get_vocab():
        raise InputError(
            f"{key}: {other} has another tokenizer than model={model}; it scores the tokens as sampled, so train it "
            "from a model with the same tokenizer"
        )


def _same_tokenizer_files(model: Path, other: Path) -> bool:
    names = ("tokenizer.json", "tokenizer_config.json")
    return cmpfiles(model, other, names, shallow=False)[0] == list(names)


def is_sequence_classifier(path: Path) -> bool:
    """Whether a model folder has a score head: a reward model or a critic."""
    architectures = _config_file(path).get("architectures") or []
    return any(name.endswith("ForSequenceClassification") for name in architectures)


def count_stored_parameters(path: Path) -> int:
    """Parameters in a folder's safetensors files, read from their headers."""
    total = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
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
