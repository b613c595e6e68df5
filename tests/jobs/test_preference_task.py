"""The preference task on real engines: micro-batches, ranks, the reference's cache, adapters."""

from __future__ import annotations

import copy
import socket

import numpy as np
import pytest
import torch

from actors.group import ActorGroup, Role
from jobs.preference import choose, digest
from jobs.preference_task import PreferenceTask
from rayllm.algorithms.logprobs import token_logprobs
from rayllm.algorithms.preference import preference_loss
from rayllm.config.base import load_config
from rayllm.config.preference import PreferenceConfig
from rayllm.data.preferences import Feedback, Ranking
from rayllm.models.engine import Engine, init_distributed
from rayllm.models.loading import load_causal_lm

SETTINGS = {
    "dpo": ("label_smoothing=0.1",),
    "ipo": ("sft_coef=0.3", "pairs=best_worst"),
    "kto": ("undesirable_weight=2",),
    "orpo": ("sft_coef=1",),
    "simpo": ("beta=2", "target_margin=0.5"),
}


def rankings(num: int, seed: int) -> list[Ranking]:
    """Random responses of several lengths; some prompts have two, some four with ties."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(num):
        prompt = rng.integers(3, 300, size=rng.integers(2, 9))
        ranks = [[0, 1], [2, 0, 1, 1], [0, 1, 2]][index % 3]
        sequences = [np.concatenate([prompt, rng.integers(3, 300, size=rng.integers(1, 12))]) for _ in ranks]
        found.append(Ranking(sequences, ranks, len(prompt)))
    return found


def feedback(rankings: list[Ranking]) -> list[Feedback]:
    return [
        Feedback(s, r.num_prompt_tokens, rank == 0)
        for r in rankings
        for s, rank in zip(r.sequences, r.ranks, strict=True)
    ]


def make_task(model, kind: str, *overrides: str) -> PreferenceTask:
    keys = [f"model={model}", "run_dir=unused", "preferences=unused", "heldout_preferences=unused", f"kind={kind}",
            "batch_size=8", "learner.zero_stage=0", "optimizer.warmup_steps=0", "optimizer.learning_rate=1e-3"]  # fmt: skip
    config = load_config(PreferenceConfig, None, [*keys, *SETTINGS.get(kind, ()), *overrides]).config
    data = rankings(16, 0), rankings(7, 1)
    train, heldout = (choose(feedback(items) if kind == "kto" else items, config) for items in data)
    return PreferenceTask(config, train, heldout, 0, 4, digest("model", "float32", [*train, *heldout]))


class Plain:
    """A module in the engine's place, on one rank: gradients add up in it, and no optimizer blurs them."""

    world_size, rank, device = 1, 0, torch.device("cpu")

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def __call__(self, **inputs):
        return self.module(**inputs)

    def train(self, mode: bool) -> None:
        self.module.train(mode)

    def sum_over_ranks(self, value) -> float:
        return float(value)

    def sum_tensor(self, values):
        return values


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_gradient_does_not_depend_on_micro_batches_or_the_number_of_ranks(tiny_model_dir, tmp_path, kind):
    found = []
    for overrides, world_size in (((), 1), (("micro_batch_size=4",), 1), (("micro_batch_tokens=48",), 2)):
        task = make_task(tiny_model_dir, kind, *overrides)
        engine = Plain(task.build())
        task.prepare(engine, tmp_path)
        with torch.no_grad():  # away from the reference, to flatter distributions: random tokens become more likely
            for parameter in engine.module.parameters():
                parameter.mul_(0.9)
        parts = [task.micro_batches(0, rank, world_size) for rank in range(world_size)]
        assert len({len(part) for part in parts}) == 1
        micro_batches = [micro_batch for part in parts for micro_batch in part]
        task.begin_step(engine, micro_batches)
        for micro_batch in micro_batches:
            task.loss(engine, micro_batch).backward()
        gradient = torch.cat([p.grad.flatten() for p in engine.module.parameters()])
        found.append((gradient, task.step_metrics(engine), len(micro_batches)))
    (whole, metrics, once), *others = found
    assert kind != "kto" or metrics["train/reference_point"] > 0.1
    for gradient, others_metrics, times in others:
        assert times > once and (gradient - whole).abs().max() < 1e-5 * whole.abs().max()
        assert others_metrics == pytest.approx(metrics, abs=1e-5)


class Rank:
    """A process of a group; tasks run in it."""

    def __init__(self, rank: int, world_size: int, port: int) -> None:
        import os

        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        torch.set_num_threads(1)

    def join(self) -> None:
        init_distributed("gloo")

    def run(self, function, *args):
        return function(*args)


@pytest.fixture(scope="module")
def groups(local_ray):
    """World size -> call of a function on every rank."""
    found = {}
    for size in (1, 2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = {"world_size": size, "port": port}
        found[size] = ActorGroup(Role("rank", size, 0.5, 0), Rank, lambda rank, a=arguments: {"rank": rank, **a})
        found[size].call(Rank.join)
    yield {size: lambda function, *args, g=group: g.call(Rank.run, function, *args) for size, group in found.items()}
    for group in found.values():
        group.stop()


def learn(task, folder, steps=3):
    """Train, as the worker's loop does; what every step and the held-out data say."""
    engine = Engine(task.build(), task.config.optimizer, task.config.learner)
    task.prepare(engine, folder)
    told = []
    for step in range(steps):
        micro_batches = task.micro_batches(step, engine.rank, engine.world_size)
        task.begin_step(engine, micro_batches)
        stats = engine.update(micro_batches, lambda batch: task.loss(engine, batch), learning_rate=1e-3)
        told.append({**task.step_metrics(engine), "grad_norm": stats.grad_norm})
    with torch.no_grad():
        told.append(task.evaluate(engine))
    return told


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_two_ranks_learn_what_one_does(groups, tiny_model_dir, tmp_path, kind):
    wide = make_task(tiny_model_dir, kind)
    (expected,) = groups[1](learn, wide, tmp_path)
    for name, overrides in (("rows", ["micro_batch_size=4"]), ("tokens", ["micro_batch_tokens=48"])):
        folder = tmp_path / name
        folder.mkdir()
        first, second = groups[2](learn, make_task(tiny_model_dir, kind, *overrides), folder)
        for one, two, whole in zip(first, second, expected, strict=True):
            assert one == pytest.approx(two)
            assert one == pytest.approx(whole, rel=2e-3, abs=2e-4)
    assert expected[1]["train/loss"] != expected[0]["train/loss"]
    assert abs(expected[0]["train/kl"]) < 1e-4 and abs(expected[2]["train/kl"]) > 1e-3


def test_the_loss_is_the_mean_over_prompts_of_the_mean_over_pairs(groups, tiny_model_dir, tmp_path):
    """Against a plain loop over pairs, one sequence at a time."""
    task = make_task(tiny_model_dir, "dpo", "batch_size=3", "label_smoothing=0")
    model, other = load_causal_lm(tiny_model_dir), copy.deepcopy(task)
    (told,) = groups[1](learn, other, tmp_path, 2)

    def logprob(sequence, start):
        tokens = torch.from_numpy(sequence)[None]
        return token_logprobs(model(input_ids=tokens).logits, tokens)[0, start:].sum()

    def loss(rows):
        per_prompt = []
        for row in rows:
            comparison = task.train[row]
            nats = torch.stack([logprob(s, comparison.num_prompt_tokens) for s in comparison.sequences])
            refs = torch.stack([start_nats[row][i] for i in range(len(nats))])
            pairs = [preference_loss(nats[i, None], nats[j, None], refs[i, None], refs[j, None], beta=0.1)[0]
                     for i, j in comparison.pairs]  # fmt: skip
            per_prompt.append(torch.stack(pairs).mean())
        return torch.stack(per_prompt).mean()

    rows = task._order.rows(0).tolist()
    with torch.no_grad():
        start_nats = {
            row: [logprob(s, task.train[row].num_prompt_tokens) for s in task.train[row].sequences] for row in rows
        }
    value = loss(rows)
    value.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert told[0]["train/loss"] == pytest.approx(value.item(), abs=1e-6)
    assert told[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def cached(task, folder):
    """Compute, read, and compute again for other data; how often the model ran in each."""
    engine = Engine(task.build(), task.config.optimizer, task.config.learner)
    calls, forward = [], engine.module.forward
    engine.module.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    counts, found = [], []
    for data_id in (task.data_id, task.data_id, "0" * 64):
        again = copy.deepcopy(task)
        again.data_id = data_id
        again.prepare(engine, folder)
        engine.gather(None)  # rank 0 has written the file: who looked for it before would have all compute anew
        counts.append(len(calls))
        found.append(np.concatenate(again._ref_logprobs))
        calls.clear()
    assert np.array_equal(found[0], found[1]) and np.allclose(found[0], found[2])
    return counts


def test_reference_logprobs_are_computed_once(groups, tiny_model_dir, tmp_path):
    task = make_task(tiny_model_dir, "kto", "micro_batch_size=16")
    for counts in groups[2](cached, task, tmp_path):
        assert counts[0] > 0 and counts == [counts[0], 0, counts[0]]
    assert len(list(tmp_path.glob("reference-*.npy"))) == 2
    free = make_task(tiny_model_dir, "simpo")
    groups[1](learn, free, tmp_path / "none", 1)  # the folder does not exist: nothing is written


def adapted(task, folder):
    """The reference before training, and with the trained adapters switched off."""
    engine = Engine(task.build(), task.config.optimizer, task.config.learner)
    task.prepare(engine, folder)
    before = np.concatenate(task._ref_logprobs)
    for step in range(2):
        micro_batches = task.micro_batches(step, 0, 1)
        engine.update(micro_batches, lambda batch: task.loss(engine, batch), learning_rate=1e-2)
    return before, task._compute_reference(engine), task.evaluate(engine)["eval/kl"]


def test_adapters_switched_off_are_the_reference(groups, tiny_model_dir, tmp_path):
    task = make_task(tiny_model_dir, "dpo", "learner.lora.rank=4")
    ((before, after, drift),) = groups[1](adapted, task, tmp_path)
    assert np.allclose(before, after, atol=1e-4) and abs(drift) > 1e-2
