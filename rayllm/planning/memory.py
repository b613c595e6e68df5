"""Bytes that one process of a role needs at its worst moment, from shapes and settings alone.

How the parts were found: the model states by counting what DeepSpeed 0.19.8 allocates, on CPU, for every ZeRO stage,
dtype and one and two ranks; activations by counting what autograd saves in transformers' classes; both are tested. What
a process takes before it holds a model was measured on CPU (`CPU_RUNTIME`). For GPUs it is assumed (`GPU_RUNTIME`): no
GPU has been measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayllm.config.common import LearnerConfig
from rayllm.planning.hardware import GIB
from rayllm.planning.shapes import ModelShape

BYTES = {"float32": 4, "bfloat16": 2}
BUCKET = 500_000_000
"""Elements of DeepSpeed's buffer for reducing gradients (``reduce_bucket_size``); the GPU's holds all of them."""

LIVE = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered at a time (``stage3_max_live_parameters``)."""

CHUNK = 1024
"""Tokens whose log-probabilities are computed at a time, in float32 (`rayllm.algorithms.logprobs`)."""

SMALL_BLOCK = 32 << 20
"""The C library keeps freed blocks up to this size for the process; larger ones go back to the system."""

CPU_RUNTIME = {"learner": 0.43 * GIB, "frozen": 0.31 * GIB, "engine": 0.65 * GIB, "plain": 0.36 * GIB}
"""Measured: a process with Ray, torch and (learner) DeepSpeed or (engine) vLLM, before it holds a model; pages that
several processes share count once."""

CPU_DRIVER = 0.75 * GIB
"""Measured: the driver and Ray's own processes on one node."""

GPU_RUNTIME = {"learner": 1.5 * GIB, "frozen": 0.75 * GIB, "engine": 1.5 * GIB, "plain": 0.0}
"""Assumed: CUDA context, libraries' workspaces, NCCL's buffers (learner), captured graphs (engine)."""

GPU_HOST = 4.0 * GIB
"""Assumed: host memory of a process that uses a GPU, beside what is counted."""

GPU_USABLE = 0.95
"""Assumed: share of a GPU's memory that can be filled before torch's allocator finds no block that is large enough."""

ENGINE_USABLE = 0.92
"""vLLM's own default of ``gpu_memory_utilization``."""

CPU_KV_CACHE = 128 << 20
"""Our default of ``kv_cache_memory_bytes`` for engines on CPU (`actors.vllm_engine`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one process at the moment when it takes most. On CPU there is no device beside the host."""

    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    """And logits."""

    buffers: float = 0.0
    """DeepSpeed's for gradients, gathered layers, temporaries; of an engine, second copies of weights."""

    kv_cache: float = 0.0
    runtime: float = 0.0
    """Before it holds a model."""

    host: float = 0.0
    """Beside a GPU, in its node's memory: offloaded state, or the whole model while it is loaded."""

    moment: str = "forward"
    concurrency: int | None = None
    """Sequences of full length whose keys and values fit into the cache; more wait."""

    cache_size: float = 0.0
    """Bytes that the cache may come to hold."""

    cache_needed: float = 0.0
    """Bytes of one sequence of ``max_model_len``: vLLM does not start with less."""

    @property
    def resident(self) -> float:
        """Of a model that stays and does not compute: its weights, and what the process takes."""
        return self.weights + self.runtime

    @property
    def peak(self) -> float:
        states = self.weights + self.gradients + self.optimizer
        return states + self.activations + self.buffers + self.kv_cache + self.runtime


def saved_activations(shape: ModelShape, *, rows: int, tokens: int, element: int) -> float:
    """Bytes that autograd saves in one layer for a padded batch of (rows, tokens).

    Per token: two norms (input in float32, twice the output), query, keys and values repeated for all query heads,
    attention's output, four tensors as wide as the MLP, and the layer's own copy of the attention mask's row.
    """
    norms = 2 * shape.hidden * (4 + 2 * element)
    attention = 4 * element * shape.attention_width
    if shape.qk_norm:
        attention += (4 + element) * (shape.attention_width + shape.kv_width)
    mlp = 4 * element * shape.intermediate * shape.active_mlps
    if shape.experts:
        mlp += 2 * element * shape.hidden * shape.active_mlps
    return rows * tokens * (norms + attention + mlp + element * tokens)


def activations(shape: ModelShape, *, rows: int, tokens: int, element: int, checkpointing: bool) -> float:
    """Bytes that are there when the backward pass begins."""
    layer = saved_activations(shape, rows=rows, tokens=tokens, element=element)
    final = rows * tokens * shape.hidden * (4 + 2 * element)
    if checkpointing:  # every layer's input, and one layer computed again
        return final + layer + shape.layers * rows * tokens * shape.hidden * element
    return final + shape.layers * layer


def logits(shape: ModelShape, *, rows: int, tokens: int, element: int, training: bool) -> float:
    """Bytes of the logits, in training also of their gradient, and of a chunk of them in float32, twice."""
    if shape.head_outputs:
        return 0.0
    whole = rows * tokens * shape.vocab * element
    return whole * (1 + training) + 2 * min(tokens, CHUNK) * shape.vocab * 4


def forward_only(shape: ModelShape, *, rows: int, tokens: int, element: int) -> float:
    """Bytes of a pass without gradients: a few tensors of one layer, then the logits."""
    widest = 3 * shape.intermediate * shape.active_mlps + 4 * shape.hidden
    layer = rows * tokens * element * (widest + shape.attention_width)
    return max(layer, logits(shape, rows=rows, tokens=tokens, element=element, training=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """Weights, gradients and optimizer of one rank, in bytes: what DeepSpeed's own estimators count."""

    weights: float
    gradients: float
    """At the optimizer's step: as they were reduced, and in float32."""

    accumulated: float
    """During the backward pass, of the micro-batches before."""

    optimizer: float
    """AdamW's two moments and the float32 master weights."""

    host: float
    """What is offloaded."""


def model_states(total: int, trained: int, ranks: int, learner: LearnerConfig) -> States:
    """How DeepSpeed shards ``total`` parameters, of which ``trained`` learn, over ``ranks``."""
    stage, size = learner.zero_stage, BYTES[learner.dtype]
    shard = trained / (ranks if stage else 1)
    masters = 0 if stage == 0 and size == 4 else 4  # ZeRO copies float32 weights too
    optimizer = (8 + masters) * shard
    # The reduced gradients stay until the step has made a flat copy of them in float32.
    step = 4 * shard if stage == 0 and size == 4 else (size + 4) * shard
    accumulated = size * (trained if stage < 2 else shard)
    weights = size * (total / ranks if stage == 3 else total)
    host = 0.0
    if learner.offload_optimizer or learner.offload_parameters:
        host, optimizer, step, accumulated = optimizer + 4 * shard, 0.0, 0.0, 0.0
    if learner.offload_parameters:
        host, weights = host + weights, 0.0
    return States(weights=weights, gradients=step, accumulated=accumulated, optimizer=optimizer, host=host)


def trained_parameters(shape: ModelShape, learner: LearnerConfig) -> tuple[int, int]:
    """(trained, total), adapters included."""
    rank, last = learner.lora.rank, learner.trainable_layers
    total = shape.parameters
    head = shape.head_parameters if shape.head_outputs else 0
    if rank is not None:
        added = shape.lora_parameters(rank, learner.lora.target_modules)
        return added + head, total + added
    if last is not None:
        return min(last, shape.layers) * shape.layer_parameters + shape.hidden + shape.head_parameters, total
    return total, total


def learner_memory(
    shape: ModelShape, learner: LearnerConfig, *, ranks: int, rows: int, tokens: int, on_gpu: bool
) -> Memory:
    """One data-parallel rank under DeepSpeed.

    Args:
        shape: of the model.
        learner: how it is trained.
        ranks: data-parallel processes.
        rows, tokens: of the largest micro-batch, padding included.
        on_gpu: else the process computes on CPU, where what is offloaded stays in the same memory.
    """
    if not on_gpu:
        learner = learner.model_copy(update={"offload_optimizer": False, "offload_parameters": False})
    trained, total = trained_parameters(shape, learner)
    states, size = model_states(total, trained, ranks, learner), BYTES[learner.dtype]
    shard = trained / (ranks if learner.zero_stage else 1)
    pass_ = {"rows": rows, "tokens": tokens, "element": size}
    saved = activations(shape, **pass_, checkpointing=learner.gradient_checkpointing)
    held = saved + logits(shape, **pass_, training=True)
    at: dict[str, Any] = {
        "weights": states.weights,
        "runtime": (GPU_RUNTIME if on_gpu else CPU_RUNTIME)["learner"],
        # Every rank loads the whole model in float32 before DeepSpeed gets it.
        "host": GPU_HOST + max(states.host, 4.0 * total) if on_gpu else 0.0,
    }
    backward = Memory(
        gradients=states.accumulated,
        optimizer=states.optimizer,
        activations=held,
        buffers=backward_buffers(learner, trained, total, held, on_gpu=on_gpu),
        moment="backward",
        **at,
    )
    # AdamW on CPU makes two temporaries as large as its shard; the GPU's fused kernel makes none.
    temporaries = 0.0 if on_gpu else 8.0 * (shard if learner.zero_stage else shape.largest_tensor)
    small = 4 * rows * tokens * shape.intermediate < SMALL_BLOCK
    step = Memory(
        gradients=states.gradients,
        optimizer=states.optimizer,
        activations=saved if small and not on_gpu else 0.0,  # freed, and kept for the process by the C library
        buffers=temporaries + (reduce_bucket(learner, trained, on_gpu=on_gpu) if learner.zero_stage == 3 else 0.0),
        moment="step",
        **at,
    )
    # ZeRO-3 shards the model only after it lay on the GPU in full.
    start = Memory(**{**at, "weights": size * total if learner.zero_stage == 3 else states.weights}, moment="start")
    return max(backward, step, start, key=lambda memory: memory.peak)


def reduce_bucket(learner: LearnerConfig, trained: int, *, on_gpu: bool) -> float:
    """Bytes of DeepSpeed's buffer for gradients. It is always made in full; on CPU only what is written takes memory.
    ZeRO-3 keeps it."""
    size = BYTES[learner.dtype]
    return float(size * (BUCKET if learner.zero_stage and on_gpu else min(trained, BUCKET)))


def backward_buffers(learner: LearnerConfig, trained: int, total: int, held: float, *, on_gpu: bool) -> float:
    """Bytes of the backward pass beside states and activations.

    Args:
        learner: how it is trained.
        trained, total: parameters.
        held: activations and logits. They go while gradients come: never both in full.
        on_gpu: see `reduce_bucket`.
    """
    size = BYTES[learner.dtype]
    live = size * min(total, LIVE) if learner.zero_stage == 3 else 0
    unreduced = size * min(trained, BUCKET) if learner.zero_stage >= 2 else 0
    return reduce_bucket(learner, trained, on_gpu=on_gpu) + live + max(0.0, unreduced - held)


def frozen_memory(shape: ModelShape, *, rows: int, tokens: int, on_gpu: bool) -> Memory:
    """A model that only scores: whole, in float32, in each of its processes."""
    weights = 4.0 * shape.parameters
    return Memory(
        weights=weights,
        activations=forward_only(shape, rows=rows, tokens=tokens, element=4),
        runtime=(GPU_RUNTIME if on_gpu else CPU_RUNTIME)["frozen"],
        host=GPU_HOST + weights if on_gpu else 0.0,
    )


def engine_memory(
    shape: ModelShape, engine: dict[str, Any], *, sequences: int, tokens: int, gpu_memory: float | None
) -> Memory:
    """One vLLM engine, or of one over several GPUs (tensor parallel) the part on each.

    Args:
        shape: of the policy.
        engine: vLLM's arguments, as in ``rollout.engine``.
        sequences: that the engine has at once, if they fit.
        tokens: of the longest sequence.
        gpu_memory: bytes of the GPU; None on CPU.
    """
    split = int(engine.get("tensor_parallel_size", 1))
    size = BYTES.get(str(engine.get("dtype", "float32" if gpu_memory is None else "bfloat16")), 2)
    each = shape.kv_bytes(size) / min(split, shape.kv_heads)
    needed = each * int(engine.get("max_model_len", shape.max_positions))
    weights = size * shape.parameters / split
    bundle = size * shape.parameters
    if gpu_memory is None:
        cache = float(engine.get("kv_cache_memory_bytes", CPU_KV_CACHE))
        concurrency = int(cache // (each * tokens))
        batch = min(sequences, concurrency)
        # Linear layers are packed a second time, and new weights lie beside the old ones while they are loaded.
        return Memory(
            weights=weights, buffers=weights + bundle, activations=4.0 * shape.vocab * batch,
            kv_cache=each * tokens * batch,
            runtime=CPU_RUNTIME["engine"], moment="sync", concurrency=concurrency, cache_size=cache,
            cache_needed=needed,
        )  # fmt: skip
    large = gpu_memory >= 70 * GIB
    batched = int(engine.get("max_num_batched_tokens", 16384 if large else 8192))
    seqs = int(engine.get("max_num_seqs", 1024 if large else 256))
    widest = (3 * shape.intermediate * shape.active_mlps + 2 * shape.attention_width) / split + 4 * shape.hidden
    working = size * batched * widest + 3 * 4.0 * shape.vocab * seqs
    runtime = GPU_RUNTIME["engine"]
    budget = float(engine.get("gpu_memory_utilization", ENGINE_USABLE)) * gpu_memory
    cache = float(engine.get("kv_cache_memory_bytes", max(0.0, budget - weights - working - runtime)))
    return Memory(
        weights=weights, activations=working, kv_cache=cache, runtime=runtime, host=GPU_HOST * split + 2 * bundle,
        moment="sampling", concurrency=min(seqs, int(cache // (each * tokens))), cache_size=cache,
        cache_needed=needed,
    )  # fmt: skip
