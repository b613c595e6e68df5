"""DeepSpeed around one model: the only file that touches it.

Losses are normalised by the caller over the *global* batch (all ranks, all micro-batches), so gradients are sums:
micro-batch size, number of ranks and padding do not change them. DeepSpeed averages over ranks; the factor
world_size below undoes that.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rayllm.config.common import LearnerConfig, OptimizerConfig
from rayllm.models.loading import DTYPES

Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """One optimizer step."""

    loss: float
    """Sum of the micro-batches' losses on this rank; the sum over ranks is the loss of the global batch."""

    grad_norm: float
    """Global norm before clipping."""

    learning_rate: float


def init_distributed(backend: str) -> None:
    """Let DeepSpeed use the process group of this process (made from RANK, WORLD_SIZE, MASTER_* if there is none).

    On CPU, DeepSpeed would compile a shared-memory kernel here (a minute, and every later start hangs if that
    compilation is killed); it serves inference only, so it is switched off.
    """
    if backend == "gloo":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if backend == "gloo":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


class Engine:
    """A module under training: forward, backward over micro-batches, optimizer step, checkpoints, full weights."""

    def __init__(self, module: torch.nn.Module, optimizer: OptimizerConfig, learner: LearnerConfig) -> None:
        """Wrap ``module``; call `init_distributed` first."""
        import deepspeed

        if learner.gradient_checkpointing:
            module.gradient_checkpointing_enable()  # type: ignore[operator]
        self._learner = learner
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=torch.optim.AdamW(
                _parameter_groups(module, optimizer.weight_decay),
                lr=optimizer.learning_rate,
                betas=(optimizer.beta1, optimizer.beta2),
            ),
            config=_deepspeed_config(learner, optimizer),
        )
        self.world_size = dist.get_world_size()
        self.rank = dist.get_rank()

    @property
    def device(self) -> torch.device:
        return self._engine.device

    @property
    def module(self) -> Any:
        return self._engine.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    def update(
        self, micro_batches: Sequence[Batch], loss_fn: Callable[[Batch], torch.Tensor], *, learning_rate: float
    ) -> UpdateStats:
        """One optimizer step over all micro-batches.

        Raises:
            RuntimeError: the loss or the gradient norm is not finite. The weights are then unchanged where
                DeepSpeed skips such steps (ZeRO 1 to 3); the run must not go on in any case.
        """
        self._engine.train()
        total = 0.0
        for index, micro_batch in enumerate(micro_batches):
            self._engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            loss = loss_fn(micro_batch)
            total += loss.item()
            self._engine.backward(loss * self.world_size)
        if not math.isfinite(self.sum_over_ranks(total)):
            raise RuntimeError(f"the loss is {total} on rank {self.rank}: stopped before the weights change")
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        grad_norm = self._plain_grad_norm() if self._learner.zero_stage == 0 else None
        self._engine.step()
        if grad_norm is None:
            grad_norm = _finite(float(self._engine.get_global_grad_norm()))
        return UpdateStats(total, grad_norm, learning_rate)

    def _plain_grad_norm(self) -> float:
        """Without ZeRO, DeepSpeed applies a gradient that is not finite and reports no norm: look before the step."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return _finite(float(torch.nn.utils.get_total_norm(gradients)))

    def sum_over_ranks(self, value: float) -> float:
        """Sum of a number over all ranks; every rank must call it."""
        return float(self.sum_tensor(torch.tensor([value], dtype=torch.float64))[0])

    def sum_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a small tensor over all ranks."""
        if self.world_size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight in full, one at a time, under its checkpoint name; tied weights once.

        With ZeRO-3 each is gathered from all ranks, so every rank must iterate to the end.
        """
        for name, parameter in self.module.named_parameters():
            if self._learner.zero_stage < 3:
                yield name, parameter.detach()
                continue
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.detach().clone()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Full weights on the CPU; every rank must call it."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self.named_tensors()}

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Write weights, optimizer and ``state`` (JSON) so that `load` continues exactly; every rank must call it."""
        folder.mkdir(parents=True, exist_ok=True)
        self._engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False, exclude_frozen_parameters=False)
        if self.rank == 0:
            (folder / "state.json").write_text(json.dumps({**state, "world_size": self.world_size}))

    def load(self, folder: Path) -> dict[str, Any]:
        """Read what `save` wrote; return its ``state``.

        Raises:
            RuntimeError: no complete checkpoint there, or one of another number of ranks.
        """
        try:
            state = json.loads((folder / "state.json").read_text())
        except OSError as error:
            raise RuntimeError(f"no complete checkpoint in {folder}: {error}") from None
        if state.pop("world_size") != self.world_size:
            raise RuntimeError(
                f"the checkpoint in {folder} is of another number of ranks than {self.world_size}; "
                "set the number of workers back, or start over with overwrite=true"
            )
        path, _ = self._engine.load_checkpoint(str(folder), tag="deepspeed")
        if path is None:  # DeepSpeed's way to say that it found nothing
            raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}")
        return state


def _finite(grad_norm: float) -> float:
    if not math.isfinite(grad_norm):
        raise RuntimeError(f"the gradient norm is {grad_norm}: stopped")
    return grad_norm


def _parameter_groups(module: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() >= 2 and min(p.shape) > 1]
    chosen = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in chosen]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _deepspeed_config(learner: LearnerConfig, optimizer: OptimizerConfig) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # only for DeepSpeed's own counters: we normalise losses ourselves
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.max_grad_norm,
        "bf16": {"enabled": DTYPES[learner.dtype] is torch.bfloat16},
        "zero_optimization": {"stage": learner.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
