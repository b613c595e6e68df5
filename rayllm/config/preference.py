"""Config of the `preference` job."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from rayllm.config.common import OptimizerConfig, TrainConfig
from rayllm.config.data import DataPaths


class PreferenceConfig(TrainConfig):
    model: Path
    """Model folder to start from: the SFT model. It is the reference too, for the kinds that have one."""

    preferences: DataPaths
    """Rankings as the label job writes them, preference pairs, Anthropic HH strings or scored completions, for kto also
    single judgements; JSONL, JSON, CSV, Parquet, Arrow, a folder, hf://datasets/ORG/NAME; or a list of
    {path, weight}."""

    heldout_preferences: DataPaths | None = None
    """The same for the held-out loss and accuracy; rows of prompts that stand in `preferences` are left out. Null sets
    a part of `preferences` aside."""

    heldout_fraction: float = Field(0.1, gt=0, lt=0.5)
    """Share of the prompts of `preferences` that are set aside where heldout_preferences is null."""

    kind: Literal["dpo", "robust", "ipo", "hinge", "kto", "orpo", "simpo"] = "dpo"
    """The loss. `kto` learns from single responses that are wanted or not; `orpo` and `simpo` have no reference."""

    pairs: Literal["all", "best_worst"] = "all"
    """Which pairs of a ranking are compared: every better response with every worse one, or the best with the worst.
    Kto always takes the best as wanted and the worst as unwanted."""

    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the reference: smaller values let the model move further. For simpo the scale of the
    reward (2 to 2.5 in its paper), for orpo the weight of the odds ratio beside the SFT loss."""

    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Probability that a label is wrong: conservative DPO with `dpo`, or its unbiased form with `robust`."""

    target_margin: float = Field(0.0, ge=0)
    """By how much the chosen response's reward should exceed the rejected one's; simpo only (0.5 to 1.6 in its
    paper)."""

    desirable_weight: float = Field(1.0, gt=0)
    """Weight of wanted responses; kto only."""

    undesirable_weight: float = Field(1.0, gt=0)
    """Weight of unwanted responses; kto only."""

    sft_coef: float = Field(0.0, ge=0)
    """Weight of the chosen responses' SFT loss, mean over tokens, beside the preference loss; orpo's paper has 1."""

    max_length: int = Field(512, ge=8)
    """Longest prompt with response, in tokens; longer responses are dropped and counted."""

    num_epochs: float = Field(1, gt=0)
    """Passes over the preferences; batch_size counts prompts, each with all its responses, and for kto responses."""

    micro_batch_tokens: int | None = Field(None, ge=1)
    """Most tokens in one forward pass, padding included (rows x longest row); a longer prompt goes alone. When set,
    passes are cut by it and not by micro_batch_size. Changes speed and memory, nothing else."""

    batch_size: int = Field(64, ge=1)
    """Prompts (for kto: responses) per optimizer step, over all workers. Must be a multiple of workers.num_workers."""

    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-6, schedule="linear", final_ratio=0.0, warmup_steps=10, weight_decay=0.0
    )

    @model_validator(mode="after")
    def _numbers_fit_kind(self) -> PreferenceConfig:
        """A number that the loss would not use is a mistake."""
        owners = {
            "label_smoothing": (("dpo", "robust"), 0.0),
            "target_margin": (("simpo",), 0.0),
            "desirable_weight": (("kto",), 1.0),
            "undesirable_weight": (("kto",), 1.0),
        }
        for key, (kinds, neutral) in owners.items():
            if getattr(self, key) != neutral and self.kind not in kinds:
                raise ValueError(
                    f"{key}={getattr(self, key)} has no effect with kind={self.kind}; "
                    f"set kind={' or '.join(kinds)}, or {key}={neutral:g}"
                )
        if self.kind == "orpo" and not self.sft_coef:
            raise ValueError("kind=orpo needs sft_coef > 0: its odds ratio only corrects the SFT loss; set sft_coef=1")
        if self.kind == "kto" and self.sft_coef:
            raise ValueError(f"sft_coef={self.sft_coef} needs pairs, and kind=kto has none; set sft_coef=0")
        return self
