"""Config of the `world` job."""

from __future__ import annotations

from pydantic import Field

from rayllm.config.common import JobConfig


class WorldConfig(JobConfig):
    num_paragraphs: int = Field(13_000, ge=1)
    """Paragraphs of text to pretrain on (about 130 bytes each)."""

    num_heldout_paragraphs: int = Field(600, ge=1)
    """Paragraphs kept for bits per byte."""

    num_demonstrations: int = Field(6_000, ge=1)
    """Prompts with an answer written by a careless crowd, for supervised fine-tuning."""

    num_prompts: int = Field(2_400, ge=1)
    """Prompts for labelling and PPO, in the phrasings of the demonstrations."""

    num_eval_prompts: int = Field(400, ge=1)
    """Prompts of each evaluation split: "new" (phrasings never seen in training) and "held" (entities in no chat
    data)."""
