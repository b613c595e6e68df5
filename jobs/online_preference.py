"""Iterative DPO (or another kind): `label` and `preference` in turns, each round on the newest model's own answers.

The rounds lie below run_dir as run folders of the two jobs; what is done and unchanged is skipped, so the same command
continues a run that was stopped. Source: Xiong et al. 2023, https://arxiv.org/abs/2312.11456.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape

from jobs import label, preference
from jobs.session import ray_session
from rayllm.config.base import Loaded
from rayllm.config.online_preference import OnlinePreferenceConfig
from rayllm.report.terminal import shown_path


def run(loaded: Loaded[OnlinePreferenceConfig], console: Console, *, verbose: bool = False) -> None:
    """The `online-preference` job."""
    config, model = loaded.config, loaded.config.model
    with ray_session(config.run_dir / "logs", verbose=verbose):
        for number in range(1, config.num_rounds + 1):
            label_config, preference_config = config.round(number, model)
            for job, name, section in ((label, "label", label_config), (preference, "preference", preference_config)):
                console.print(f"[bold]round {number} of {config.num_rounds}: {name}[/bold]", highlight=False)
                done = job.run(_section(loaded, name, section), console, verbose=verbose)
                if done.done:
                    console.print("[dim]✓ unchanged, skipped[/dim]", highlight=False)
            model = preference_config.run_dir / "model"
    console.print(f"[green]✓[/green] model in {escape(shown_path(model))}", highlight=False, soft_wrap=True)


def _section(loaded: Loaded[OnlinePreferenceConfig], name: str, config: Any) -> Loaded[Any]:
    """A round's config with the origins of its keys."""
    prefix = f"{name}."
    given = {key.removeprefix(prefix): origin for key, origin in loaded.origins.items() if key.startswith(prefix)}
    return Loaded(config, {key: "round" for key in ("run_dir", "seed", "overwrite")} | given)


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("online-preference")
