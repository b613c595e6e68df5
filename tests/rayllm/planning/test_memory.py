"""The plan's memory: counted by hand, by DeepSpeed's own estimators, by autograd, and by the allocator."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rayllm.algorithms.logprobs import token_logprobs
from rayllm.config.common import LearnerConfig
from rayllm.planning.hardware import GIB
from rayllm.planning.memory import (
    BUCKET,
    activations,
    backward_buffers,
    engine_memory,
    frozen_memory,
    learner_memory,
    logits,
    model_states,
    reduce_bucket,
)
from rayllm.planning.shapes import KNOWN, from_config
from tests.conftest import ROOT
from tests.rayllm.planning.test_shapes import EXPERTS, SIZES

BF16 = {"dtype": "bfloat16"}


def states(total: int, ranks: int, **learner):
    return model_states(total, total, ranks, LearnerConfig.model_validate(learner))


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-70b", "qwen2.5-0.5b"])
@pytest.mark.parametrize(("gpus", "nodes"), [(1, 1), (8, 1), (8, 16)])
def test_model_states_agree_with_deepspeeds_estimators(name, gpus, nodes):
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2

    total, ranks = KNOWN[name].parameters, gpus * nodes
    # Their host figures hold a spare half of themselves; here it is left out.
    shape = {"num_gpus_per_node": gpus, "num_nodes": nodes, "additional_buffer_factor": 1.0}

    _, device = zero2(total, cpu_offload=False, **shape)
    ours = states(total, ranks, zero_stage=2, **BF16)
    assert ours.weights + ours.gradients + ours.optimizer == pytest.approx(device, abs=2)

    host, device = zero2(total, cpu_offload=True, **shape)
    ours = states(total, ranks, zero_stage=2, offload_optimizer=True, **BF16)
    assert ours.weights + ours.gradients + ours.optimizer == device
    # 16 bytes a parameter over the ranks, or while loading 4 on each of them: theirs is the larger for one node.
    if nodes == 1:
        assert max(ours.host, 4 * total) * ranks == pytest.approx(host)

    largest = KNOWN[name].largest_tensor
    _, device, live = zero3(total, largest, cpu_offload=False, cpu_offload_params=False, **shape)
    ours = states(total, ranks, zero_stage=3, **BF16)
    # They leave out the reduced bfloat16 gradients, which ZeRO-3 keeps beside their float32 copy.
    in_theirs = ours.weights + ours.gradients + ours.optimizer - 2 * total / ranks
    assert in_theirs == pytest.approx(device - live, abs=2)

    host, device, live = zero3(total, largest, cpu_offload=True, cpu_offload_params=True, zero_init=False, **shape)
    ours = states(total, ranks, zero_stage=3, offload_optimizer=True, offload_parameters=True, **BF16)
    assert ours.weights + ours.gradients + ours.optimizer == device - live == 0
    assert ours.host * gpus == pytest.approx(18 * total / nodes)
    assert max(ours.host, 4 * total) * gpus == pytest.approx(host)


def test_7b_by_hand():
    """Llama 2 7B, ZeRO-2 on 8 GPUs in bfloat16: 6.74e9 parameters."""
    n = 6_738_415_616
    ours = states(n, 8, zero_stage=2, **BF16)
    assert ours.weights == 2 * n  # 13.5e9
    assert ours.optimizer == 12 * n / 8  # master, two moments: 10.1e9
    assert ours.gradients == 6 * n / 8  # bfloat16 and the float32 copy: 5.1e9
    assert ours.weights + ours.optimizer + ours.gradients == pytest.approx(28.64e9, rel=1e-3)
    one = states(n, 1, zero_stage=2, **BF16)
    assert one.weights + one.optimizer + one.gradients == 20 * n  # 134.8e9: no GPU of 80 GB holds it
    # In float32 there are master weights too, and the gradients lie there twice at the step.
    full = states(n, 8, zero_stage=2)
    assert (full.weights, full.optimizer, full.gradients) == (4 * n, 12 * n / 8, 8 * n / 8)


def test_7b_activations_by_hand():
    """4 rows of 1,024 tokens through Llama 2 7B in bfloat16."""
    shape = KNOWN["llama-2-7b"]
    per_token = 2 * 4096 * 8 + 4 * 2 * 4096 + 4 * 2 * 11008 + 2 * 1024  # norms, attention, MLP, the mask's row
    layers = 32 * 4 * 1024 * per_token
    assert layers == pytest.approx(24.7e9, rel=0.01)
    found = activations(shape, rows=4, tokens=1024, element=2, checkpointing=False)
    assert found == layers + 4 * 1024 * 4096 * 8  # and the last norm
    again = activations(shape, rows=4, tokens=1024, element=2, checkpointing=True)
    assert again == 4 * 1024 * (32 * 4096 * 2 + per_token + 4096 * 8)  # inputs of the layers, one layer, the norm
    # Logits and their gradient, and a chunk of 1,024 tokens in float32, twice.
    assert logits(shape, rows=4, tokens=1024, element=2, training=True) == 2 * 4096 * 32000 * 2 + 2 * 1024 * 32000 * 4


def test_70b_by_hand():
    """Llama 3 70B: ZeRO-3 on 64 H100 holds its states in 22 GB each, and still it does not start: every rank puts the
    whole model on its GPU before it is sharded."""
    shape, n = KNOWN["llama-3-70b"], 70_553_706_496
    learner = LearnerConfig(zero_stage=3, dtype="bfloat16", gradient_checkpointing=True)
    ours = states(n, 64, zero_stage=3, **BF16)
    assert ours.weights + ours.optimizer + ours.gradients == 20 * n / 64 == pytest.approx(22.05e9, rel=1e-3)
    found = learner_memory(shape, learner, ranks=64, rows=1, tokens=2048, on_gpu=True)
    assert found.moment == "start" and found.weights == 2 * n  # 141e9
    assert found.host >= 4 * n  # 282e9 of host memory for each rank while it loads in float32
    # Cache of one sequence of 8,192 tokens: 80 layers x 8 heads x 128, keys and values, in bfloat16.
    assert shape.kv_bytes(2) * 8192 == 2 * 80 * 8 * 128 * 2 * 8192 == 2.5 * GIB


def test_an_engine_over_eight_gpus_by_hand():
    shape = KNOWN["llama-3-70b"]
    engine = {"tensor_parallel_size": 8, "max_model_len": 4096, "gpu_memory_utilization": 0.9}
    found = engine_memory(shape, engine, sequences=512, tokens=2048, gpu_memory=80 * GIB)
    assert found.weights == 2 * 70_553_706_496 / 8
    assert found.peak == pytest.approx(0.9 * 80 * GIB)  # vLLM fills what it is told to
    each = shape.kv_bytes(2) / 8 * 2048
    assert found.concurrency == int(found.kv_cache // each)
    assert found.cache_needed == shape.kv_bytes(2) / 8 * 4096


def test_shares_shrink_with_the_ranks_and_offloading_empties_the_gpu():
    shape = KNOWN["qwen2.5-7b"]
    learner = LearnerConfig(zero_stage=2, dtype="bfloat16")
    peaks = [learner_memory(shape, learner, ranks=r, rows=2, tokens=512, on_gpu=True).peak for r in (1, 2, 8, 64)]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > 2 * peaks[-1]
    offloaded = learner.model_copy(update={"offload_optimizer": True})
    found = learner_memory(shape, offloaded, ranks=8, rows=2, tokens=512, on_gpu=True)
    assert found.optimizer == 0 and found.host > 16 * shape.parameters / 8
    frozen = frozen_memory(shape, rows=2, tokens=512, on_gpu=True)
    assert frozen.weights == 4 * shape.parameters  # reference and reward model are float32 everywhere
    assert learner_memory(shape, learner, ranks=8, rows=2, tokens=512, on_gpu=True).buffers == 2 * BUCKET


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_saves(kind, dtype, checkpointing):
    sizes = {**SIZES, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4}
    experts = {**EXPERTS.get(kind, {}), **({"moe_intermediate_size": 320} if kind == "qwen3_moe" else {})}
    config = AutoConfig.for_model(kind, **sizes, **experts, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    rows, tokens = 3, 48
    ids, mask = torch.randint(200, (rows, tokens)), torch.ones(rows, tokens, dtype=torch.bool)
    mask[0, -5:] = False
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        token_logprobs(found, ids).sum()
    shape, size = from_config(config.to_dict(), name=kind), dtype.itemsize
    logits_saved = rows * tokens * 200 * size
    planned = activations(shape, rows=rows, tokens=tokens, element=size, checkpointing=checkpointing)
    if checkpointing:  # the layer that is computed again is not there yet
        planned -= activations(shape, rows=rows, tokens=tokens, element=size, checkpointing=False) / 4
    found_bytes = sum(size for size, _ in saved.values())
    few = rows * tokens * 400  # the mask, rotary tables, ids: of no weight in a real model
    assert planned + logits_saved == pytest.approx(found_bytes, rel=0.05, abs=few)


ALLOCATED = """
import ctypes, json, os, sys, threading, time
settings = json.loads(sys.argv[1])
os.environ.update(RANK=str(settings["rank"]), WORLD_SIZE=str(settings["world_size"]), LOCAL_RANK="0",
                  MASTER_ADDR="127.0.0.1", MASTER_PORT=str(settings["port"]), OMP_NUM_THREADS="1")
import torch
torch.set_num_threads(1)
from transformers import AutoConfig, AutoModelForCausalLM
from rayllm.config.common import LearnerConfig, OptimizerConfig
from rayllm.models.engine import Engine, init_distributed

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
libc = ctypes.CDLL("libc.so.6")
libc.mallinfo2.restype = Info
def allocated():
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd

init_distributed("gloo")
base = allocated()
config = AutoConfig.for_model("llama", **settings["config"])
engine = Engine(AutoModelForCausalLM.from_config(config, dtype=torch.float32), OptimizerConfig(),
                LearnerConfig.model_validate(settings["learner"]))
ids = torch.randint(64, (1, 8))
peaks, phase, running = {}, ["start"], [True]
def watch():
    while running[0]:
        now, found = phase[0], allocated()
        peaks[now] = max(peaks.get(now, 0), found)
        time.sleep(0.0005)
threading.Thread(target=watch, daemon=True).start()
step = engine._step
def watched_step():
    time.sleep(0.005)
    phase[0] = "step"
    norm = step()
    time.sleep(0.005)
    phase[0] = "backward"
    return norm
engine._step = watched_step
for _ in range(3):
    phase[0] = "backward"
    engine.update([ids] * 3, lambda b: engine(input_ids=b).logits.float().mean(), learning_rate=1e-4)
running[0] = False
print(json.dumps({"held": allocated() - base, **{name: peak - base for name, peak in peaks.items()}}))
"""


SLACK = 28 << 20
"""Bytes that the libraries allocate for other things: 0.2 of the weights' float32."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads glibc's allocator")
@pytest.mark.parametrize(
    ("world_size", "learner"),
    [
        (1, {"zero_stage": 2}),
        (1, {"zero_stage": 3, "dtype": "bfloat16"}),
        (2, {"zero_stage": 2, "dtype": "bfloat16"}),
        (2, {"zero_stage": 1}),
    ],
)
def test_states_and_buffers_are_what_deepspeed_allocates(world_size, learner):
    config = {
        "vocab_size": 256, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10,
        "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    common = {"world_size": world_size, "config": config, "learner": learner, "port": free_port()}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", ALLOCATED, json.dumps({**common, "rank": rank})],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    found = json.loads([rank.communicate(timeout=120)[0] for rank in ranks][0].splitlines()[-1])
    shape = from_config({"model_type": "llama", **config}, name="measured")
    settings, total = LearnerConfig.model_validate(learner), shape.parameters
    planned = states(total, world_size, **learner)
    fixed = planned.weights + planned.optimizer
    kept = 0.0
    if settings.zero_stage == 3:  # its buffer, and the reduced gradients
        kept = reduce_bucket(settings, total, on_gpu=True) + planned.accumulated
    shard = total / world_size
    assert found["held"] == pytest.approx(fixed + kept, abs=SLACK)
    buffers = backward_buffers(settings, total, total, 0.0, on_gpu=True)
    assert found["backward"] == pytest.approx(fixed + planned.accumulated + buffers, abs=SLACK)
    kept -= planned.accumulated if kept else 0.0  # counted among the gradients
    assert found["step"] == pytest.approx(fixed + kept + planned.gradients + 8 * shard, abs=SLACK)
