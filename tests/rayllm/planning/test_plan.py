"""A whole plan: what fits, what is advised where it does not, and what was measured on a machine."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from bench.models import SIZES
from bench.plan import compared, plan_of
from rayllm.config.plan import ClusterConfig, PlanConfig, WorkloadConfig
from rayllm.errors import InputError
from rayllm.planning.advice import blocked, nearest_fit
from rayllm.planning.balance import best_split, splits
from rayllm.planning.changes import is_valid, with_changes
from rayllm.planning.hardware import GIB, GPUS
from rayllm.planning.memory import Memory
from rayllm.planning.moves import cheapest
from rayllm.planning.plan import Plan, load_job, machine_of, make_plan, place
from rayllm.planning.roles import RoleSpec
from rayllm.planning.shapes import KNOWN
from rayllm.planning.sharing import Bundle, bundles_of
from tests.conftest import ROOT

LEARNER = {"gpus_per_actor": 1, "micro_batch_size": 4, "learner": {"dtype": "bfloat16"}}
SCORER = {"gpus_per_actor": 1, "micro_batch_size": 4}


def ppo(model: str = "qwen2.5-1.5b", **over) -> dict:
    return {
        "model": model,
        "prompts_per_step": 128,
        "policy": LEARNER,
        "critic": LEARNER,
        "reference": SCORER,
        "reward": SCORER,
        "rollout": {"gpus_per_actor": 1, "max_new_tokens": 512, "engine": {"max_model_len": 4096}},
        **over,
    }


def planned(settings: dict, *, job: str = "ppo", workload: dict | None = None, **cluster) -> Plan:
    config = PlanConfig.model_validate({"job": job, "settings": settings, "cluster": cluster})
    found = load_job(config)
    return make_plan(found, config.cluster, WorkloadConfig.model_validate(workload or {}))


def role(plan: Plan, name: str):
    return next(role for role in plan.roles if role.spec.name == name)


def test_what_fits_and_what_it_is_made_of():
    plan = planned(ppo())
    assert plan.fits and plan.gpus == 5
    assert [role.spec.name for role in plan.roles] == ["policy", "critic", "reference", "reward", "rollout"]
    policy = role(plan, "policy")
    n = KNOWN["qwen2.5-1.5b"].parameters
    assert policy.memory.weights == 2 * n and policy.memory.optimizer == 12 * n
    assert policy.spec.rows == 4 and policy.spec.tokens == 256 + 512
    assert plan.step_seconds == pytest.approx(sum(phase.seconds for phase in plan.phases))
    ahead = planned(ppo(max_policy_lag=1))
    rollout, score, update, sync = (phase.seconds for phase in ahead.phases)
    assert ahead.step_seconds == pytest.approx(max(rollout, score + update) + sync)
    assert plan.tokens_per_step == 128 * 512


def test_only_the_roles_of_the_algorithm_are_planned():
    grpo = planned(
        ppo(algorithm={"advantage": "grpo", "kl_coef": 0.0}, samples_per_prompt=4, reward={"source": "gold"})
    )
    assert [role.spec.name for role in grpo.roles] == ["policy", "reward", "rollout"]
    assert role(grpo, "reward").spec.shape is None
    lora = planned(ppo(policy={**LEARNER, "learner": {"dtype": "bfloat16", "lora": {"rank": 16}}}))
    assert "reference" not in [role.spec.name for role in lora.roles]
    assert role(lora, "policy").memory.optimizer < 0.02 * role(planned(ppo()), "policy").memory.optimizer


def test_a_cost_is_that_of_the_whole_cluster():
    plan = planned(ppo(), nodes=2, price_per_gpu_hour=2.0)
    assert plan.cost_per_thousand_steps == pytest.approx(1000 * plan.step_seconds / 3600 * 16 * 2.0)
    assert planned(ppo()).cost_per_thousand_steps is None


def test_need_against_have():
    plan = planned(ppo(policy={**LEARNER, "num_actors": 8}, critic={**LEARNER, "num_actors": 8}))
    assert "the roles need 19 GPUs (policy 8 x 1 + critic 8 x 1 + reference 1 x 1 + reward 1 x 1 + rollout 1 x 1), " \
           "the cluster has 8" in plan.problems[0]  # fmt: skip
    over = planned(ppo(rollout={"gpus_per_actor": 1, "engine": {"tensor_parallel_size": 2, "max_model_len": 4096}}))
    assert any("needs rollout.gpus_per_actor=2, got 1" in problem for problem in over.problems)
    long = planned(ppo("llama-3.2-3b", rollout={"gpus_per_actor": 1, "max_new_tokens": 512}), gpu="l4")
    assert any("one sequence of its max_model_len" in problem for problem in long.problems)
    with pytest.raises(InputError, match=r"a prompt of 8000 tokens .* the engine takes 4096"):
        planned(ppo(), workload={"prompt_tokens": 8000})
    with pytest.raises(InputError, match=r"cluster.gpu: 'h10' is not known. Did you mean h100"):
        planned(ppo(), gpu="h10")


def test_processes_stay_on_one_node():
    engines = {"num_actors": 3, "gpus_per_actor": 4, "max_new_tokens": 512,
               "engine": {"tensor_parallel_size": 4, "max_model_len": 4096}}  # fmt: skip
    plan = planned(ppo(prompts_per_step=120, rollout=engines), nodes=2, gpus_per_node=6)
    assert plan.gpus == 16 and "the roles need 16 GPUs" in plan.problems[0]
    plan = planned(ppo(prompts_per_step=120, rollout=engines), nodes=3, gpus_per_node=6)
    assert plan.fits
    used, left = place(plan.roles, plan.cluster)
    assert not left and len(used) == 3 and min(used) > 0
    wide = planned(ppo(prompts_per_step=120, rollout={**engines, "num_actors": 4}), nodes=4, gpus_per_node=5)
    assert wide.fits  # an engine and one other process on each
    torn = planned(ppo(prompts_per_step=120, rollout={**engines, "num_actors": 3}), nodes=6, gpus_per_node=3)
    assert "processes that find no node" in torn.problems[-1] and "3 of rollout" in torn.problems[-1]


@pytest.mark.parametrize("seed", range(6))
def test_advice_makes_too_small_a_cluster_fit(seed):
    """Random runs on random machines: where there is advice, the run with it fits; where there is none, some role
    fits on no GPU at all."""
    rng = random.Random(seed)
    advised = 0
    for _ in range(25):
        plan = planned(random_settings(rng), **random_cluster(rng))
        if plan.fits:
            continue
        advice = nearest_fit(plan)
        if advice is None:
            assert blocked(plan)
            continue
        advised += 1
        assert with_changes(plan, advice.changes).fits
        assert advice.plan.fits and is_valid(plan, advice.changes)
    assert advised > 5


def random_settings(rng: random.Random) -> dict:
    def learner() -> dict:
        return {
            "num_actors": ranks, "gpus_per_actor": 1, "micro_batch_size": rng.choice([1, 8, 64]),
            "learner": {
                "dtype": rng.choice(["float32", "bfloat16"]), "zero_stage": rng.choice([0, 1, 2, 3]),
                "gradient_checkpointing": rng.random() < 0.3,
            },
        }  # fmt: skip

    ranks = rng.choice([1, 2, 4, 8])
    rollout = {
        "num_actors": rng.choice([1, 2, 8]), "gpus_per_actor": rng.choice([1, 1, 0.5]),
        "max_new_tokens": rng.choice([128, 512, 1024]),
    }  # fmt: skip
    return {
        "model": rng.choice(list(KNOWN)), "prompts_per_step": rng.choice([64, 128, 512]),
        "samples_per_prompt": rng.choice([1, 4]), "policy": learner(), "critic": learner(),
        "reference": {"gpus_per_actor": rng.choice([1, 0.5])}, "reward": {"gpus_per_actor": rng.choice([1, 0.5])},
        "rollout": rollout,
    }  # fmt: skip


def random_cluster(rng: random.Random) -> dict:
    return {
        "nodes": rng.choice([1, 2, 4]), "gpus_per_node": rng.choice([4, 8]), "gpu": rng.choice(list(GPUS)),
        "memory_gib": rng.choice([64, 512, 2000]),
    }  # fmt: skip


def test_the_advice_is_the_nearest():
    """Only what is needed is changed, and the cheap before the dear."""
    big = {**LEARNER, "micro_batch_size": 64}
    plan = planned(ppo(policy=big))
    assert not plan.fits
    assert nearest_fit(plan).changes == {"policy.micro_batch_size": 16}
    assert not with_changes(plan, {"policy.micro_batch_size": 32}).fits
    seven = planned(ppo("qwen2.5-7b", policy={**LEARNER, "num_actors": 1}), memory_gib=2000)
    assert nearest_fit(seven).changes.get("policy.learner.zero_stage") is None  # one rank has nothing to share
    crowded = planned(ppo(policy={**LEARNER, "num_actors": 16}, critic={**LEARNER, "num_actors": 16}))
    advice = nearest_fit(crowded)
    assert "cluster.nodes" not in advice.changes and advice.plan.gpus <= 8
    shared = {"gpus_per_actor": 0.5, "max_new_tokens": 512, "engine": {"max_model_len": 4096}}
    assert nearest_fit(planned(ppo(rollout=shared))).changes == {"rollout.engine.gpu_memory_utilization": 0.475}


def test_an_engine_that_is_too_large_for_a_gpu_is_split_over_several():
    plan = planned(ppo("llama-3-70b"))
    spec = role(plan, "rollout").spec

    def fits(spec, memory):
        return memory.cache_needed <= memory.cache_size and memory.peak <= 79.1 * GIB

    changes, changed = next(cheapest(spec, machine_of(plan.cluster), fits))
    assert changes == {"rollout.engine.tensor_parallel_size": 2, "rollout.gpus_per_actor": 2.0}
    found = changed.memory(machine_of(plan.cluster))
    assert found.weights == 70_553_706_496 and found.concurrency >= 1  # 2 bytes, over two


def test_cpu_machines_get_advice_too():
    settings = {"model": "qwen2.5-0.5b", "prompts_per_step": 64, "rollout": {"engine": {"max_model_len": 1024}},
                "policy": {"micro_batch_size": 32}}  # fmt: skip
    plan = planned(settings, gpus_per_node=0, cpus_per_node=8, memory_gib=64)
    assert not plan.fits and "host memory" in plan.problems[0]
    advice = nearest_fit(plan)
    assert advice is not None and advice.plan.fits and advice.plan.host_bytes <= 64 * GIB
    assert not any(key.startswith("cluster.") for key in advice.changes)


def test_a_model_that_fits_nowhere_says_why():
    lines = blocked(planned(ppo("llama-3-70b"), gpu="b200"))
    assert any(line.startswith("reference fits on no GPU up to b200") and "lora" in line for line in lines)
    assert nearest_fit(planned(ppo("llama-3-70b"), gpu="b200")) is None


def test_the_best_split_is_the_fastest_of_all_that_fit():
    plan = planned(ppo(prompts_per_step=48), nodes=2)
    best = best_split(plan)
    assert best is not None and best.plan.fits and best.plan.gpus <= 16
    assert best.gpus("policy", "critic") + best.gpus("reference", "reward") + best.gpus("rollout") == best.plan.gpus
    tried = 0
    for ranks in range(1, 8):
        for scorers in range(1, 8 - ranks):
            for engines in range(1, 16 - 2 * ranks - 2 * scorers + 1):
                numbers = {
                    "policy": ranks,
                    "critic": ranks,
                    "reference": scorers,
                    "reward": scorers,
                    "rollout": engines,
                }
                changes = {f"{name}.num_actors": number for name, number in numbers.items()}
                if scorers != 5 and is_valid(plan, changes):  # powers of two and half-way between are looked at
                    other = with_changes(plan, changes)
                    tried += 1
                    assert not other.fits or other.step_seconds >= best.plan.step_seconds * (1 - 1e-9)
    assert tried > 50
    assert splits(planned(ppo(rollout={"gpus_per_actor": 0}))) == []


@pytest.mark.parametrize(
    ("job", "settings"),
    [
        ("sft", {"model": "qwen2.5-7b", "max_length": 2048, "batch_size": 64, "micro_batch_size": 2}),
        ("reward-model", {"model": "qwen2.5-7b", "max_length": 2048, "batch_size": 64, "micro_batch_size": 8}),
        ("pretrain", {"tokenizer": "qwen2.5-7b", "sequence_length": 2048, "batch_size": 64, "micro_batch_size": 4,
                      "model": {"hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 6144,
                                "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}}),
    ],
)  # fmt: skip
def test_training_jobs_are_planned_too(job, settings):
    workers = {"workers": {"num_workers": 8, "gpus_per_worker": 1}, "learner": {"dtype": "bfloat16"}}
    plan = planned({**settings, **workers}, job=job)
    (worker,) = plan.roles
    assert worker.spec.num_actors == 8 and worker.memory.optimizer == pytest.approx(
        12 * worker.spec.shape.parameters / 8
    )
    assert [phase.name for phase in plan.phases] == ["update"] and plan.step_seconds > 0
    per_prompt = 4 if job == "reward-model" else 1
    assert plan.tokens_per_step == 64 * per_prompt * 2048
    assert worker.spec.rows == {"sft": 2, "reward-model": 8, "pretrain": 4}[job]
    small = planned({**settings, **workers}, job=job, gpu="l4")
    advice = nearest_fit(small)
    assert small.fits or advice.plan.fits


SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
"""SmolLM2-135M."""

VOCAB_10M, SHAPE_10M = SIZES["10m"]

# `python -m bench.ppo` on two cores of an AMD EPYC (Zen 4) with 23.5 GiB, 2026-11-23: GiB that each process had for
# itself at its own worst moment, and seconds of a step. See docs/planning.md.
MEASURED = {
    "10M": {
        "config": {"model_type": "qwen3", "vocab_size": VOCAB_10M, "max_position_embeddings": 512,
                   "tie_word_embeddings": True, **SHAPE_10M},
        "overrides": [],
        "own": {"PolicyActor": 0.993, "CriticActor": 0.967, "RolloutActor": 0.829, "ReferenceActor": 0.340,
                "SourceActor": 0.334},
        "seconds": {"rollout": 2.32, "score": 2.71, "update": 6.01, "sync": 0.059, "step": 11.11},
    },
    "135M": {
        "config": SMOLLM2,
        "overrides": ["prompts_per_step=16", "reward.source=function", "reward.function=bench.workload:variety",
                      "rollout.engine.dtype=bfloat16", "rollout.engine.max_model_len=256"],
        "own": {"PolicyActor": 6.229, "CriticActor": 5.826, "RolloutActor": 1.586, "ReferenceActor": 1.066},
        "seconds": {"rollout": 4.29, "score": 6.65, "update": 21.48, "sync": 0.374, "step": 32.80},
    },
}  # fmt: skip


@pytest.mark.parametrize("size", MEASURED)
def test_planned_memory_is_within_20_percent_of_the_measured(size, tmp_path):
    measured = MEASURED[size]
    model = tmp_path / size
    model.mkdir()
    (model / "config.json").write_text(json.dumps(measured["config"]))
    result = {
        "algorithm": "ppo", "model": str(model), "lag": 0, "overrides": measured["overrides"],
        "machine": {"cores": 2, "memory_gib": 23.5}, "own_memory_gib": measured["own"],
        "warm": {name: {"median": seconds} for name, seconds in measured["seconds"].items()},
    }  # fmt: skip
    rows = compared(result, plan_of(result))
    assert len(rows) == len(measured["own"]) + 5
    page = (ROOT / "docs/planning.md").read_text()
    for what, planned_, measured_ in rows:
        if what.endswith("GiB"):
            assert planned_ == pytest.approx(measured_, rel=0.2), what
        assert f"| {size} {what} | {planned_:.2f} | {measured_:.2f} | {planned_ / measured_:.2f} |" in page


def test_the_cluster_can_be_told_apart_from_its_kind():
    plan = planned(ppo(), gpu_memory_gib=24.0)
    assert role(plan, "reference").available == pytest.approx(24 * 0.95 * GIB)
    assert ClusterConfig().gpu_memory_gib is None


def test_colocated_roles_share_gpus_memory_and_time_by_hand():
    eight = {name: {**(LEARNER if name in ("policy", "critic") else SCORER), "num_actors": 8}
             for name in ("policy", "critic", "reference", "reward")}  # fmt: skip
    engines = {"num_actors": 8, "gpus_per_actor": 1, "max_new_tokens": 512, "engine": {"max_model_len": 4096}}
    split = planned(ppo(**eight, rollout=engines), nodes=5)
    plan = planned(ppo(**eight, rollout=engines, placement={"mode": "colocated"}))
    assert split.gpus == 40 and plan.gpus == 8 and plan.fits, plan.problems
    policy, critic, reference, reward, rollout = plan.roles
    gpu = GPUS["h100"].memory
    # While the policy learns: the critic's weights and process, the frozen models', a sleeping engine's process.
    stay = [r.memory.weights + r.memory.runtime for r in (critic, reference, reward)]
    assert policy.available == pytest.approx(0.95 * gpu - sum(stay) - rollout.memory.runtime)
    assert rollout.memory.peak == pytest.approx(0.5 * gpu)
    # While the engine samples no optimizer state is on the GPU.
    assert rollout.available is not None and rollout.available < gpu - 2 * policy.memory.weights
    assert rollout.available > gpu - reference.memory.peak - reward.memory.peak - 2 * policy.memory.peak
    # What moves out is in the node's memory: 12 bytes a parameter, over the ranks, of each learner.
    n = KNOWN["qwen2.5-1.5b"].parameters
    alone = role(split, "policy")
    assert policy.memory.host - alone.memory.host == pytest.approx(12 * n / 8)
    update, turns = ({phase.name: phase.seconds for phase in p.phases}["update"] for p in (split, plan))
    assert turns > 1.8 * update  # policy and critic in turn, and the states' way
    assert best_split(plan) is None


def test_pairs_take_fewer_gpus_and_hold_both_models():
    plan = planned(ppo(placement={"mode": "pairs"}))
    assert plan.gpus == 3 and plan.fits
    policy, critic, reference, reward, rollout = plan.roles
    usable = 0.95 * GPUS["h100"].memory
    assert policy.available == pytest.approx(usable - reference.memory.peak)
    assert reward.available == pytest.approx(usable - critic.memory.peak)
    assert rollout.available == pytest.approx(GPUS["h100"].memory)
    small = planned(ppo(placement={"mode": "pairs"}), gpu="a10g", gpus_per_node=2)
    assert any("those on the same GPU leave" in problem for problem in small.problems)
    assert "the roles need 3 GPUs (policy with reference 1 x 1 + critic with reward 1 x 1 + rollout 1 x 1)" in " ".join(
        small.problems
    )


@pytest.mark.parametrize("counts", [(4, 4, 4), (7, 3, 5), (1, 8, 6), (6, 1, 12)])
def test_bundles_are_counted_as_if_each_was_made_by_itself(counts):
    """Of policy and critic, which share GPUs, rank i of each is in bundle i; a reward function has its own."""
    names = ("policy", "critic", "reward")
    found = [
        (RoleSpec(name=name, section=name, kind="plain", shape=None, num_actors=count, cpus=cpus, gpus=gpus,
                  share=names[:2] if gpus else ()), Memory(weights=0.0, runtime=8.0 * cpus, moment="always"))
        for name, count, cpus, gpus in zip(names, counts, (1.0, 2.0, 4.0), (1.0, 1.0, 0.0), strict=True)
    ]  # fmt: skip
    expected: Counter = Counter()
    for rank in range(max(counts[:2])):
        here = [spec for (spec, _), count in zip(found[:2], counts[:2], strict=True) if rank < count]
        host = sum(memory.host for spec, memory in found if spec in here)
        expected[Bundle(tuple(spec.name for spec in here), sum(spec.cpus for spec in here), 1.0, host)] += 1
    expected[Bundle(("reward",), 4.0, 0, 32.0)] += counts[2]
    assert bundles_of(found) == expected
