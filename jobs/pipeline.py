"""Every stage in order, from raw text to the evaluated, aligned model; then the report.

A stage whose settings, inputs and versions are those of its last finished run is skipped. The first failure stops
the pipeline; the same command continues there.
"""

from __future__ import annotations

import importlib
import time
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from rich.markup import escape

from jobs.session import ray_session
from rayllm.config.base import Loaded
from rayllm.config.pipeline import WIRING, PipelineConfig
from rayllm.report.html import write_report
from rayllm.report.run import Run
from rayllm.report.terminal import shown_path
from rayllm.storage import StoredRun

NEEDS_RAY = ("pretrain", "sft", "label", "reward_model", "ppo", "evaluate")


def section(loaded: Loaded[PipelineConfig], stage: str) -> Loaded[Any]:
    """A stage's own config, with the origins of its keys; what the pipeline filled in says so."""
    config = getattr(loaded.config, stage)
    prefix = f"{stage}."
    given = {k.removeprefix(prefix): v for k, v in loaded.origins.items() if k.startswith(prefix)}
    return Loaded(config, {key: "pipeline" for key in ("run_dir", "seed", "overwrite")} | given)


def is_done(stage: str, loaded: Loaded[PipelineConfig]) -> bool:
    """Whether the stage's folder holds a finished run with these settings and inputs."""
    return Run.is_done(stage, section(loaded, stage))


def run(loaded: Loaded[PipelineConfig], console: Console, *, verbose: bool = False) -> None:
    """The `pipeline` job."""
    config = loaded.config
    began = time.monotonic()
    skipped: list[str] = []
    if config.storage_path is not None:
        for stage in WIRING:
            StoredRun(f"{config.storage_path}/{stage}", config.run_dir / stage).pull()
    with ExitStack() as stack:
        for number, stage in enumerate(config.stages, start=1):
            if stage in NEEDS_RAY and not is_done(stage, loaded):
                stack.enter_context(ray_session(config.run_dir / "logs", verbose=verbose))  # one for all stages
            job = importlib.import_module(f"jobs.{stage}").run(section(loaded, stage), console, verbose=verbose)
            if job.done:
                skipped.append(stage)
                place = f"{number}/{len(config.stages)} {stage}"
                console.print(f"[dim]✓ {place}: unchanged, skipped[/dim]", highlight=False)
    page, _ = write_report(config.run_dir)
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    console.rule(style="dim")
    console.print(
        f"[green]✓[/green] [bold]pipeline[/bold] {minutes} min {seconds} s"
        + (f", skipped {len(skipped)} of {len(config.stages)} stages that were done and unchanged" if skipped else ""),
        highlight=False,
    )
    console.print(f"  report   {escape(shown_path(page))}", highlight=False, soft_wrap=True)
    model = config.ppo.run_dir / "model"
    if not model.is_dir():
        return
    console.print(f"  serve    rayllm serve model={escape(shown_path(model))}", highlight=False, soft_wrap=True)
    console.print("  chat     rayllm chat        (in a second terminal)", highlight=False)


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("pipeline")
