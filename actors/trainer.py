"""Ray Train around one training task: workers, DeepSpeed, checkpoints, progress.

A task says what to train on and what the loss is; it knows nothing of Ray, ranks' processes or DeepSpeed. The
driver makes the task, every worker gets a copy.
"""

from __future__ import annotations

import os
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
from rayllm.checkpoints import CheckpointError, Checkpoints, Files, read_state
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


def fit(
    task: TrainTask,
    run_dir: Path,
    on_event: Callable[[StepEvent], None],
    *,
    stop: Callable[[], bool],
    selector: dict[str, str] | None = None,
) -> None:
    """Train ``task`` on Ray Train workers until it is done, resuming from ``run_dir/checkpoints``.

    When workers die the group starts again from the newest whole checkpoint, ``workers.max_failures`` times.

    Args:
        task: see `TrainTask`.
        run_dir: storage shared by driver and workers.
        on_event: called in the driver for every logged step and every checkpoint.
        stop: asked again and again; once it says yes, the workers finish their step, save and end without a model.
        selector: labels of the nodes that the workers go to.

    Raises:
        RuntimeError: the workers failed more than ``workers.max_failures`` times; the cause is in the text.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # else every report waits up to 2 s
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    workers = task.config.workers
    mailbox = start_progress_actor()
    # Which checkpoints there are is told by their manifests; Ray's own list of them would be of an earlier attempt.
    (run_dir / "checkpoints" / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
    environment = {"env_vars": worker_env(workers.gpus_per_worker)}
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"task": task, "mailbox": mailbox, "run_dir": str(run_dir.absolute())},
        torch_config=TorchConfig(backend=backend(workers.gpus_per_worker)),
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers,
            use_gpu=workers.gpus_per_worker > 0,
            resources_per_worker=_resources(task.config),
            label_selector=selector or None,  # type: ignore[call-arg]  # the stub is that of Train V1
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=str(run_dir.absolute()),
            failure_config=FailureConfig(max_failures=workers.max_failures),
            worker_runtime_env=environment,  # type: ignore[call-arg]  # the stub is that of Train V1
        ),
    )
    training = _in_thread(trainer.fit)
    began = stopping = False
    while not training.done():
        began = _drain(mailbox, on_event) or began
        if stop() and not stopping:
            if not began:  # there is nothing to save
                return
            stopping = True
            ray.get(mailbox.stop.remote())
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


def _drain(mailbox: Any, on_event: Callable[[StepEvent], None]) -> bool:
    events: list[StepEvent] = ray.get(mailbox.drain.remote())
    for event in events:
        on_event(event)
    return bool(events)


def _train_worker(settings: dict[str, Any]) -> None:
    """One rank, from start or checkpoint to the last step."""
    import ray.train

    if os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    task: TrainTask = settings["task"]
    rank = ray.train.get_context().get_world_rank()
    init_distributed(backend(task.config.workers.gpus_per_worker))
    engine = Engine(task.build(), task.config.optimizer, task.config.learner)
    task.prepare(engine, Path(settings["run_dir"]))
    mailbox = settings["mailbox"] if rank == 0 else None
    loop = _Loop(task, engine, Path(settings["run_dir"]) / "checkpoints", mailbox)
    first = loop.resume()
    if first is None:
        loop.evaluate(0)
    for step in range(first or 0, task.num_steps):
        stopping, done = loop.step(step), step + 1
        if done % task.config.eval_every == 0 or done == task.num_steps:
            loop.evaluate(done)
        if stopping or done % task.config.checkpoint.every_steps == 0 or done == task.num_steps:
            loop.save(done)
        if stopping:
            return
    if first == task.num_steps:
        loop.measure()  # `save` tells of it, and the attempt that did it is gone
    model_dir = Path(settings["run_dir"]) / "model"
    weights = engine.state_dict()
    engine.save_adapter(model_dir / "adapter")
    if rank == 0:
        task.save(engine.module, weights, model_dir)


class _Loop:
    """The training loop of one rank with its bookkeeping."""

    LOG_EVERY_SECONDS = 1.0

    def __init__(
        self, task: TrainTask, engine: Engine, folder: Path, mailbox: ray.actor.ActorHandle | None
    ) -> None:
        self.task, self.engine, self.mailbox = task, engine, mailbox
        checkpoint = task.config.checkpoint
        self.checkpoints = Checkpoints(folder, keep=checkpoint.keep, max_gib=checkpoint.max_gib)
        self._tokens = self._skipped = 0
        self._metrics: dict[str, float] = {}
        self._history: list[tuple[int, dict[str, float]]] = []
        self._logged_at = time.monotonic()
        self._stop_asked = _StopAsked(mailbox)

    def resume(self) -> int | None:
        """Continue from the newest checkpoint that is whole; returns the steps done, None where there is none.

        Raises:
            CheckpointError: all are damaged, or there is no room for another one.
        """
        found, problem = None, None
        if self.engine.rank == 0:
            try:
                found = self.checkpoints.newest()
                self.checkpoints.require_room(self.engine.checkpoint_bytes)
            except (CheckpointError, OSError) as error:
                problem = str(error)
        found, problem, notes = self.engine.gather((found, problem, tuple(self.checkpoints.refused)))[0]
        if problem is not None:
            raise CheckpointError(problem)
        if found is None:
            self._tell(StepEvent(-1, restarted=True))
            return None
        step, folder = found
        self.engine.load(folder)
        state = read_state(folder)
        self._skipped = state["skipped"]
        history = tuple((past, metrics) for past, metrics in state["history"])
        if notes:
            notes += (f"continues from {folder}",)
        self._tell(StepEvent(step, notes=notes, restarted=True, history=history))
        return int(step)

    def save(self, step: int) -> None:
        """A checkpoint of all ranks, reported to Ray Train; without room for it the run goes on, a few times."""
        import ray.train

        rank_zero, folder = self.engine.rank == 0, self.checkpoints.partial(step)
        problem = self._agree(lambda: self.checkpoints.prepare(step, self.engine.checkpoint_bytes), do=rank_zero)
        files: Files = {}
        if problem is None:
            problem = self._agree(lambda: files.update(self.engine.save(folder)))
        for written in self.engine.gather(files):
            files.update(written)
        faults.reach("trainer.save", folder, rank=self.engine.rank)
        state = {"step": step, "skipped": self._skipped, "history": self._history}
        if problem is None:
            problem = self._agree(lambda: self.checkpoints.commit(step, files, state), do=rank_zero)
        if problem is not None:
            self._tell(StepEvent(step, notes=(self.checkpoints.failed(step, problem),)))
            return
        self._history, self.checkpoints.missed = [], 0
        self._tell(StepEvent(step, saved=True))
        checkpoint = ray.train.Checkpoint.from_directory(self.checkpoints.at(step)) if rank_zero else None
        ray.train.report(
            {"step": step, **self._metrics},
            checkpoint=checkpoint,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
        )

    def _agree(self, work: Callable[[], object], *, do: bool = True) -> str | None:
        """Do the work where ``do``; every rank learns of the first problem that one of them has with the disk."""
        problem = None
        if do:
            try:
                work()
            except OSError as error:
                problem = f"rank {self.engine.rank}: {error}"
        return next((found for found in self.engine.gather(problem) if found is not None), None)

    def step(self, step: int) -> bool:
        """One optimizer step; returns whether the job should end."""
        config, engine = self.task.config, self.engine
        faults.reach("trainer.step", rank=engine.rank)
        micro_batches = self.task.micro_batches(step, engine.rank, engine.world_size)
        self.task.begin_step(engine, micro_batches)
        learning_rate = config.optimizer.learning_rate_at(step, self.task.num_steps)
        stats = engine.update(micro_batches, lambda batch: self.task.loss(engine, batch), learning_rate=learning_rate)
        self._skipped += stats.skipped
        self._tokens += sum(self.task.num_tokens(batch) for batch in micro_batches)
        sums = torch.tensor([stats.loss, self._tokens, self._stop_asked()], dtype=torch.float64)
        loss, tokens, stopping = engine.sum_tensor(sums).tolist()
        more = self.task.step_metrics(engine)
        seconds = time.monotonic() - self._logged_at
        if seconds > self.LOG_EVERY_SECONDS or step + 1 == self.task.num_steps:
            metrics = {
                "train/lr": stats.learning_rate,
                "perf/tokens_per_second": tokens / seconds,
            }
            if self._skipped:
                metrics["train/skipped_steps"] = float(self._skipped)
            if not stats.skipped:
                metrics |= {"train/loss": loss, "train/grad_norm": stats.grad_norm, **more}
            self.log(step + 1, metrics)
        if seconds > self.LOG_EVERY_SECONDS:
            self._tokens, self._logged_at = 0, time.monotonic()
        return stopping > 0

    def evaluate(self, step: int) -> None:
        began = time.monotonic()
        self.log(step, self.measure())
        self._logged_at += time.monotonic() - began

    def measure(self) -> dict[str, float]:
        self.engine.train(False)
        with torch.no_grad():
            return self.task.evaluate(self.engine)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._metrics.update(metrics)
        self._history.append((step, metrics))
        self._tell(StepEvent(step, metrics))

    def _tell(self, event: StepEvent) -> None:
        if self.mailbox is not None:
            self.mailbox.push.remote(event)


class _StopAsked:
    """Whether the driver wants the workers to stop; asking never waits for the answer."""

    def __init__(self, mailbox: ray.actor.ActorHandle | None) -> None:
        self._mailbox = mailbox
        self._answer: Any = None if mailbox is None else mailbox.stopping.remote()

    def __call__(self) -> bool:
        if self._mailbox is None or not ray.wait([self._answer], timeout=0)[0]:
            return False
        answer: bool = ray.get(self._answer)
        self._answer = self._mailbox.stopping.remote()
        return answer
