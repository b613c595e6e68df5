"""Model folders, the scalar head, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rayllm.config.base import is_on_hub, load_config
from rayllm.config.sft import SftConfig
from rayllm.errors import InputError
from rayllm.hub import fetch, fetch_inputs
from rayllm.models.folders import (
    check_model_dir,
    count_stored_parameters,
    load_tokenizer,
    max_positions,
    vocabulary_size,
)
from rayllm.models.heads import ScalarModel, sequence_rewards, token_values
from rayllm.models.loading import create_causal_lm, load_causal_lm, num_parameters, save_model
from tests.conftest import TINY_SHAPE


def test_a_folder_round_trips_through_plain_transformers(tmp_path, tiny_tokenizer):
    model = create_causal_lm("llama", tiny_tokenizer, TINY_SHAPE, seed=0).eval()
    save_model(model, tiny_tokenizer, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(model(ids).logits, again(ids).logits)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert again.generation_config.eos_token_id == tokenizer.eos_token_id  # generate() stops at the end of a turn
    assert count_stored_parameters(tmp_path) == num_parameters(model)
    assert max_positions(tmp_path) == TINY_SHAPE["max_position_embeddings"]


@pytest.mark.parametrize(
    "config",
    [
        AutoConfig.for_model("qwen3", vocab_size=70, max_position_embeddings=90),
        AutoConfig.for_model("gpt2", vocab_size=70, n_positions=90),  # its file has another name for it
        AutoConfig.for_model("gemma3", text_config={"vocab_size": 70, "max_position_embeddings": 90}),
    ],
    ids=lambda config: config.model_type,
)
def test_sizes_are_those_that_transformers_knows(tmp_path, config):
    config.save_pretrained(tmp_path)
    assert (vocabulary_size(tmp_path), max_positions(tmp_path)) == (70, 90)


def test_the_same_seed_gives_the_same_weights(tiny_tokenizer):
    one, two, other = (create_causal_lm("qwen3", tiny_tokenizer, TINY_SHAPE, seed=s) for s in (0, 0, 1))
    ids = torch.tensor([[1, 2]])
    assert torch.equal(one(ids).logits, two(ids).logits) and not torch.equal(one(ids).logits, other(ids).logits)


def test_wrong_architectures_are_named(tiny_tokenizer):
    with pytest.raises(InputError, match="model.num_layerz: the architecture 'qwen3' has no such field"):
        create_causal_lm("qwen3", tiny_tokenizer, {"num_layerz": 2}, seed=0)
    with pytest.raises(InputError, match="num_key_value_heads=3 must divide"):
        create_causal_lm("qwen3", tiny_tokenizer, {**TINY_SHAPE, "num_key_value_heads": 3}, seed=0)


@pytest.mark.scorecard("S01")
def test_unusable_folders_are_named(tmp_path):
    with pytest.raises(InputError, match="model: no model folder at"):
        check_model_dir(tmp_path / "none", key="model")
    with pytest.raises(InputError, match="has no config.json"):
        check_model_dir(tmp_path, key="model")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"no \*.safetensors weights \(found pytorch_model.bin"):
        check_model_dir(tmp_path, key="model")


def test_the_scalar_head_is_the_classifier_of_transformers(tmp_path, tiny_model_dir, tiny_tokenizer):
    model = ScalarModel.from_folder(tiny_model_dir, seed=3).eval()
    save_model(model.classifier, tiny_tokenizer, tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    pad = tiny_tokenizer.pad_token_id
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, pad, pad]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    with torch.no_grad():
        ours = sequence_rewards(model(ids, mask), mask)
        theirs = classifier(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    torch.testing.assert_close(ours, theirs)


def padded(rows: list[list[int]], *, pad: int, side: str, extra: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as one batch, ``extra`` columns wider than the longest."""
    width = max(map(len, rows)) + extra
    tokens, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.bool)
    for row, ids in enumerate(rows):
        place = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
        tokens[row, place], mask[row, place] = torch.tensor(ids), True
    return tokens, mask


@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("pad", ["pad", "eos", 7])
@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_reward_depends_on_nothing_but_its_sequence(tiny_model_dir, tiny_tokenizer, side, extra, pad, num_heads):
    end = tiny_tokenizer.eos_token_id
    pad = {"pad": tiny_tokenizer.pad_token_id, "eos": end}.get(pad, pad)
    # End-of-turn tokens inside a prompt, none at the end of a response, the padding's token inside a response.
    rows = [[5, 6, end, 9, 10, end], [9, end], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, end], [7, 8, 7], [end]]
    model = ScalarModel.from_folder(tiny_model_dir, seed=3, num_heads=num_heads).eval()
    with torch.no_grad():
        alone = []
        for row in rows:
            ids = torch.tensor([row])
            alone.append(sequence_rewards(model(ids, torch.ones_like(ids).bool()), torch.ones_like(ids).bool()))
        tokens, mask = padded(rows, pad=pad, side=side, extra=extra)
        together = sequence_rewards(model(tokens, mask), mask)
        turned = sequence_rewards(model(tokens.flip(0), mask.flip(0)), mask.flip(0)).flip(0)
    expected = torch.cat(alone)
    assert expected.shape == ((5,) if num_heads == 1 else (5, num_heads))
    assert len({round(float(value), 3) for value in expected.flatten()}) == expected.numel()  # they do differ
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=0)


def test_an_ensemble_is_a_classifier_with_a_label_a_head(tmp_path, tiny_model_dir, tiny_tokenizer):
    model = ScalarModel.from_folder(tiny_model_dir, seed=3, num_heads=3).eval()
    model.classifier.config.reward_mean, model.classifier.config.reward_std = [0.0, 1.0, 2.0], [1.0, 2.0, 4.0]
    save_model(model.classifier, tiny_tokenizer, tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        ours = sequence_rewards(model(ids, torch.ones_like(ids)), torch.ones_like(ids))
        torch.testing.assert_close(classifier(input_ids=ids).logits, ours)
        again = ScalarModel.from_folder(tmp_path).eval()
        assert again.num_heads == 3 and [m.tolist() for m in again.moments()] == [[0, 1, 2], [1, 2, 4]]
        torch.testing.assert_close(sequence_rewards(again(ids, torch.ones_like(ids)), torch.ones_like(ids)), ours)
        one = ScalarModel.from_folder(tmp_path, num_heads=1).eval()  # as a critic starts from it
        merged = sequence_rewards(one(ids, torch.ones_like(ids)), torch.ones_like(ids))
    torch.testing.assert_close(merged, (ours / torch.tensor([1.0, 2.0, 4.0])).mean(1))


def test_a_classifier_of_several_labels_is_no_reward_model(tmp_path, tiny_model_dir, tiny_tokenizer):
    save_model(ScalarModel.from_folder(tiny_model_dir, seed=0, num_heads=2).classifier, tiny_tokenizer, tmp_path)
    with pytest.raises(InputError, match="a classifier of 2 labels, expected a reward model"):
        ScalarModel.from_folder(tmp_path)


def test_values_stand_before_their_token():
    assert token_values(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[0.0, 1.0, 2.0]]


def test_the_new_head_is_drawn_from_its_seed(tiny_model_dir):
    heads = [ScalarModel.from_folder(tiny_model_dir, seed=seed).classifier.score.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    # 1 / sqrt(64 + 1) = 0.124
    assert 0.08 < heads[0].std().item() < 0.17


HUB_REVISION = "0123456789012345678901234567890123456789"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch, tiny_model_dir):
    """A cache of huggingface_hub with one model, as a download leaves it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "hub/models--org--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(HUB_REVISION)
    return Path(shutil.copytree(tiny_model_dir, repo / "snapshots" / HUB_REVISION))


def test_a_model_on_the_hub_stands_for_its_folder(hub_cache, tmp_path):
    for name in ("hf://org/tiny", f"hf://org/tiny@{HUB_REVISION}"):
        loaded = load_config(SftConfig, None, [f"run_dir={tmp_path}/r", f"model={name}", f"data={tmp_path}/d.jsonl"])
        assert is_on_hub(loaded.config.model)
        assert fetch_inputs(loaded).config.model == hub_cache
    load_causal_lm(hub_cache)


def test_a_model_that_the_hub_does_not_have_is_named(hub_cache):
    with pytest.raises(InputError, match="model: cannot fetch org/other from the Hugging Face hub"):
        fetch(Path("hf://org/other"), key="model")
