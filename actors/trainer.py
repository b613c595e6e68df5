"""Ray Train around one training task: workers, DeepSpeed, checkpoints, progress.

A task says what to train on and what the loss is; it knows nothing of Ray, ranks' processes or DeepSpeed. The
driver makes the task, every worker gets a copy.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, Protocol

import ray
import torch

from actors.environment import backend, worker_env
from actors.progress import StepEvent, start_progress_actor
from rayllm import faults
from rayllm.config.common import TrainConfig
from rayllm.models.engine import Engine, init_distributed

POLL_SECONDS = 0.2


class TrainTask(Protocol):
    """What `fit` trains. Methods run in the workers."""

    config: TrainConfig
    num_steps: int

    def build(self) -> torch.nn.Module:
        """The module with its start weights; the same on every rank."""

    def prepare(self, engine: Engine, run_dir: Path) -> None:
        """What needs the start weights, before a checkpoint is loaded; every rank calls it at every start."""
        return None

    def micro_batches(self, step: int, rank: int, world_size: int) -> Sequence[Any]:
        """This rank's part of the step's batch; every rank gets the same number of micro-batches."""

    def begin_step(self, engine: Engine, micro_batches: Sequence[Any]) -> None:
        """What the losses of the step need of its whole batch; every rank calls it before the first loss."""
        return None

    def loss(self, engine: Engine, micro_batch: Any) -> torch.Tensor:
        """Part of the global batch's loss: the parts of all micro-batches and ranks sum to it."""

    def num_tokens(self, micro_batch: Any) -> int:
        """Tokens in the micro-batch, for throughput."""

    def step_metrics(self, engine: Engine) -> dict[str, float]:
        """More to log of the step that was made; every rank calls it after every step."""
        return {}

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """Held-out metrics; every rank calls it and gets the same numbers."""

    def save(self, module: torch.nn.Module, state_dict: Mapping[str, torch.Tensor], folder: Path) -> None:
        """Write the model folder (rank 0)."""


def fit(task: TrainTask, run_dir: Path, on_event: Callable[[StepEvent], None]) -> None:
    """Train ``task`` on Ray Train workers until it is done, resuming from ``run_dir/checkpoints``.

    Args:
        task: see `TrainTask`.
        run_dir: storage shared by driver and workers.
        on_event: called in the driver for every logged step.

    Raises:
        RuntimeError: the workers failed more than ``workers.max_failures`` times; the cause is in the text.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # else every report waits up to 2 s
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    workers = task.config.workers
    mailbox = start_progress_actor()
    environment = {"env_vars": worker_env(workers.gpus_per_worker)}
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"task": task, "mailbox": mailbox, "run_dir": str(run_dir.absolute())},
        torch_config=TorchConfig(backend=backend(workers.gpus_per_worker)),
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers,
            use_gpu=workers.gpus_per_worker > 0,
            resources_per_worker=_resources(task.config),
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=str(run_dir.absolute()),
            failure_config=FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=task.config.checkpoint.keep),
            worker_runtime_env=environment,  # type: ignore[call-arg]  # the stub is that of Train V1
        ),
    )
    training = _in_thread(trainer.fit)
    while not training.done():
        _drain(mailbox, on_event)
        wait([training], timeout=POLL_SECONDS)
    _drain(mailbox, on_event)
    try:
        training.result()
    except Exception as error:  # Ray Train's own types wrap the worker's error; its text is what helps
        raise RuntimeError(f"training failed: {_root_cause(error)}") from error
    ray.kill(mailbox)


def _resources(config: TrainConfig) -> dict[str, float]:
    resources = {"CPU": config.workers.cpus_per_worker}
    if config.workers.gpus_per_worker:
        resources["GPU"] = config.workers.gpus_per_worker
    return resources


def _root_cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, cause = sorted(failures.items())[0]
        return f"rank {rank}: {_root_cause(cause)}"
    cause = getattr(error, "cause", None) or error.__cause__
    return _root_cause(cause) if isinstance(cause, BaseException) else f"{type(error).__name__}: {error}"


def _in_thread(call: Callable[[], object]) -> Future:
    """Ray Train takes Ctrl-C over when it runs in the main thread, and then ends the process with status 1."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _drain(mailbox: Any, on_event: Callable[[StepEvent], None]) -> None:
    events: list[StepEvent] = ray.get(mailbox.drain.remote())
    for event in events:
        on_event(event)


def _train_worker(settings: dict[str, Any]) -> None:
    """One rank, from start or checkpoint to the last step."""
    import ray.train

    if os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    task: TrainTask = settings["task"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    init_distributed(backend(task.config.workers.gpus_per_worker))
    engine = Engine(task.build(), task.config.optimizer, task.config.learner)
    task.prepare(engine, Path(settings["run_dir"]))
    checkpoint = ray.train.get_checkpoint()
    first = 0
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            first = int(engine.load(Path(folder))["step"])
    loop = _Loop(task, engine, settings["mailbox"] if rank == 0 else None, rank, world_size)
    loop.push(first, {}, restarted=True)
    if first in (0, task.num_steps):
        loop.evaluate(first)
    for step in range(first, task.num_steps):
        loop.step(step)
        if (step + 1) % task.config.eval_every == 0 or step + 1 == task.num_steps:
            loop.evaluate(step + 1)
        if (step + 1) % task.config.checkpoint.every_steps == 0 or step + 1 == task.num_steps:
            _save_checkpoint(engine, step + 1)
    model_dir = Path(settings["run_dir"]) / "model"
    weights = engine.state_dict()
    engine.save_adapter(model_dir / "adapter")
    if rank == 0:
        task.save(engine.module, weights, model_dir)


def _save_checkpoint(engine: Engine, step: int) -> None:
    import ray.train

    with tempfile.TemporaryDirectory() as folder:
        engine.save(Path(folder), {"step": step})
        faults.reach("trainer.save", Path(folder), rank=engine.rank)
        ray.train.report(
            {"step": step},
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"step-{step:06d}",
        )


class _Loop:
    """The training loop of one rank with its bookkeeping."""

    LOG_EVERY_SECONDS = 1.0

    def __init__(
        self,
        task: TrainTask,
        engine: Engine,
        mailbox: ray.actor.ActorHandle | None,
        rank: int,
        world_size: int,
    ) -> None:
        self.task, self.engine, self.mailbox = task, engine, mailbox
        self.rank, self.world_size = rank, world_size
        self._tokens = self._skipped = 0
        self._logged_at = time.monotonic()

    def step(self, step: int) -> None:
        faults.reach("trainer.step", rank=self.rank)
        config = self.task.config
        micro_batches = self.task.micro_batches(step, self.rank, self.world_size)
        self.task.begin_step(self.engine, micro_batches)
        learning_rate = config.optimizer.learning_rate_at(step, self.task.num_steps)
        stats = self.engine.update(
            micro_batches, lambda batch: self.task.loss(self.engine, batch), learning_rate=learning_rate
        )
        self._skipped += stats.skipped
        self._tokens += sum(self.task.num_tokens(batch) for batch in micro_batches)
        loss, tokens = self.engine.sum_tensor(torch.tensor([stats.loss, self._tokens], dtype=torch.float64)).tolist()
        more = self.task.step_metrics(self.engine)
        seconds = time.monotonic() - self._logged_at
        if self.mailbox is not None and (seconds > self.LOG_EVERY_SECONDS or step + 1 == self.task.num_steps):
            metrics = {
                "train/lr": stats.learning_rate,
                "perf/tokens_per_second": tokens / seconds,
            }
            if self._skipped:
                metrics["train/skipped_steps"] = float(self._skipped)
            if not stats.skipped:
                metrics |= {"train/loss": loss, "train/grad_norm": stats.grad_norm, **more}
            self.push(step + 1, metrics)
        if seconds > self.LOG_EVERY_SECONDS:
            self._tokens, self._logged_at = 0, time.monotonic()

    def evaluate(self, step: int) -> None:
        began = time.monotonic()
        self.engine.train(False)
        with torch.no_grad():
            metrics = self.task.evaluate(self.engine)
        self.push(step, metrics)
        self._logged_at += time.monotonic() - began

    def push(self, step: int, metrics: dict[str, float], *, restarted: bool = False) -> None:
        if self.mailbox is not None:
            self.mailbox.push.remote(StepEvent(step, metrics, restarted))
