"""Models from the Hugging Face hub: ``model=hf://ORG/NAME`` or ``hf://ORG/NAME@REVISION`` in place of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from rayllm.config.base import HUB_PREFIX, Config, Loaded, is_on_hub, validate
from rayllm.errors import InputError
from rayllm.lineage import config_inputs

ConfigT = TypeVar("ConfigT", bound=Config)

WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
"""What is fetched: no pickled weights, no code."""


def fetch_models(loaded: Loaded[ConfigT]) -> Loaded[ConfigT]:
    """The same config with every ``hf://`` path replaced by the folder it was downloaded to, or lay in the cache of
    ``huggingface_hub`` (``HF_HOME``; ``HF_HUB_OFFLINE=1`` uses the cache only, ``HF_TOKEN`` opens gated models).

    Raises:
        InputError: a model cannot be had; names the key.
    """
    on_hub = {key: path for key, path in config_inputs(loaded.config).items() if is_on_hub(path)}
    if not on_hub:
        return loaded
    tree = loaded.config.model_dump()
    for key, path in on_hub.items():
        *parents, leaf = key.split(".")
        section: Any = tree
        for parent in parents:
            if isinstance(section[parent], tuple):
                section[parent] = list(section[parent])
            section = section[parent]
        section[int(leaf) if isinstance(section, list) else leaf] = fetch(path, key=key)
    return validate(type(loaded.config), tree, loaded.origins)


def fetch(path: Path, *, key: str) -> Path:
    """The local folder of one ``hf://`` path. Raises InputError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = str(path).removeprefix(HUB_PREFIX).partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=WANTED))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{key}: cannot fetch {name} from the Hugging Face hub: {reason}") from None
