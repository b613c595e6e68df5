"""The engine's part of a checkpoint: exact, on any number of ranks, under any ZeRO stage, for every optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.group import ActorGroup, Role
from rayllm.config.common import LoraConfig
from rayllm.models.loading import load_causal_lm
from tests.actors.test_engine import IDS, Rank, free_port, language_loss, make, ranks  # noqa: F401

RATES = (1e-2, 5e-3, 2e-3)


@pytest.fixture(scope="module")
def one_rank(local_ray):
    """A process that is the only rank."""
    settings = {"port": free_port(), "world_size": 1}
    group = ActorGroup(Role("rank", 1, 0.5, 0), Rank, lambda rank: {"rank": rank, **settings})
    group.call(Rank.join)
    yield lambda function, *args: group.call(Rank.run, function, *args)
    group.stop()


def engine_of(folder: str, learner: dict):
    optimizer = learner.pop("optimizer", None)
    return make(load_causal_lm(folder), optimizer=optimizer, **learner)


def update(engine, rate: float) -> None:
    """One step on both rows, whatever the number of ranks: the loss is the sum of the ranks' parts."""
    mine = [IDS[row : row + 1] for row in range(engine.rank, len(IDS), engine.world_size)]
    engine.update(mine, lambda ids: language_loss(engine, ids) / len(IDS), learning_rate=rate)


def state_of(engine) -> dict:
    """The optimizer's masters and state, piece by piece."""
    found = {}
    for piece in engine._pieces():
        found[piece.name, piece.start, "weight"] = piece.of(piece.master).clone()
        for key, value in engine._inner.state[piece.master].items():
            scalar = key == "step"
            found[piece.name, piece.start, key] = torch.tensor(float(value)) if scalar else piece.of(value).clone()
    return found


def train_and_save(rank, folder, out, learner):
    """Two steps, a checkpoint, a third step: what a resumed run must end with."""
    engine = engine_of(folder, dict(learner))
    for rate in RATES[:2]:
        update(engine, rate)
    files = engine.save(Path(out))
    engine.sum_over_ranks(0.0)
    update(engine, RATES[2])
    return engine.state_dict(), state_of(engine), files


def load_and_train(rank, folder, out, learner):
    engine = engine_of(folder, dict(learner))
    update(engine, 0.5)  # of a state that must go
    engine.load(Path(out))
    update(engine, RATES[2])
    return engine.state_dict(), state_of(engine)


KINDS = {
    **{f"ZeRO-{stage} {dtype}": {"zero_stage": stage, "dtype": dtype} for stage in range(4) for dtype in ("float32", "bfloat16")},
    "Muon": {"zero_stage": 0, "optimizer": {"name": "muon"}},
    "Muon bfloat16": {"zero_stage": 0, "dtype": "bfloat16", "optimizer": {"name": "muon"}},
    "offload": {"zero_stage": 2, "offload_optimizer": True},
    "offload all": {"zero_stage": 3, "offload_parameters": True},
    "LoRA with dropout": {"zero_stage": 2, "lora": LoraConfig(rank=3, dropout=0.3)},
    "LoRA ZeRO-3": {"zero_stage": 3, "lora": LoraConfig(rank=3)},
    "last block": {"zero_stage": 1, "trainable_layers": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.scorecard("R56")
def test_a_resumed_run_ends_with_the_very_same_bits(ranks, tiny_model_dir, tmp_path, kind):  # noqa: F811
    learner = KINDS[kind]
    expected = ranks(train_and_save, str(tiny_model_dir), str(tmp_path), learner)
    found = ranks(load_and_train, str(tiny_model_dir), str(tmp_path), learner)
    for (weights, state, _), (again, state_again) in zip(expected, found, strict=True):
        for name, tensor in weights.items():
            assert torch.equal(tensor, again[name]), name
        assert state.keys() == state_again.keys() and len(state) > 3
        for place, tensor in state.items():
            assert torch.equal(tensor, state_again[place]), place
    files = {name for *_, written in expected for name in written}
    assert {path.name for path in tmp_path.iterdir()} == {Path(name).name for name in files}


@pytest.mark.parametrize("written", [0, 1, 2, 3])
@pytest.mark.scorecard("R57")
def test_any_number_of_ranks_and_any_stage_reads_it(ranks, one_rank, tiny_model_dir, tmp_path, written):  # noqa: F811
    """2 ranks to 1, to 2 of another stage, and back from 1 to 2."""
    model = str(tiny_model_dir)
    expected = ranks(train_and_save, model, str(tmp_path / "two"), {"zero_stage": written})[0][0]
    found = [one_rank(load_and_train, model, str(tmp_path / "two"), {"zero_stage": 3 - written})[0][0]]
    found.append(ranks(load_and_train, model, str(tmp_path / "two"), {"zero_stage": (written + 1) % 4})[0][0])
    one_rank(train_and_save, model, str(tmp_path / "one"), {"zero_stage": written})
    found.append(ranks(load_and_train, model, str(tmp_path / "one"), {"zero_stage": written})[0][0])
    for weights in found:
        for name, tensor in expected.items():
            # The gradient's rounding differs between the sums of one rank and of two; Adam's step is up to the rate.
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5, msg=name)


def load_error(rank, folder, out, learner):
    try:
        engine_of(folder, dict(learner)).load(Path(out))
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.scorecard("R30", "R35")
def test_what_is_no_checkpoint_of_this_model_is_an_error(ranks, tiny_model_dir, tmp_path):  # noqa: F811
    """DeepSpeed's own loading tells nothing of a missing folder, and of a missing part by an empty message."""
    model, learner = str(tiny_model_dir), {"zero_stage": 2}
    message = ranks(load_error, model, str(tmp_path / "none"), learner)[0]
    assert message.startswith("CheckpointError: no complete checkpoint in")
    ranks(train_and_save, model, str(tmp_path), learner)
    message = ranks(load_error, model, str(tmp_path), {"zero_stage": 2, "trainable_layers": 1})[0]
    assert "is of another model, or a part is gone: missing [], unknown ['model.embed_tokens.weight'" in message
    first, second = tmp_path / "part-0-0.safetensors", tmp_path / "part-1-0.safetensors"
    tensors, others = load_file(first), load_file(second)
    # The parameter that both ranks have a part of.
    split = next(n for n in (entry.rsplit("|")[-1] for entry in others) if f"exp_avg|0|{n}" in tensors)
    less = {entry: tensor for entry, tensor in tensors.items() if entry != f"exp_avg|0|{split}"}
    facts = {"updates": "2", "skipped_in_a_row": "0", "tensors": str(len(tensors))}
    save_file(less, first, metadata=facts)
    for message in ranks(load_error, model, str(tmp_path), learner):  # every rank knows, none waits for the other
        assert f"has {len(less)} tensors, {len(tensors)} were written" in message
    save_file(less, first, metadata={**facts, "tensors": str(len(less))})
    for message in ranks(load_error, model, str(tmp_path), learner):
        assert f"values of {split} (exp_avg)" in message
    first.unlink()
    for message in ranks(load_error, model, str(tmp_path), learner):
        assert "a part is gone" in message
