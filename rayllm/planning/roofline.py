"""Expected seconds of a step's phases: the larger of what the arithmetic and what the memory or the network takes.

The efficiencies are assumptions about GPUs, none of which has been run; on CPU the rate of a core was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayllm.config.common import LearnerConfig
from rayllm.planning.hardware import HOST_ADAM, HOST_COPY, PCIE, Gpu
from rayllm.planning.memory import BYTES, trained_parameters
from rayllm.planning.shapes import ModelShape

TRAIN_EFFICIENCY = 0.40
"""Of the GPU's peak, in training passes."""

SCORE_EFFICIENCY = 0.50
"""Of the GPU's peak, in passes without gradients and in reading prompts."""

BANDWIDTH_EFFICIENCY = 0.65
"""Of the GPU's memory bandwidth, in sampling and in the optimizer's step."""

NETWORK_EFFICIENCY = 0.80
"""Of a link's rate."""

GPU_STEP_S = 0.001
"""Of one step of an engine, beside the model: scheduling, sampling."""

CPU_STEP_S, CPU_SAMPLE_S = 0.004, 0.0001
"""The same on CPU, and of each sequence in it."""

ALL_REDUCE_S = 20e-6
"""Least seconds of one all-reduce between GPUs of a node."""

SYNC_S = 0.025
"""Of a weight sync, beside moving the weights: calls. The proof that they serve runs while the engines sample."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The cluster as rates."""

    nodes: int
    gpus_per_node: int
    cpus_per_node: float
    gpu: Gpu | None
    network: float
    """Bytes a second between two nodes."""

    core_flops: float
    core_bandwidth: float

    def flops(self, cores: float, dtype: str, efficiency: float) -> float:
        """Operations a second of one process: a GPU's, or those of its cores (what was measured, not a peak)."""
        if self.gpu is None:
            return self.core_flops * max(1.0, cores // 1)
        peak = self.gpu.bfloat16_flops if dtype == "bfloat16" else self.gpu.float32_flops
        return peak * efficiency

    def bandwidth(self, cores: float) -> float:
        """Bytes a second of one process's memory."""
        if self.gpu is None:
            return self.core_bandwidth * max(1.0, cores // 1)
        return self.gpu.bandwidth * BANDWIDTH_EFFICIENCY

    def between_ranks(self, ranks: int) -> float:
        """Bytes a second of each rank's share of the slowest link in a ring over ``ranks``."""
        if self.gpu is None:
            return min(self.network, HOST_COPY) if self.nodes > 1 else HOST_COPY
        if ranks <= self.gpus_per_node:
            return self.gpu.link * NETWORK_EFFICIENCY
        return self.network / self.gpus_per_node * NETWORK_EFFICIENCY


def forward_flops(shape: ModelShape, *, sequences: float, tokens: float) -> float:
    """Operations of a forward pass over whole sequences: two for each parameter and token, and attention's."""
    attention = 2 * shape.layers * shape.attention_width * tokens  # two products, each over half of the tokens
    return sequences * tokens * (2 * shape.multiplied + attention)


def score_seconds(
    machine: Machine, shape: ModelShape, *, sequences: float, tokens: float, dtype: str, cores: float
) -> float:
    """Of a pass without gradients in one process."""
    work = forward_flops(shape, sequences=sequences, tokens=tokens)
    return work / machine.flops(cores, dtype, SCORE_EFFICIENCY)


def update_seconds(
    machine: Machine,
    shape: ModelShape,
    learner: LearnerConfig,
    *,
    ranks: int,
    sequences: float,
    tokens: float,
    optimizer_steps: int,
    micro_batches: int,
    cores: float,
) -> float:
    """Of all optimizer steps of a step, on one rank.

    Args:
        machine: where.
        shape, learner: what is trained and how.
        ranks: data-parallel processes.
        sequences, tokens: rows of one rank in all optimizer steps together, and the tokens of each.
        optimizer_steps: in the step.
        micro_batches: of one rank in all of them.
        cores: of one process.
    """
    trained, total = trained_parameters(shape, learner)
    size = BYTES[learner.dtype]
    share = min(1.0, trained / total) if learner.lora.rank is None else 0.0
    passes = 2 + share + learner.gradient_checkpointing  # forward, gradients of activations, of weights, again
    compute = passes * forward_flops(shape, sequences=sequences, tokens=tokens)
    compute /= machine.flops(cores, learner.dtype, TRAIN_EFFICIENCY)
    ring = (ranks - 1) / ranks / machine.between_ranks(ranks) if ranks > 1 else 0.0
    shard = trained / (ranks if learner.zero_stage else 1)
    if learner.offload_optimizer or learner.offload_parameters:
        step = shard / (HOST_ADAM * max(1.0, cores)) + (4 + size) * shard / PCIE
    else:
        step = 28 * shard / machine.bandwidth(cores)
    if learner.zero_stage == 3:  # weights twice and gradients once for every micro-batch, beside the arithmetic
        moved = micro_batches * (2 * total + trained) * size * ring
        if learner.offload_parameters:
            moved += micro_batches * 2 * total * size / ranks / PCIE
        return max(compute, moved) + optimizer_steps * step
    return compute + optimizer_steps * (step + 2 * trained * size * ring)


def sampling_seconds(
    machine: Machine,
    shape: ModelShape,
    engine: dict[str, Any],
    *,
    sequences: float,
    prompts: float,
    prompt_tokens: float,
    new_tokens: float,
    concurrency: int,
    cores: float,
) -> float:
    """Of one engine: reading its prompts once each, then one token a step for as many sequences as the cache holds."""
    split = int(engine.get("tensor_parallel_size", 1))
    dtype = str(engine.get("dtype", "float32" if machine.gpu is None else "bfloat16"))
    size = BYTES.get(dtype, 2)
    rate = machine.flops(cores, dtype, SCORE_EFFICIENCY) * split
    reading = forward_flops(shape, sequences=prompts, tokens=prompt_tokens) / rate
    batch = max(1.0, min(sequences, concurrency))
    context = prompt_tokens + new_tokens / 2
    moved = _weights_read(shape, batch) * size + batch * context * shape.kv_bytes(size)
    work = batch * (2 * shape.multiplied + 4 * shape.layers * shape.attention_width * context)
    step = max(moved / (machine.bandwidth(cores) * split), work / rate)
    if machine.gpu is None:
        step += CPU_STEP_S + batch * CPU_SAMPLE_S
    else:
        step += GPU_STEP_S
        if split > 1:
            reduced = batch * shape.hidden * size / (machine.gpu.link * NETWORK_EFFICIENCY)
            step += 2 * shape.layers * (ALL_REDUCE_S + reduced)
    return reading + sequences / batch * new_tokens * step


def _weights_read(shape: ModelShape, batch: float) -> float:
    """Parameters that a step over ``batch`` tokens reads: of the experts those that some token is sent to."""
    if not shape.experts:
        return shape.parameters - (0 if shape.tied else shape.embedding_parameters)
    missed = (1 - shape.experts_per_token / shape.experts) ** batch
    mlp = (1 - missed) * shape.experts * 3 * shape.hidden * shape.intermediate
    return shape.layers * (shape.attention_parameters + mlp) + shape.vocab * shape.hidden


def sync_seconds(machine: Machine, shape: ModelShape, learner: LearnerConfig, engine_dtype: str) -> float:
    """Of bringing the policy's weights to all engines, which take them at the same time, through host memory.

    One thread copies at each end: what is trained (with LoRA the adapters alone) off the learner into shared memory,
    for other nodes into Ray's store, and whole weights into the engine.
    """
    size = BYTES.get(engine_dtype, 2)
    whole = float(shape.parameters * size)
    sent, read = whole, whole
    if learner.lora.rank is not None:
        sent = 4.0 * trained_parameters(shape, learner)[0]
        read = 3 * whole  # the model folder is read, the adapters are added, the sum is loaded
    seconds = SYNC_S + (sent + read) / HOST_COPY
    if machine.gpu is not None:
        seconds += (sent + whole) / PCIE
    if machine.nodes > 1:
        seconds += sent / HOST_COPY + sent / (machine.network * NETWORK_EFFICIENCY)
    return seconds
