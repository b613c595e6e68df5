"""DeepSpeed around one model: the only file that touches it.

Losses are normalised by the caller over the *global* batch (all ranks, all micro-batches), so gradients are sums:
micro-batch size, number of ranks and padding do not change them. DeepSpeed averages over ranks; the factor
world_size below undoes that.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rayllm import faults
from rayllm.checkpoints import CheckpointError, Files
from rayllm.config.common import LearnerConfig, OptimizerConfig
from rayllm.models.loading import DTYPES
from rayllm.models.optimizers import adamw_arguments, build_optimizer, parameter_groups
from rayllm.models.partial import (
    HEAD,
    Adapter,
    adapters,
    adapters_off,
    checkpoint_name,
    choose_trained,
    count_trainable,
    is_adapter,
    peft_name,
    save_adapter,
)
from rayllm.models.pieces import (
    Piece,
    make_step,
    pieces_of,
    read_pieces,
    refresh_weights,
    trained_sizes,
    write_pieces,
)

Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """One optimizer step."""

    loss: float
    """Sum of the micro-batches' losses on this rank; the sum over ranks is the loss of the global batch."""

    grad_norm: float
    """Global norm before clipping."""

    learning_rate: float

    skipped: bool
    """The loss or a gradient was not finite on some rank: no rank changed weights or optimizer state."""


class TooManySkipped(RuntimeError):
    """More optimizer steps in a row than allowed were skipped."""


def init_distributed(backend: str, store: dist.Store | None = None) -> None:
    """Let DeepSpeed use the process group of this process; if there is none it is made from RANK and WORLD_SIZE, where
    the ``store`` is or, without one, at MASTER_ADDR and MASTER_PORT.

    On CPU, DeepSpeed would compile a shared-memory kernel here (a minute, and every later start hangs if that
    compilation is killed); it serves inference only, so it is switched off.
    """
    if backend == "gloo":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if backend == "gloo":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if store is not None and not dist.is_initialized():
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


class Engine:
    """A module under training: forward, backward over micro-batches, optimizer step, checkpoints, full weights."""

    def __init__(self, module: torch.nn.Module, optimizer: OptimizerConfig, learner: LearnerConfig) -> None:
        """Wrap ``module``; call `init_distributed` first.

        Raises:
            InputError: the config's part of the model to train does not exist in it.
        """
        import deepspeed

        choose_trained(module, learner)
        self.num_trained, self.num_parameters = count_trainable(module)
        if learner.gradient_checkpointing:
            module.gradient_checkpointing_enable()  # type: ignore[operator]
        self._learner = learner
        self._updates = self._skipped_in_a_row = 0
        self._out = False
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=_optimizer(module, optimizer, learner),
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

        When a loss or gradient is not finite on any rank, all ranks skip the step: weights and optimizer state stay
        as they are to the bit.

        Raises:
            TooManySkipped: more than ``learner.max_skipped_steps`` steps in a row were.
        """
        self._engine.train()
        torch.manual_seed((self._updates << 16) + self.rank)  # of dropout: a resumed run draws what another would
        self._updates += 1
        last = len(micro_batches) - 1
        total, poison = 0.0, 1.0
        for index, micro_batch in enumerate(micro_batches):
            self._engine.set_gradient_accumulation_boundary(index == last)
            loss = faults.reach("engine.loss", loss_fn(micro_batch), rank=self.rank)
            total += loss.item()
            if index == last and not math.isfinite(self.sum_over_ranks(total)):
                poison = math.nan  # a loss that is not finite can have finite gradients
            self._engine.backward(loss * (self.world_size * poison))
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        grad_norm = self._step()
        skipped = not math.isfinite(grad_norm)
        assert skipped or poison == 1.0, "the poisoned loss reached no weight"
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row > self._learner.max_skipped_steps:
            found = f"the loss is {total}" if math.isnan(poison) else f"the gradient norm is {grad_norm}"
            raise TooManySkipped(
                f"{found} on rank {self.rank}: {self._skipped_in_a_row} optimizer steps in a row were skipped "
                f"(learner.max_skipped_steps={self._learner.max_skipped_steps}); lower optimizer.learning_rate, "
                "or look for the batch that does it"
            )
        return UpdateStats(total, grad_norm, learning_rate, skipped)

    def _step(self) -> float:
        """Step, unless the global gradient norm is not finite; returns it (inf or nan: skipped)."""
        if self._learner.zero_stage == 0:  # DeepSpeed would apply such a gradient, and it reports no norm
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
            grad_norm = float(torch.linalg.vector_norm(torch.stack(norms)))
            if not math.isfinite(grad_norm):
                self._engine.optimizer.zero_grad()
                self._engine.zero_grad()
                return grad_norm
            self._engine.step()
            return grad_norm
        self._engine.step()
        if not self._engine.was_step_applied():
            return math.inf
        return float(self._engine.get_global_grad_norm())

    def offload_states(self) -> None:
        """Move optimizer state and float32 master weights to the memory of the host, until `reload_states`. The model
        computes and its weights can be read meanwhile. Not with ZeRO 0 and 3; what is offloaded for good stays so."""
        if self._out or _offloaded(self._learner):
            return
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum

        states = [OffloadStateTypeEnum.hp_params, OffloadStateTypeEnum.optim_states]
        self._engine.offload_states(include=states, pin_memory=self.device.type == "cuda")
        self._out = True

    def reload_states(self) -> None:
        """Bring back what `offload_states` moved; before a step or a `load`."""
        if self._out:
            self._engine.reload_states()
            self._out = False

    def sum_over_ranks(self, value: float) -> float:
        """Sum of a number over all ranks; every rank must call it."""
        return float(self.sum_tensor(torch.tensor([value], dtype=torch.float64))[0])

    def gather(self, value: Any) -> list[Any]:
        """A small object of every rank, in their order."""
        found = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(found, value)
        return found

    def sum_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a small tensor over all ranks."""
        if self.world_size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()

    def max_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """Largest over all ranks, element by element."""
        if self.world_size > 1:
            values = values.to(self.device)
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values.cpu()

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight in full, one at a time, under its checkpoint name; tied weights once, adapters merged.

        With ZeRO-3 each is gathered from all ranks, so every rank must iterate to the end.
        """
        added = adapters(self.module)
        for module_name, parameter in self.module.named_parameters():
            if is_adapter(module_name):
                continue
            name = checkpoint_name(module_name)
            adapter = added.get(name)
            parts = [parameter] if adapter is None else [parameter, adapter.a, adapter.b]
            with self._gathered(parts):
                whole = parameter.detach()
                if adapter is not None:
                    with torch.no_grad():
                        whole = adapter.merged(whole)
                yield name, whole.clone() if self._learner.zero_stage == 3 else whole

    def named_adapters(self) -> Iterator[tuple[str, Adapter]]:
        """Checkpoint name of every adapted weight and its adapter; with ZeRO-3 as in `named_tensors`."""
        for name, adapter in adapters(self.module).items():
            with self._gathered([adapter.a, adapter.b]):
                yield name, adapter

    def _gathered(self, parameters: list[torch.nn.Parameter]) -> AbstractContextManager[Any]:
        if self._learner.zero_stage < 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Full weights on the CPU; every rank must call it."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self.named_tensors()}

    def reference(self) -> AbstractContextManager[None]:
        """Context in which the model is the one it started from: adapters are switched off.

        Raises:
            RuntimeError: the weights themselves are trained.
        """
        if self._learner.lora.rank is None:
            raise RuntimeError("no adapters to switch off: learner.lora.rank is null, the start weights are gone")
        return adapters_off(self.module)

    def adapter_state_dict(self) -> dict[str, torch.Tensor]:
        """Adapters, and a scalar head trained with them, on the CPU under peft's names; every rank must call it."""
        tensors = {}
        for name, parameter in self.module.named_parameters():
            if is_adapter(name) or (parameter.requires_grad and f".{HEAD}." in name):
                with self._gathered([parameter]):
                    tensors[peft_name(name)] = parameter.detach().to("cpu", copy=True)
        return tensors

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter alone as a peft folder; nothing without LoRA. Every rank must call it."""
        if self._learner.lora.rank is None:
            return
        tensors = self.adapter_state_dict()
        if self.rank == 0:
            save_adapter(self.module, tensors, folder)

    @property
    def checkpoint_bytes(self) -> int:
        """Of a checkpoint, about: weights and two moments in float32."""
        return 12 * self.num_trained

    def save(self, folder: Path) -> Files:
        """Write this rank's part of weights and optimizer, so that `load` continues exactly, on any number of ranks and
        with any ZeRO stage; every rank must call it. Returns what was written."""
        pieces = self._pieces()
        if self._learner.zero_stage == 0:  # every rank has all of them
            pieces = pieces[self.rank :: self.world_size]
        facts = {"updates": str(self._updates), "skipped_in_a_row": str(self._skipped_in_a_row)}
        return write_pieces(pieces, self._inner.state, folder, rank=self.rank, facts=facts)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; every rank must call it.

        Raises:
            CheckpointError: no complete checkpoint there, or one of another model.
        """
        if self._learner.zero_stage == 3:
            self._engine.optimizer.checkpoint_event_prologue()  # small weights are kept whole beside their parts
        facts, problem = {}, None
        try:
            facts = read_pieces(
                self._pieces(), trained_sizes(self.module), self._inner.state, folder,
                make_step=partial(make_step, self._inner, self.device),
            )  # fmt: skip
        except CheckpointError as error:
            problem = str(error)
        for found in self.gather(problem):
            if found is not None:
                raise CheckpointError(found)
        self._updates, self._skipped_in_a_row = int(facts["updates"]), int(facts["skipped_in_a_row"])
        refresh_weights(self._engine.optimizer, zero_stage=self._learner.zero_stage)

    @property
    def _inner(self) -> Any:
        """The real optimizer."""
        return getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)

    def _pieces(self) -> list[Piece]:
        return pieces_of(self.module, self._engine.optimizer, zero_stage=self._learner.zero_stage, rank=self.rank)


def _optimizer(
    module: torch.nn.Module, config: OptimizerConfig, learner: LearnerConfig
) -> torch.optim.Optimizer:
    """On CUDA the fused kernels: torch's, or DeepSpeed's for the host when the state is offloaded."""
    from deepspeed.accelerator import get_accelerator

    cuda = get_accelerator().device_name() == "cuda"
    if not (cuda and _offloaded(learner)):
        return build_optimizer(module, config, fused=cuda)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    groups = parameter_groups(list(module.parameters()), config.weight_decay)
    return DeepSpeedCPUAdam(groups, adamw_mode=True, **adamw_arguments(config))


def _offloaded(learner: LearnerConfig) -> bool:
    return learner.offload_optimizer or learner.offload_parameters


def _deepspeed_config(learner: LearnerConfig, optimizer: OptimizerConfig) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": learner.zero_stage}
    if _offloaded(learner):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if learner.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # only for DeepSpeed's own counters: we normalise losses ourselves
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.max_grad_norm,
        "bf16": {"enabled": DTYPES[learner.dtype] is torch.bfloat16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # on CPU there is nothing to offload to
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
