"""What the Ray Train jobs share: from a task to a finished run."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape

from actors.group import Role
from actors.placement import reserve
from actors.progress import StepEvent
from actors.trainer import TrainTask, fit
from jobs import stopping
from jobs.session import cluster_lives, ray_session
from rayllm.config.common import TrainConfig
from rayllm.models.folders import count_stored_parameters
from rayllm.report.run import Run
from rayllm.report.terminal import Progress, print_done


def train(run: Run, task: TrainTask, console: Console, *, verbose: bool) -> None:
    """Train on Ray, log every event, finish the run with the last held-out metrics."""
    final: dict[str, float] = {}

    def on_event(event: StepEvent) -> None:
        for note in event.notes:
            run.note(note)
            console.print(f"[yellow]{escape(note)}[/yellow]", highlight=False, soft_wrap=True)
        if event.restarted:
            run.rewind(event.step, event.history)
            for _, metrics in event.history:
                final.update(metrics)
        if event.saved:
            run.store_checkpoint(event.step, keep=task.config.checkpoint.keep)
        if not event.metrics:
            return
        run.log(event.step, event.metrics)
        progress.update(event.step, event.metrics)
        final.update(event.metrics)

    for refused in run.fetch_checkpoint():
        on_event(StepEvent(0, notes=(refused,)))
    config = task.config.workers
    workers = Role("workers", config.num_workers, config.cpus_per_worker, config.gpus_per_worker)
    with ray_session(run.logs_dir, verbose=verbose):
        with reserve([workers], task.config.placement, console.print) as held:
            selector = held.seats(workers).selector
        with Progress(console, run.stage, task.num_steps) as progress:
            progress.status("starting workers")
            with stopping.held():  # the workers are in a placement group of Ray Train's own
                fit(task, run.dir, on_event, stop=_stop_asked, selector=selector)
    run.finish(headline(final), model_parameters=count_stored_parameters(run.model_dir))
    print_done(console, run, headline(final))


def _stop_asked() -> bool:
    """Raises KeyboardInterrupt if there are no workers left to ask."""
    if stopping.asked() and not cluster_lives():
        raise KeyboardInterrupt
    return stopping.asked()


def headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """The figures of a finished run: the last loss and what was measured on held-out data."""
    return {name: value for name, value in metrics.items() if name == "train/loss" or name.startswith("eval/")}


def placement(config: TrainConfig) -> list[tuple[str, str]]:
    """Ranks, devices and ZeRO stage, for the block before the first step."""
    workers, learner = config.workers, config.learner
    device = f"{workers.gpus_per_worker:g} GPU" if workers.gpus_per_worker else f"{workers.cpus_per_worker:g} CPU"
    return [("workers", f"{workers.num_workers} x {device}, ZeRO-{learner.zero_stage}, {learner.dtype}")]
