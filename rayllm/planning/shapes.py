"""What a decoder is made of, as numbers: enough to count its parameters, its work and its memory without its weights.

Counts are those of transformers' classes, to the parameter: by formula for `ARCHITECTURES`, for others by building the
model without weights.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rayllm.config.base import HUB_PREFIX, is_on_hub
from rayllm.errors import InputError

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")
"""transformers' ``model_type``s whose parameters are counted by formula."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """One decoder."""

    name: str
    hidden: int
    intermediate: int
    """Width of the MLP; of one expert's where there are experts."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    tied: bool = False
    """The output head is the embedding."""

    qkv_bias: bool = False
    qk_norm: bool = False
    experts: int = 0
    """Of each layer's MLP; 0: one dense MLP."""

    experts_per_token: int = 0
    head_outputs: int = 0
    """Rows of a scalar head in place of the language model's (reward model, critic); 0: a language model."""

    counted: int | None = None
    """Parameters of the language model, of an architecture that has no formula here; the other sizes are then near, not
    exact."""

    @property
    def attention_width(self) -> int:
        """Width of the queries of one token."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of the keys of one token; the values' is the same."""
        return self.kv_heads * self.head_dim

    @property
    def active_mlps(self) -> int:
        """MLPs that one token runs through in a layer."""
        return self.experts_per_token if self.experts else 1

    @property
    def attention_parameters(self) -> int:
        """Of one layer's projections, biases and norms of queries and keys."""
        matrices = 2 * self.hidden * self.attention_width + 2 * self.hidden * self.kv_width
        biases = (self.attention_width + 2 * self.kv_width) * self.qkv_bias
        return matrices + biases + 2 * self.head_dim * self.qk_norm

    @property
    def mlp_parameters(self) -> int:
        """Of one layer's MLP, or all its experts and their router."""
        dense = 3 * self.hidden * self.intermediate
        return self.experts * (dense + self.hidden) if self.experts else dense

    @property
    def layer_parameters(self) -> int:
        return self.attention_parameters + self.mlp_parameters + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def head_parameters(self) -> int:
        """Of a head with weights of its own."""
        if self.head_outputs:
            return self.head_outputs * self.hidden
        return 0 if self.tied else self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Distinct parameters; tied ones count once."""
        if self.counted is not None:
            own_head = 0 if self.tied else self.embedding_parameters
            return self.counted if not self.head_outputs else self.counted - own_head + self.head_parameters
        return self.embedding_parameters + self.layers * self.layer_parameters + self.hidden + self.head_parameters

    @property
    def largest_tensor(self) -> int:
        """Parameters of the largest module, which ZeRO-3 gathers as one."""
        return max(self.embedding_parameters, self.hidden * self.intermediate, self.hidden * self.attention_width)

    @property
    def multiplied(self) -> int:
        """Parameters that one token is multiplied with: active experts only, and the head, but no embedding row."""
        if self.counted is not None:
            return self.parameters - (0 if self.tied and not self.head_outputs else self.embedding_parameters)
        mlp = 3 * self.hidden * self.intermediate * self.active_mlps + self.hidden * self.experts
        head = self.hidden * (self.head_outputs or self.vocab)
        return self.layers * (self.attention_parameters + mlp) + head

    def kv_bytes(self, element: int) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.layers * self.kv_width * element

    def lora_parameters(self, rank: int, modules: tuple[str, ...] | None) -> int:
        """Of adapters on linear layers of the blocks; ``modules``: their names, None for all."""
        d, q, kv, i = self.hidden, self.attention_width, self.kv_width, self.intermediate
        linear = {"q_proj": d + q, "k_proj": d + kv, "v_proj": d + kv, "o_proj": q + d}
        if not self.experts:  # experts are one tensor, not linear layers
            linear |= {"gate_proj": d + i, "up_proj": d + i, "down_proj": i + d}
        chosen = linear if modules is None else {name: linear.get(name, 0) for name in modules}
        return rank * self.layers * sum(chosen.values())

    def with_scalar_head(self) -> ModelShape:
        """The same decoder as a reward model or critic."""
        return replace(self, head_outputs=1)


def _llama(name: str, *sizes: int, **more: Any) -> ModelShape:
    hidden, intermediate, layers, heads, kv_heads, vocab, max_positions = sizes
    more = {"head_dim": hidden // heads, **more}
    return ModelShape(
        name=name, hidden=hidden, intermediate=intermediate, layers=layers, heads=heads, kv_heads=kv_heads,
        vocab=vocab, max_positions=max_positions, **more,
    )  # fmt: skip


_QWEN3: dict[str, Any] = {"qk_norm": True, "head_dim": 128}
_QWEN25: dict[str, Any] = {"qkv_bias": True}

# name, hidden, intermediate, layers, heads, kv heads, vocabulary, positions
KNOWN = {
    shape.name: shape
    for shape in (
        _llama("llama-2-7b", 4096, 11008, 32, 32, 32, 32000, 4096),
        _llama("llama-3.2-1b", 2048, 8192, 16, 32, 8, 128256, 131072, tied=True),
        _llama("llama-3.2-3b", 3072, 8192, 28, 24, 8, 128256, 131072, tied=True),
        _llama("llama-3-8b", 4096, 14336, 32, 32, 8, 128256, 8192),
        _llama("llama-3-70b", 8192, 28672, 80, 64, 8, 128256, 8192),
        _llama("mistral-7b", 4096, 14336, 32, 32, 8, 32768, 32768),
        _llama("qwen2.5-0.5b", 896, 4864, 24, 14, 2, 151936, 32768, tied=True, **_QWEN25),
        _llama("qwen2.5-1.5b", 1536, 8960, 28, 12, 2, 151936, 32768, tied=True, **_QWEN25),
        _llama("qwen2.5-3b", 2048, 11008, 36, 16, 2, 151936, 32768, tied=True, **_QWEN25),
        _llama("qwen2.5-7b", 3584, 18944, 28, 28, 4, 152064, 32768, **_QWEN25),
        _llama("qwen2.5-14b", 5120, 13824, 48, 40, 8, 152064, 32768, **_QWEN25),
        _llama("qwen2.5-32b", 5120, 27648, 64, 40, 8, 152064, 32768, **_QWEN25),
        _llama("qwen2.5-72b", 8192, 29568, 80, 64, 8, 152064, 32768, **_QWEN25),
        _llama("qwen3-0.6b", 1024, 3072, 28, 16, 8, 151936, 40960, tied=True, **_QWEN3),
        _llama("qwen3-1.7b", 2048, 6144, 28, 16, 8, 151936, 40960, tied=True, **_QWEN3),
        _llama("qwen3-4b", 2560, 9728, 36, 32, 8, 151936, 40960, tied=True, **_QWEN3),
        _llama("qwen3-8b", 4096, 12288, 36, 32, 8, 151936, 40960, **_QWEN3),
        _llama("qwen3-14b", 5120, 17408, 40, 40, 8, 151936, 40960, **_QWEN3),
        _llama("qwen3-32b", 5120, 25600, 64, 64, 8, 151936, 40960, **_QWEN3),
        _llama("mixtral-8x7b", 4096, 14336, 32, 32, 8, 32000, 32768, experts=8, experts_per_token=2),
        _llama("qwen3-30b-a3b", 2048, 768, 48, 32, 4, 151936, 40960, experts=128, experts_per_token=8, **_QWEN3),
    )
}
"""Published models by name."""


def find_shape(model: Path | str, *, key: str = "model") -> ModelShape:
    """The shape of a model folder, of ``hf://ORG/NAME`` (only its config.json is fetched), or of a known name.

    Args:
        model: folder, hub address, or a name out of `KNOWN`; a config's path whose last part is such a name counts.
        key: the config key that named it, for the message.

    Raises:
        InputError: nothing of the kind, or an architecture that is not counted here.
    """
    path = Path(model)
    if is_on_hub(path):
        return from_config(_hub_config(path, key), name=str(path).removeprefix(HUB_PREFIX), key=key)
    if (path / "config.json").is_file():
        return from_config(json.loads((path / "config.json").read_text()), name=path.name, key=key)
    name = path.name.lower()
    if name in KNOWN:
        return KNOWN[name]
    near = difflib.get_close_matches(name, KNOWN, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Known by name: {', '.join(KNOWN)}"
    raise InputError(f"{key}: {model} is no model folder, no hf://ORG/NAME and no known name. {hint}")


def from_config(config: Mapping[str, Any], *, name: str, key: str = "model") -> ModelShape:
    """The shape that a config.json describes. Raises InputError for an architecture that transformers does not know."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        return _built(config, name=name, key=key)
    moe = kind in ("mixtral", "qwen3_moe")
    heads = int(config["num_attention_heads"])
    return ModelShape(
        name=name,
        hidden=int(config["hidden_size"]),
        intermediate=int(config["moe_intermediate_size"] if kind == "qwen3_moe" else config["intermediate_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        vocab=int(config["vocab_size"]),
        max_positions=int(config.get("max_position_embeddings") or 2048),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2" or bool(config.get("attention_bias", False)),
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        experts=int(config.get("num_local_experts") or config.get("num_experts") or 0) if moe else 0,
        experts_per_token=int(config.get("num_experts_per_tok") or 2) if moe else 0,
        head_outputs=1 if _is_classifier(config) else 0,
    )


def _built(config: Mapping[str, Any], *, name: str, key: str) -> ModelShape:
    """Of an architecture without a formula: count its parameters on the model itself, made without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {k: v for k, v in config.items() if k != "model_type"}
    try:
        known: Any = AutoConfig.for_model(str(config.get("model_type")), **sizes)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(known)
    except (ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise InputError(
            f"{key}: {name} has model_type={config.get('model_type')!r}, which cannot be planned: {reason}. "
            "Name a model of about the same shape instead"
        ) from None
    heads = int(known.num_attention_heads)
    wide = getattr(known, "intermediate_size", None) or getattr(known, "ffn_dim", None) or 4 * known.hidden_size
    return ModelShape(
        name=name,
        hidden=int(known.hidden_size),
        intermediate=int(wide),
        layers=int(known.num_hidden_layers),
        heads=heads,
        kv_heads=int(getattr(known, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(known, "head_dim", None) or known.hidden_size // heads),
        vocab=int(known.vocab_size),
        max_positions=int(getattr(known, "max_position_embeddings", None) or 2048),
        tied=bool(known.tie_word_embeddings),
        head_outputs=1 if _is_classifier(config) else 0,
        counted=sum(parameter.numel() for parameter in model.parameters()),
    )


def _is_classifier(config: Mapping[str, Any]) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ())


def _hub_config(path: Path, key: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = str(path).removeprefix(HUB_PREFIX).partition("@")
    name = name.lstrip("/")
    try:
        found: dict[str, Any] = json.loads(
            Path(hf_hub_download(name, "config.json", revision=revision or None)).read_text()
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{key}: cannot fetch config.json of {name} from the Hugging Face hub: {reason}") from None
    return found
