"""Sections that several jobs share."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from rayllm.config.base import Config


class JobConfig(Config):
    run_dir: Path
    """Folder of this run: its model, metrics, logs and checkpoints. The same command again continues in it."""

    storage_path: str | None = None
    """Where a verified copy of the run folder is kept for other clusters: a folder that all of them reach, `s3://...`,
    `gs://...`. Checkpoints go there as they are made; the same command on another cluster continues from there."""

    seed: int = Field(0, ge=0)
    """Seed of everything random in this job."""

    overwrite: bool = False
    """When run_dir holds a run with other settings or inputs: move that run aside and start over, instead of
    refusing."""


class DataJobConfig(JobConfig):
    """A job that reads rows."""

    max_bad_rows: int = Field(0, ge=0)
    """Malformed rows of each input that are passed over, named in the run record; one more ends the job before
    anything starts."""


USUAL_NODE_TYPES = {
    "policy": "learner", "critic": "learner", "workers": "learner", "rollout": "rollout",
    "reference": "scorer", "reward": "scorer", "text": "scorer",
}  # fmt: skip
"""Role -> the type of its nodes in our cluster files; `workers` are those of a training job, `text` reads held-out text
in `evaluate`."""


class PlacementConfig(Config):
    wait_s: float = Field(0, ge=0)
    """Seconds that the job waits for nodes when the cluster is too small: for one whose autoscaler brings them. 0
    fails at once, need against have."""

    node_types: dict[str, str] = {}
    """Role -> type of its nodes, which is the value of their Ray label `rayllm.role`; `any`: wherever there is room.
    Where some node has that label, a role that is not named here goes to its usual type: policy, critic and workers to
    `learner`, rollout to `rollout`, reference and reward to `scorer`. Where none has, it goes wherever there is
    room."""

    @field_validator("node_types")
    @classmethod
    def _names_roles(cls, types: dict[str, str]) -> dict[str, str]:
        for role in types:
            if role not in USUAL_NODE_TYPES:
                near = difflib.get_close_matches(role, USUAL_NODE_TYPES, n=1)
                hint = f"did you mean {near[0]}?" if near else f"roles are {', '.join(USUAL_NODE_TYPES)}"
                raise ValueError(f"{role!r} is no role; {hint}")
        return types

    def node_type(self, role: str, *, labelled: bool) -> str | None:
        """The type of a role's nodes; None: any.

        Args:
            role: `reward.NAME` is one of several `reward`.
            labelled: some node of the cluster has a type.
        """
        role = role.split(".")[0]
        given = self.node_types.get(role, USUAL_NODE_TYPES[role] if labelled else "any")
        return None if given == "any" else given

    def shares(self, roles: Sequence[str]) -> list[list[str]]:
        """The roles in sets that share their GPUs."""
        return [[role] for role in roles]


class OptimizerConfig(Config):
    name: Literal["adamw", "muon"] = "adamw"
    """`muon` turns each weight matrix of the decoder blocks by an orthogonal step (Jordan et al. 2024), sized so that
    a learning rate of AdamW fits (Liu et al. 2025); embeddings, norms and heads stay with AdamW. It needs whole
    matrices: learner.zero_stage=0."""

    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up."""

    warmup_steps: int = Field(10, ge=0)
    """Optimizer steps over which the learning rate rises linearly to its peak."""

    final_ratio: float = Field(0.05, ge=0, le=1)
    """Learning rate at the end, as a fraction of the peak (cosine and linear)."""

    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay, on matrices only (biases, norms and heads of one row are left out)."""

    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW decay of the gradient mean."""

    beta2: float = Field(0.95, ge=0, lt=1)
    """AdamW decay of the squared gradient mean."""

    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm."""

    def learning_rate_at(self, step: int, num_steps: int) -> float:
        """The rate of the step with this index, 0 <= step < num_steps."""
        import math

        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)
        falling = 0.5 * (1 + math.cos(math.pi * progress)) if self.schedule == "cosine" else 1 - progress
        return self.learning_rate * (self.final_ratio + (1 - self.final_ratio) * falling)


class LoraConfig(Config):
    """Low-rank adapters (Hu et al. 2021) beside frozen weights, through peft; a critic's or reward model's head
    trains in full."""

    rank: int | None = Field(None, ge=1)
    """Rank of the adapters, 4 to 64; null trains the weights themselves."""

    alpha: int = Field(32, ge=1)
    """Adapters are scaled by alpha / rank."""

    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout in front of the adapters. Above 0 the policy that is updated is not quite the one that sampled."""

    target_modules: tuple[str, ...] | None = None
    """Names of the linear layers that get an adapter, such as [q_proj, v_proj]; null: all in the decoder blocks."""


class LearnerConfig(Config):
    """How DeepSpeed holds and trains a model."""

    zero_stage: int = Field(2, ge=0, le=3)
    """DeepSpeed ZeRO stage: 1 shards the optimizer state over the ranks, 2 the gradients too, 3 the weights too."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations; with bfloat16 the optimizer keeps float32 master weights."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    offload_optimizer: bool = False
    """Keep optimizer state and master weights in the memory of the host and step there; ZeRO 1 to 3."""

    offload_parameters: bool = False
    """Keep the weights in the memory of the host and bring each to the GPU when it is used; ZeRO-3 only."""

    trainable_layers: int | None = Field(None, ge=1)
    """Train the last so many decoder blocks and what follows them (norm, head), freeze the rest; null trains all."""

    lora: LoraConfig = LoraConfig()

    max_skipped_steps: int = Field(3, ge=0)
    """Optimizer steps in a row that may be skipped because a loss or gradient was not finite; one more ends the
    run."""

    @model_validator(mode="after")
    def _fits_zero_stage(self) -> LearnerConfig:
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(
                f"offload_parameters=true needs zero_stage=3, got {self.zero_stage}: only ZeRO-3 shards the weights"
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer=true needs zero_stage=1, 2 or 3, got 0")
        if self.trainable_layers is not None and self.lora.rank is not None:
            raise ValueError(
                f"trainable_layers={self.trainable_layers} and lora.rank={self.lora.rank} exclude each other: "
                "adapters freeze all weights; set one of them to null"
            )
        return self


def check_optimizer(optimizer: OptimizerConfig, learner: LearnerConfig) -> None:
    """Raise ValueError when the optimizer cannot work on what the learner shards."""
    if optimizer.name == "muon" and learner.zero_stage > 0:
        raise ValueError(
            f"optimizer.name=muon needs learner.zero_stage=0, got {learner.zero_stage}: sharded weights are no "
            "matrices, and DeepSpeed's own Muon clips its orthogonal step as if it were a gradient; "
            "set learner.zero_stage=0 or optimizer.name=adamw"
        )


class WorkersConfig(Config):
    """Ray Train workers, one data-parallel rank each."""

    num_workers: int = Field(1, ge=1)
    """Data-parallel ranks."""

    cpus_per_worker: float = Field(1, gt=0)
    """CPUs that Ray reserves for each worker. On CPU a worker computes on one thread."""

    gpus_per_worker: float = Field(0, ge=0)
    """GPUs that Ray reserves for each worker; 0 trains on CPU over gloo."""

    max_failures: int = Field(2, ge=0)
    """Restarts of the worker group from the last checkpoint before the job fails."""


class ActorsConfig(Config):
    """One role's Ray actors."""

    num_actors: int = Field(1, ge=1)
    """Processes; for policy and critic these are data-parallel ranks."""

    cpus_per_actor: float = Field(1, gt=0)
    """CPUs that Ray reserves for each."""

    gpus_per_actor: float = Field(0, ge=0)
    """GPUs that Ray reserves for each; 0 computes on CPU."""

    micro_batch_size: int = Field(64, ge=1)
    """Most rows in one forward pass."""


class CheckpointConfig(Config):
    every_steps: int = Field(100, ge=1)
    """Steps between checkpoints; one more is written at the end."""

    keep: int = Field(2, ge=1)
    """Newest checkpoints kept."""

    max_gib: float | None = Field(None, gt=0)
    """Most disk space that the kept ones take; the newest is kept whatever its size. Null: no bound."""


class TrainConfig(DataJobConfig):
    """What the Ray Train jobs have in common."""

    batch_size: int = Field(16, ge=1)
    """Rows per optimizer step, over all workers. Must be a multiple of workers.num_workers."""

    micro_batch_size: int = Field(64, ge=1)
    """Most rows in one forward pass of one worker; smaller saves memory and changes nothing else."""

    eval_every: int = Field(100, ge=1)
    """Steps between evaluations on held-out data."""

    optimizer: OptimizerConfig = OptimizerConfig()
    learner: LearnerConfig = LearnerConfig()
    workers: WorkersConfig = WorkersConfig()
    placement: PlacementConfig = PlacementConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _optimizer_fits(self) -> TrainConfig:
        check_optimizer(self.optimizer, self.learner)
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainConfig:
        ranks = self.workers.num_workers
        if self.batch_size % ranks:
            near = max(ranks, round(self.batch_size / ranks) * ranks)
            raise ValueError(
                f"batch_size={self.batch_size} does not divide over workers.num_workers={ranks}; "
                f"nearest that does: batch_size={near}"
            )
        return self
