"""Pieces of parameters written under one cut and read under another, without DeepSpeed: plain torch, cut at random."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayllm.checkpoints import CheckpointError
from rayllm.models import pieces as module
from rayllm.models.pieces import Piece, make_step, pieces_of, read_pieces, trained_sizes, write_pieces


def trained_module(seed: int, steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 1))
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(3, 7)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def cut(pieces: list[Piece], num_ranks: int, seed: int) -> list[list[Piece]]:
    """Every parameter cut at random places; each part goes to some rank."""
    rng = random.Random(seed)
    ranks = [[] for _ in range(num_ranks)]
    for piece in pieces:
        places = sorted({0, piece.numel, *(rng.randint(0, piece.numel) for _ in range(num_ranks - 1))})
        for start, end in zip(places, places[1:], strict=False):
            rng.choice(ranks).append(Piece(piece.name, start, end - start, piece.master, start))
    return ranks


def write(folder, model, optimizer, ranks: int) -> None:
    pieces = pieces_of(model, optimizer, zero_stage=0, rank=0)
    for rank, mine in enumerate(cut(pieces, ranks, seed=ranks)):
        write_pieces(mine, optimizer.state, folder, rank=rank, facts={"updates": "3"})


def read(folder, model, optimizer, ranks: int = 1) -> dict[str, str]:
    step = partial(make_step, optimizer, torch.device("cpu"))
    for mine in cut(pieces_of(model, optimizer, zero_stage=0, rank=0), ranks, seed=99):
        facts = read_pieces(mine, trained_sizes(model), optimizer.state, folder, make_step=step)
    return facts


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("part_bytes", [2**28, 50])
def test_what_is_read_is_what_was_written(tmp_path, monkeypatch, ranks, part_bytes):
    monkeypatch.setattr(module, "PART_BYTES", part_bytes)
    model, optimizer = trained_module(0, steps=3)
    write(tmp_path, model, optimizer, ranks)
    other, theirs = trained_module(1, steps=1)
    assert read(tmp_path, other, theirs)["updates"] == "3"
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two) == one.requires_grad  # what is frozen comes from elsewhere
        for key, value in optimizer.state[one].items():
            assert torch.equal(value, theirs.state[two][key]) and value.dtype == theirs.state[two][key].dtype
    assert len(list(tmp_path.iterdir())) >= ranks * (1 if part_bytes > 50 else 2)
    for made in (optimizer, theirs):  # and both go on alike
        for p in (p for group in made.param_groups for p in group["params"]):
            p.grad = torch.ones_like(p)
        made.step()
    assert torch.equal(model[0].weight, other[0].weight)


def test_before_the_first_step_there_is_no_state(tmp_path):
    model, optimizer = trained_module(0, steps=0)
    write(tmp_path, model, optimizer, 2)
    other, theirs = trained_module(1, steps=2)
    read(tmp_path, other, theirs)
    assert not theirs.state and torch.equal(model[1].weight, other[1].weight)


def test_what_does_not_fit_is_named(tmp_path):
    model, optimizer = trained_module(0, steps=1)
    with pytest.raises(CheckpointError, match="no complete checkpoint in"):
        read(tmp_path, model, optimizer)
    write(tmp_path, model, optimizer, 1)
    other = torch.nn.Sequential(torch.nn.Linear(7, 4), torch.nn.Linear(4, 1))
    with pytest.raises(CheckpointError, match=r"unknown \[\], of another size \['0.weight', '1.weight'\]"):
        read(tmp_path, other, torch.optim.AdamW(other.parameters()))
    (part,) = tmp_path.iterdir()
    tensors = load_file(part)
    del tensors["exp_avg|0|0.weight"]
    save_file(tensors, part, metadata={"tensors": str(len(tensors) + 1)})
    with pytest.raises(CheckpointError, match=rf"has {len(tensors)} tensors, {len(tensors) + 1} were written"):
        read(tmp_path, model, optimizer)


def test_a_gap_is_named(tmp_path):
    model, optimizer = trained_module(0, steps=1)
    (piece, *others) = pieces_of(model, optimizer, zero_stage=0, rank=0)
    parts = [Piece(piece.name, start, 10, piece.master, start) for start in (0, 25)]  # of 35 values
    write_pieces([*parts, *others], optimizer.state, tmp_path, rank=0, facts={})
    with pytest.raises(CheckpointError, match=r"20 of 35 values of 0.weight \(\w+\) from 0 are there"):
        read(tmp_path, model, optimizer)
