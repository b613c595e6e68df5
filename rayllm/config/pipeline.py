"""Config of the `pipeline` job: every stage's own config, wired together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from rayllm.config.base import Config, merge
from rayllm.config.common import PlacementConfig
from rayllm.config.evaluate import EvaluateConfig
from rayllm.config.label import LabelConfig
from rayllm.config.ppo import PPOConfig
from rayllm.config.pretrain import PretrainConfig
from rayllm.config.reward_model import RewardModelConfig
from rayllm.config.sft import SftConfig
from rayllm.config.tokenizer import TokenizerConfig
from rayllm.config.world import WorldConfig

WIRING: dict[str, dict[str, Any]] = {
    "world": {},
    "tokenizer": {"documents": "world/documents.parquet"},
    "pretrain": {
        "documents": "world/documents.parquet",
        "heldout": "world/heldout_documents.parquet",
        "tokenizer": "tokenizer/model",
    },
    "sft": {"model": "pretrain/model", "data": "world/demonstrations.parquet"},
    "label": {
        "model": "sft/model",
        "prompts": "world/prompts_train.parquet",
        "heldout_prompts": "world/prompts_label.parquet",
    },
    "reward_model": {
        "model": "sft/model",
        "rankings": "label/rankings.parquet",
        "heldout_rankings": "label/heldout_rankings.parquet",
    },
    "ppo": {
        "model": "sft/model",
        "reward_model": "reward_model/model",
        "prompts": "world/prompts_train.parquet",
        "eval": {"prompts": "world/prompts_new.parquet"},
    },
    "evaluate": {
        "models": {"base": "pretrain/model", "sft": "sft/model", "ppo": "ppo/model"},
        "reward_model": "reward_model/model",
        "prompts": {"new": "world/prompts_new.parquet", "held": "world/prompts_held.parquet"},
        "heldout_documents": "world/heldout_documents.parquet",
    },
}
"""Stage -> its inputs, as paths below the pipeline's run_dir. A stage's section may name other files instead."""


class PipelineConfig(Config):
    run_dir: Path
    """Folder of the whole run; each stage gets a folder below it. What the stages take from each other, their run_dir,
    seed, placement and overwrite are filled in: a stage that was done with other settings starts over."""

    storage_path: str | None = None
    """Where a verified copy of the whole run is kept, each stage in a folder below, as `storage_path` of the stages
    says; stages that are done there need not run on this cluster."""

    seed: int = 0
    """Seed of every stage that names none."""

    placement: PlacementConfig = PlacementConfig()
    """Of every stage that names none."""

    stages: tuple[str, ...] = tuple(WIRING)
    """The stages to run, of those below; the others must be done already where they are needed."""

    retries: int = Field(1, ge=0)
    """With --address: how often a stage that failed is submitted again. It continues from its last checkpoint."""

    world: WorldConfig
    tokenizer: TokenizerConfig
    pretrain: PretrainConfig
    sft: SftConfig
    label: LabelConfig
    reward_model: RewardModelConfig
    ppo: PPOConfig
    evaluate: EvaluateConfig

    @field_validator("stages")
    @classmethod
    def _known(cls, stages: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [stage for stage in stages if stage not in WIRING]
        if unknown or not stages:
            raise ValueError(f"expected some of {', '.join(WIRING)}")
        return tuple(stage for stage in WIRING if stage in stages)

    @model_validator(mode="before")
    @classmethod
    def _wire(cls, tree: Any) -> Any:
        """Fill in what the stages take from each other."""
        if not isinstance(tree, dict) or "run_dir" not in tree:
            return tree
        root = Path(tree["run_dir"])
        wired = dict(tree)
        for stage, inputs in WIRING.items():
            given = tree.get(stage) or {}
            if not isinstance(given, dict):
                continue
            usual = {
                "run_dir": str(root / stage), "seed": tree.get("seed", 0), "overwrite": True, **_below(root, inputs)
            }
            if tree.get("storage_path"):
                usual["storage_path"] = f"{tree['storage_path']}/{stage}"
            if "placement" in cls.model_fields[stage].annotation.model_fields:  # type: ignore[union-attr]
                usual["placement"] = tree.get("placement") or {}
            if stage == "sft" and given.get("replay"):
                usual["replay"] = {"documents": str(root / "world/documents.parquet")}
            wired[stage] = merge(usual, given)
        return wired


def _below(root: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    return {key: _below(root, v) if isinstance(v, dict) else str(root / v) for key, v in inputs.items()}

