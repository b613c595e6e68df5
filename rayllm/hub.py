"""Models and data sets from the Hugging Face hub, in place of a local path.

```
hf://ORG/NAME                 a model; hf://ORG/NAME@REVISION
hf://datasets/ORG/NAME        a data set; hf://datasets/ORG/NAME@REVISION:CONFIG?split=test
```

What is fetched lies in the caches of `huggingface_hub` and `datasets` (``HF_HOME``); ``HF_HUB_OFFLINE=1`` uses the
caches only, ``HF_TOKEN`` opens what is gated. No code of a repository is run.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TypeVar

from rayllm.config.base import HUB_PREFIX, Config, Loaded, is_on_hub
from rayllm.errors import InputError
from rayllm.lineage import config_inputs, replace_inputs

ConfigT = TypeVar("ConfigT", bound=Config)

WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
"""What is fetched of a model: no pickled weights, no code."""

DATASETS_PREFIX = HUB_PREFIX + "datasets/"

_ADDRESS = re.compile(
    r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[^:?]+))?(:(?P<config>[^?]+))?(\?split=(?P<split>[^?&]+))?"
)


def fetch_inputs(loaded: Loaded[ConfigT]) -> Loaded[ConfigT]:
    """The same config with every ``hf://`` path replaced by the folder it was downloaded to.

    Raises:
        InputError: something cannot be had; names the key.
    """
    on_hub = {key: path for key, path in config_inputs(loaded.config).items() if is_on_hub(path)}
    return replace_inputs(loaded, {key: fetch(path, key=key) for key, path in on_hub.items()})


def fetch(path: Path, *, key: str) -> Path:
    """The local folder of one ``hf://`` path. Raises InputError."""
    if str(path).startswith(DATASETS_PREFIX):
        return fetch_dataset(str(path).removeprefix(DATASETS_PREFIX), key=key)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = str(path).removeprefix(HUB_PREFIX).partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=WANTED))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{key}: cannot fetch {name} from the Hugging Face hub: {reason}") from None


def fetch_dataset(address: str, *, key: str) -> Path:
    """A folder with the rows of ``ORG/NAME@REVISION:CONFIG?split=SPLIT`` in Arrow format.

    Without a revision the newest, without a config the only one, without a split `train`.

    Raises:
        InputError: a malformed address, or a data set, config or split that cannot be had.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise InputError(f"{key}: hf://datasets/{address}: expected hf://datasets/ORG/NAME@REVISION:CONFIG?split=SPLIT")
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    name, revision, config, split = match.group("name", "revision", "config", "split")
    split = split or "train"
    if Path(name).exists():  # the library would take it for the data set
        raise InputError(
            f"{key}: {Path(name).absolute()} exists and hides the data set {name}; run from another folder"
        )
    try:
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        if revision and isinstance(builder, Cache):  # it takes the newest in the cache, whatever was asked for
            raise OSError(f"the hub is out of reach, and the cache does not know revisions; leave out @{revision}")
        builder.download_and_prepare()
        found = builder.as_dataset(split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{key}: cannot fetch the data set {name}, split {split}: {reason}") from None
    words = [re.sub(r"[^\w.]+", "-", word) for word in (name, config, split, found._fingerprint) if word]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "rayllm" / "--".join(words)
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
        found.save_to_disk(str(partial))
        partial.replace(folder)
    return folder
