"""Config of the `online-preference` job: the sections of the two jobs that it repeats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from rayllm.config.base import Config, merge
from rayllm.config.label import LabelConfig
from rayllm.config.preference import PreferenceConfig


class OnlinePreferenceConfig(Config):
    run_dir: Path
    """Folder of the whole run: round-1/label, round-1/preference, round-2/label, ..."""

    model: Path
    """Model folder to start from: the SFT model."""

    num_rounds: int = Field(3, ge=1)
    """Rounds. In each, the last round's model answers, and learns from the ranking of its own answers; it is the
    round's reference too."""

    seed: int = Field(0, ge=0)
    """Seed of the first round; every further round has the next one, so that no answer is sampled twice alike."""

    label: LabelConfig
    """How answers are sampled and ranked, and by whom."""

    preference: PreferenceConfig
    """How the model learns from the rankings; a part of their prompts is set aside for the held-out figures."""

    @model_validator(mode="before")
    @classmethod
    def _wire(cls, tree: Any) -> Any:
        """Fill in what the stages take from each other, as the first round has it."""
        if not isinstance(tree, dict) or not {"run_dir", "model"} <= tree.keys():
            return tree
        wired = dict(tree)
        usual = _wiring(Path(tree["run_dir"]), 1, Path(tree["model"]), tree.get("seed", 0))
        for stage, inputs in usual.items():
            given = tree.get(stage) or {}
            wired[stage] = merge({**inputs, "overwrite": True}, given) if isinstance(given, dict) else given
        return wired

    def round(self, number: int, model: Path) -> tuple[LabelConfig, PreferenceConfig]:
        """The configs of a round, counted from 1, that starts from ``model``."""
        wiring = _wiring(self.run_dir, number, model, self.seed)
        return (
            self.label.model_copy(update=wiring["label"]),
            self.preference.model_copy(update=wiring["preference"]),
        )


def _wiring(run_dir: Path, number: int, model: Path, seed: int) -> dict[str, dict[str, Any]]:
    folder = run_dir / f"round-{number}"
    label, seed = folder / "label", seed + number - 1
    return {
        "label": {"run_dir": label, "model": model, "seed": seed},
        "preference": {
            "run_dir": folder / "preference",
            "model": model,
            "preferences": label / "rankings.parquet",
            "seed": seed,
        },
    }
