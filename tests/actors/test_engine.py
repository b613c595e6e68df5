"""The DeepSpeed engine on two ranks over gloo: skipped steps, masters, optimizers, offload, training a part."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from actors.group import ActorGroup, Role
from rayllm.config.common import LearnerConfig, LoraConfig, OptimizerConfig
from rayllm.models.engine import Engine, init_distributed
from rayllm.models.heads import ScalarModel
from rayllm.models.loading import load_causal_lm

IDS = torch.tensor([[5, 9, 17, 33, 6, 80], [7, 100, 3, 54, 201, 11]])


class Rank:
    """A process of the group; engines are made and dropped in it."""

    def __init__(self, rank: int, port: int, world_size: int = 2) -> None:
        import os

        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        torch.set_num_threads(1)
        self.rank = rank

    def join(self) -> None:
        init_distributed("gloo")

    def run(self, function, *args):
        return function(self.rank, *args)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def ranks(local_ray):
    def start() -> ActorGroup:
        port = free_port()
        group = ActorGroup(Role("rank", 2, 0.5, 0), Rank, lambda rank: {"rank": rank, "port": port})
        group.call(Rank.join)
        return group

    def run(function, *args):
        nonlocal group
        try:
            return group.call(Rank.run, function, *args)
        except Exception:  # the other rank may wait for the one that failed, and for ever
            group.stop()
            group = start()
            raise

    group = start()
    yield run
    group.stop()


def make(module, *, optimizer: dict | None = None, **learner) -> Engine:
    return Engine(module, OptimizerConfig(weight_decay=0.0, **(optimizer or {})), LearnerConfig(**learner))


def small_module() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3))


def snapshot(engine: Engine) -> list[torch.Tensor]:
    """Weights, and masters and moments of the optimizer."""
    inner = getattr(engine._engine.optimizer, "optimizer", engine._engine.optimizer)
    named = [(master, sorted(values.items())) for master, values in inner.state.items()]
    state = [t for master, values in named for t in (master, *(v for _, v in values)) if torch.is_tensor(t)]
    assert len(state) >= 3
    return [t.detach().clone() for t in [*engine.state_dict().values(), *state]]


STAGES = [(stage, dtype) for stage in range(4) for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize("bad", ["loss", "gradient"])
@pytest.mark.scorecard("R51")
def test_a_step_that_is_not_finite_changes_no_bit_on_any_rank(ranks, bad):
    def skip(rank, bad):
        def loss_fn(kind):
            y = engine(x).square().sum()
            if kind == "good" or rank == 0:
                return y
            return y * torch.nan if bad == "loss" else torch.sqrt(y * 0)  # 0, of which the derivative is inf * 0

        results = []
        for stage, dtype in STAGES:
            engine = make(small_module(), zero_stage=stage, dtype=dtype, max_skipped_steps=2)
            x = torch.full((2, 6), 0.5 + rank, dtype=getattr(torch, dtype))
            first = engine.update(["good", "good"], loss_fn, learning_rate=0.1)
            before = snapshot(engine)
            for order in (["good", "bad"], ["bad", "good"]):
                stats = engine.update(order, loss_fn, learning_rate=0.1)
                assert stats.skipped and not first.skipped, (stage, dtype)
                after = snapshot(engine)
                changed = [(a, b) for a, b in zip(before, after, strict=True) if not torch.equal(a, b)]
                assert not changed, (stage, dtype, order, changed)
            stats = engine.update(["good"], loss_fn, learning_rate=0.1)
            after = snapshot(engine)
            assert not stats.skipped and not torch.equal(before[0], after[0]), (stage, dtype)
            assert all(t.isfinite().all() for t in after), (stage, dtype)
            for _ in range(2):
                engine.update(["bad"], loss_fn, learning_rate=0.1)
            try:
                engine.update(["bad"], loss_fn, learning_rate=0.1)
            except RuntimeError as error:
                results.append(str(error))
        return results

    for messages in ranks(skip, bad):
        assert len(messages) == len(STAGES)
        for message in messages:
            assert "the loss is" in message or bad != "loss"
            assert "the gradient norm is" in message or bad == "loss"
            assert "3 optimizer steps in a row were skipped (learner.max_skipped_steps=2)" in message


def test_updates_below_the_precision_of_bfloat16_are_not_lost(ranks):
    def creep(rank):
        moved = []
        for stage in range(4):
            module = torch.nn.Linear(8, 8, bias=False)
            torch.nn.init.ones_(module.weight)
            engine = make(module, zero_stage=stage, dtype="bfloat16")
            x = torch.ones(1, 8, dtype=torch.bfloat16)
            for _ in range(60):  # each by 1e-4, a fortieth of the distance to the next bfloat16 below 1
                engine.update([x], lambda x, engine=engine: engine(x).sum(), learning_rate=1e-4)
            (weight,) = engine.state_dict().values()
            moved.append((str(weight.dtype), weight.unique().tolist()))
        return moved

    for moved in ranks(creep):
        for dtype, values in moved:
            assert dtype == "torch.bfloat16"
            assert values == pytest.approx([1 - 60e-4], abs=0.002)


def language_loss(engine, ids):
    return torch.nn.functional.cross_entropy(engine(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_muon_is_that_of_torch_on_the_mean_gradient(ranks, tiny_model_dir):
    def train(rank, folder, dtype):
        engine = make(load_causal_lm(folder), zero_stage=0, dtype=dtype, optimizer={"name": "muon", "beta2": 0.9})
        for rate in (1e-2, 2e-3):
            stats = engine.update(
                [IDS[rank : rank + 1]], lambda ids: language_loss(engine, ids) / engine.world_size, learning_rate=rate
            )
        return engine.state_dict(), stats.grad_norm

    one, two = ranks(train, tiny_model_dir, "float32")
    model = load_causal_lm(tiny_model_dir)
    named = dict(model.named_parameters())
    hidden = [p for name, p in named.items() if name.startswith("model.layers") and p.dim() == 2]
    others = [p for name, p in named.items() if not (name.startswith("model.layers") and p.dim() == 2)]
    assert len(hidden) == 14 and "model.embed_tokens.weight" in named
    parts = [
        torch.optim.Muon(hidden, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.9), weight_decay=0.0),
    ]
    for rate in (1e-2, 2e-3):
        model.zero_grad()
        language_loss(model, IDS).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in parts:
            part.param_groups[0]["lr"] = rate
            part.step()
    assert one[1] == pytest.approx(float(norm), rel=1e-5)
    for name, expected in named.items():
        torch.testing.assert_close(one[0][name], two[0][name], rtol=0, atol=0)
        torch.testing.assert_close(one[0][name], expected.detach(), rtol=0, atol=2e-4)  # its iteration is in bfloat16
    low, _ = ranks(train, tiny_model_dir, "bfloat16")
    start = load_causal_lm(tiny_model_dir).state_dict()
    for name in (name for name, p in named.items() if p.dim() == 2):
        moved, expected = low[0][name].float() - start[name], one[0][name] - start[name]
        # A gradient of ten tokens has low rank, and Muon gives its rounding errors the size of the rest.
        assert torch.nn.functional.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.6


def test_offloading_changes_nothing(ranks, tiny_model_dir):
    def train(rank, folder, learner):
        engine = make(load_causal_lm(folder), **learner)
        for _ in range(2):
            engine.update([IDS[rank : rank + 1]], lambda ids: language_loss(engine, ids), learning_rate=1e-3)
        return engine.state_dict()

    for dtype in ("float32", "bfloat16"):
        expected = ranks(train, tiny_model_dir, {"zero_stage": 2, "dtype": dtype})[0]
        for learner in (
            {"zero_stage": 1, "offload_optimizer": True},
            {"zero_stage": 2, "offload_optimizer": True},
            {"zero_stage": 3, "offload_optimizer": True},
            {"zero_stage": 3, "offload_parameters": True},
        ):
            for weights in ranks(train, tiny_model_dir, {**learner, "dtype": dtype}):
                for name, tensor in weights.items():
                    scale = {"float32": 2e-5, "bfloat16": 2e-3}[dtype]
                    torch.testing.assert_close(tensor, expected[name], rtol=scale, atol=scale, msg=f"{learner} {name}")


def lora(**fields) -> dict:
    return {"lora": LoraConfig(rank=3, alpha=6, **fields)}


def logits(module, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return module(input_ids=ids).logits


@pytest.mark.parametrize("stage", range(4))
def test_adapters_of_the_policy(ranks, tiny_model_dir, tmp_path, stage):
    def train(rank, folder, out):
        engine = make(load_causal_lm(folder), zero_stage=stage, gradient_checkpointing=True, **lora())
        for _ in range(3):
            with engine.reference(), torch.no_grad():
                engine.train(False)
                reference = logits(engine)
            stats = engine.update([IDS[rank : rank + 1]], lambda ids: language_loss(engine, ids), learning_rate=1e-2)
        engine.train(False)
        trained, merged = logits(engine), engine.state_dict()
        engine.save(Path(out) / "checkpoint")
        engine.save_adapter(Path(out) / "adapter")
        again = make(load_causal_lm(folder), zero_stage=stage, **lora())
        engine.sum_over_ranks(0.0)  # all parts are written
        again.load(Path(out) / "checkpoint")
        restored = again.state_dict()
        return reference, trained, merged, restored, (engine.num_trained, engine.num_parameters), stats.grad_norm

    base = load_causal_lm(tiny_model_dir)
    weights = base.state_dict()
    one, two = ranks(train, str(tiny_model_dir), str(tmp_path))
    reference, trained, merged, restored, counts, grad_norm = one
    assert torch.equal(reference, logits(base)) and torch.equal(two[0], reference)  # off is the base, to the bit
    assert grad_norm > 0 and not torch.allclose(trained, reference, atol=1e-2)
    assert merged.keys() == dict(base.named_parameters()).keys()
    changed = {name.split(".")[-2] for name in merged if not torch.equal(merged[name], weights[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for name in merged:
        assert torch.equal(two[2][name], merged[name]) and torch.equal(restored[name], merged[name])
    whole = load_causal_lm(tiny_model_dir)
    whole.load_state_dict(merged, strict=False)
    torch.testing.assert_close(logits(whole), trained, rtol=1e-4, atol=1e-4)
    from peft import PeftModel

    plain = PeftModel.from_pretrained(load_causal_lm(tiny_model_dir), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(plain), trained, rtol=1e-5, atol=1e-5)
    trained_parameters = sum(p.numel() for name, p in plain.named_parameters() if "lora" in name)
    assert counts == (trained_parameters, trained_parameters + sum(p.numel() for p in base.parameters()))
    for name, tensor in plain.merge_and_unload().named_parameters():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_of_the_critic_and_its_whole_head(ranks, tiny_model_dir, tiny_tokenizer, tmp_path, stage):
    def train(rank, folder, out):
        engine = make(ScalarModel.from_folder(folder), zero_stage=stage, **lora(target_modules=("q_proj", "v_proj")))
        mask = torch.ones_like(IDS[:1]).bool()
        for _ in range(2):
            engine.update(
                [IDS[rank : rank + 1]], lambda ids: (engine(ids, mask) - 1).square().sum(), learning_rate=1e-2
            )
        engine.save_adapter(Path(out) / "adapter")
        engine.train(False)
        with torch.no_grad():
            return engine.state_dict(), engine(IDS, torch.ones_like(IDS).bool())[:, -1]

    from peft import PeftModel

    from rayllm.models.loading import load_sequence_classifier, save_model

    start = ScalarModel.from_folder(tiny_model_dir, seed=3)
    save_model(start.classifier, tiny_tokenizer, tmp_path / "reward")
    merged, scores = ranks(train, str(tmp_path / "reward"), str(tmp_path))[0]
    changed = {name for name, tensor in start.named_parameters() if not torch.equal(tensor, merged[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj", "score"}
    assert merged.keys() == dict(start.named_parameters()).keys()
    plain = PeftModel.from_pretrained(load_sequence_classifier(tmp_path / "reward"), str(tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits.squeeze(-1), scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_only_the_last_block_is_trained(ranks, tiny_model_dir, stage):
    def train(rank, folder):
        engine = make(load_causal_lm(folder), zero_stage=stage, trainable_layers=1, gradient_checkpointing=True)
        engine.update([IDS[rank : rank + 1]], lambda ids: language_loss(engine, ids), learning_rate=1e-2)
        with pytest.raises(RuntimeError, match="no adapters to switch off"):
            engine.reference()
        return engine.state_dict()

    start = load_causal_lm(tiny_model_dir).state_dict()
    weights = ranks(train, str(tiny_model_dir))[0]
    changed = {name for name, tensor in weights.items() if not torch.equal(tensor, start[name])}
    assert changed == {name for name in weights if name.startswith("model.layers.1.") or name == "model.norm.weight"}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_optimizer_states_that_move_out_between_steps_change_no_bit(ranks, tiny_model_dir, tmp_path, stage, dtype):
    def train(rank, folder):
        def step(engine, number):
            return engine.update([IDS + number], lambda ids: language_loss(engine, ids), learning_rate=1e-2)

        found = []
        for moves in (False, True):
            engine = make(load_causal_lm(tiny_model_dir), zero_stage=stage, dtype=dtype)
            if moves:
                engine.offload_states()
            for number in range(3):
                engine.reload_states()
                step(engine, number)
                if moves:
                    engine.offload_states()
                    engine.offload_states()  # it is out already
            # Out of the way, it computes and gives its weights.
            with torch.no_grad():
                logits = engine(input_ids=IDS).logits.clone()
            weights = engine.state_dict()
            engine.reload_states()
            engine.save(Path(folder) / f"{moves}")
            step(engine, 3)
            last = snapshot(engine)
            again = make(load_causal_lm(tiny_model_dir), zero_stage=stage, dtype=dtype)
            again.offload_states()
            again.reload_states()
            again.load(Path(folder) / f"{moves}")
            step(again, 3)
            assert all(torch.equal(a, b) for a, b in zip(last, snapshot(again), strict=True))
            found.append([logits, *weights.values(), *last])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        return len(found[0])

    assert min(ranks(train, str(tmp_path))) > 3
