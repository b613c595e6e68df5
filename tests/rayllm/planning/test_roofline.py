"""Seconds by hand: what bounds each phase, and how it scales."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rayllm.config.common import LearnerConfig
from rayllm.config.plan import ClusterConfig
from rayllm.planning import roofline
from rayllm.planning.hardware import HOST_COPY, PCIE
from rayllm.planning.plan import machine_of
from rayllm.planning.shapes import KNOWN

H100 = machine_of(ClusterConfig(nodes=2))
LLAMA = KNOWN["llama-2-7b"]


def update(ranks: int, machine=H100, shape=LLAMA, *, sequences=64, tokens=1024, steps=1, micro_batches=16, **learner):
    return roofline.update_seconds(
        machine, shape, LearnerConfig.model_validate({"dtype": "bfloat16", **learner}), ranks=ranks,
        sequences=sequences, tokens=tokens, optimizer_steps=steps, micro_batches=micro_batches, cores=1,
    )  # fmt: skip


def test_an_update_is_six_operations_a_parameter_and_token():
    tokens = 64 * 1024
    flops = 6 * LLAMA.multiplied * tokens + 3 * 2 * 32 * 4096 * 1024 * tokens  # and attention's, over half the tokens
    step = 28 * LLAMA.parameters / (3.35e12 * roofline.BANDWIDTH_EFFICIENCY)
    assert update(1) == pytest.approx(flops / (989e12 * roofline.TRAIN_EFFICIENCY) + step)
    assert update(1) == pytest.approx(7.0, rel=0.05)  # 2.6e15 + 0.1e15 operations at 396e12 a second, and 0.09 s


def test_checkpointing_adds_a_third_and_lora_saves_one():
    whole, again, adapters = update(1), update(1, gradient_checkpointing=True), update(1, lora={"rank": 8})
    step = 28 * LLAMA.parameters / (3.35e12 * roofline.BANDWIDTH_EFFICIENCY)
    assert again - step == pytest.approx((whole - step) * 4 / 3)
    assert adapters == pytest.approx((whole - step) * 2 / 3, rel=0.01)


def test_gradients_cross_the_slowest_link():
    # 8 ranks stay within a node; 16 share its network: 50 GB/s over 8 GPUs.
    moved = 2 * LLAMA.parameters * 2
    within = update(8, steps=100) - update(8, steps=0)
    across = update(16, steps=100) - update(16, steps=0)
    stepping = [28 * LLAMA.parameters / n / (3.35e12 * roofline.BANDWIDTH_EFFICIENCY) for n in (8, 16)]
    assert within / 100 == pytest.approx(stepping[0] + moved * 7 / 8 / (450e9 * 0.8))
    assert across / 100 == pytest.approx(stepping[1] + moved * 15 / 16 / (50e9 / 8 * 0.8))


def test_zero_3_moves_the_weights_for_every_micro_batch_beside_the_arithmetic():
    # Few tokens in many micro-batches over a slow network: the network is what bounds it.
    found = update(16, sequences=16, tokens=64, micro_batches=16, zero_stage=3)
    moved = 16 * 3 * LLAMA.parameters * 2 * 15 / 16 / (50e9 / 8 * 0.8)
    assert found == pytest.approx(moved + 28 * LLAMA.parameters / 16 / (3.35e12 * roofline.BANDWIDTH_EFFICIENCY))
    # Many tokens in one: the arithmetic is.
    assert update(8, micro_batches=1, zero_stage=3) == pytest.approx(update(8, steps=1, micro_batches=1), rel=0.02)


def sampling(engine=None, machine=H100, shape=LLAMA, *, sequences=1.0, concurrency=1000, prompts=1.0, new=100):
    return roofline.sampling_seconds(
        machine, shape, engine or {}, sequences=sequences, prompts=prompts, prompt_tokens=100, new_tokens=new,
        concurrency=concurrency, cores=1,
    )  # fmt: skip


def test_one_sequence_reads_all_weights_for_every_token():
    reading = roofline.forward_flops(LLAMA, sequences=1, tokens=100) / (989e12 * roofline.SCORE_EFFICIENCY)
    weights = (LLAMA.parameters - 32000 * 4096) * 2  # the embedding is looked up
    cache = 150 * LLAMA.kv_bytes(2)
    step = (weights + cache) / (3.35e12 * roofline.BANDWIDTH_EFFICIENCY) + roofline.GPU_STEP_S
    assert sampling() == pytest.approx(reading + 100 * step)


def test_a_batch_shares_the_weights_and_a_small_cache_makes_it_wait():
    one, many = sampling(), sampling(sequences=64.0, prompts=64)
    assert many < 8 * one
    assert sampling(sequences=64.0, prompts=64, concurrency=16) > 2 * many
    groups = sampling(sequences=64.0, prompts=8)  # the prompt's cache is shared by its samples
    assert groups < many


def test_tensor_parallel_halves_the_reading_and_pays_for_its_sums():
    one, two = sampling(new=1000), sampling({"tensor_parallel_size": 2}, new=1000)
    assert 0.5 * one < two < one
    paid = 1000 * 2 * 32 * roofline.ALL_REDUCE_S
    assert two > paid


def test_experts_are_read_as_they_are_hit():
    shape = KNOWN["mixtral-8x7b"]
    one = roofline._weights_read(shape, 1)
    assert one == pytest.approx(12.8e9, rel=0.02)  # two of eight
    assert roofline._weights_read(shape, 1000) == pytest.approx(shape.parameters, rel=0.01)


def test_a_core_computes_at_the_measured_rate():
    machine = machine_of(ClusterConfig(gpus_per_node=0, cpus_per_node=2))
    shape = KNOWN["qwen2.5-0.5b"]
    found = roofline.score_seconds(machine, shape, sequences=1, tokens=100, dtype="float32", cores=0.4)
    assert found == pytest.approx(roofline.forward_flops(shape, sequences=1, tokens=100) / 65e9)


def test_weights_travel_through_host_memory():
    whole = LLAMA.parameters * 2
    one_node, plain = replace(H100, nodes=1), LearnerConfig()
    expected = roofline.SYNC_S + 2 * whole / HOST_COPY + 2 * whole / PCIE
    assert roofline.sync_seconds(one_node, LLAMA, plain, "bfloat16") == pytest.approx(expected)
    elsewhere = expected + whole / HOST_COPY + whole / (50e9 * 0.8)
    assert roofline.sync_seconds(H100, LLAMA, plain, "bfloat16") == pytest.approx(elsewhere)


def test_adapters_travel_alone():
    lora = LearnerConfig.model_validate({"lora": {"rank": 16}})
    adapters = 4 * LLAMA.lora_parameters(16, None)
    whole = LLAMA.parameters * 2
    assert adapters < 0.02 * whole
    expected = roofline.SYNC_S + (adapters + 3 * whole) / HOST_COPY + (adapters + whole) / PCIE
    assert roofline.sync_seconds(replace(H100, nodes=1), LLAMA, lora, "bfloat16") == pytest.approx(expected)
