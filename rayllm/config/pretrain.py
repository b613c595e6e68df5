"""Config of the `pretrain` job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from rayllm.config.base import Config
from rayllm.config.common import TrainConfig


class ArchitectureConfig(Config):
    """The decoder to create."""

    architecture: str = "qwen3"
    """transformers model type: qwen3, llama, ..."""

    hidden_size: int = Field(128, ge=8)
    """Width of the residual stream."""

    intermediate_size: int = Field(384, ge=8)
    """Width of the MLP."""

    num_hidden_layers: int = Field(3, ge=1)
    """Decoder layers."""

    num_attention_heads: int = Field(4, ge=1)
    """Query heads."""

    num_key_value_heads: int = Field(2, ge=1)
    """Key and value heads; must divide num_attention_heads."""

    head_dim: int = Field(32, ge=8)
    """Size of a head. vLLM on CPU takes 32, 64, 80, 96, 112, 128, 192 and 256."""

    max_position_embeddings: int = Field(512, ge=16)
    """Longest sequence, in tokens."""

    tie_word_embeddings: bool = True
    """Use the input embeddings as output weights."""

    extra: dict[str, Any] = {}
    """Further fields of the architecture's own config, by their transformers names."""

    def shape(self) -> dict[str, Any]:
        return {**self.model_dump(exclude={"architecture", "extra"}), **self.extra}


class PretrainConfig(TrainConfig):
    documents: Path
    """Text to train on: a Parquet or JSONL file with a `text` column, one document a row."""

    heldout: Path
    """Text for bits per byte, same format, not in `documents`."""

    tokenizer: Path
    """Folder with the tokenizer (the `model` folder of a tokenizer run, or any Hugging Face one)."""

    num_steps: int = Field(600, ge=1)
    """Optimizer steps."""

    sequence_length: int = Field(128, ge=8)
    """Tokens per row; documents are packed end to end."""

    model: ArchitectureConfig = ArchitectureConfig()

    @model_validator(mode="after")
    def _trains_all(self) -> PretrainConfig:
        rank, layers = self.learner.lora.rank, self.learner.trainable_layers
        if rank is not None or layers is not None:
            raise ValueError(
                f"learner.lora.rank={rank}, learner.trainable_layers={layers}: "
                "pretraining starts from random weights and trains them all; set both to null"
            )
        return self
