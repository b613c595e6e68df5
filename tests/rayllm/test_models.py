"""Model folders, the scalar head, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rayllm.config.base import is_on_hub, load_config
from rayllm.config.sft import SftConfig
from rayllm.errors import InputError
from rayllm.hub import fetch, fetch_inputs
from rayllm.models.heads import ScalarModel, sequence_rewards, token_values
from rayllm.models.loading import (
    check_model_dir,
    count_stored_parameters,
    create_causal_lm,
    load_causal_lm,
    load_tokenizer,
    max_positions,
    num_parameters,
    save_model,
)
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


def test_the_same_seed_gives_the_same_weights(tiny_tokenizer):
    one, two, other = (create_causal_lm("qwen3", tiny_tokenizer, TINY_SHAPE, seed=s) for s in (0, 0, 1))
    ids = torch.tensor([[1, 2]])
    assert torch.equal(one(ids).logits, two(ids).logits) and not torch.equal(one(ids).logits, other(ids).logits)


def test_wrong_architectures_are_named(tiny_tokenizer):
    with pytest.raises(InputError, match="model.num_layerz: the architecture 'qwen3' has no such field"):
        create_causal_lm("qwen3", tiny_tokenizer, {"num_layerz": 2}, seed=0)
    with pytest.raises(InputError, match="num_key_value_heads=3 must divide"):
        create_causal_lm("qwen3", tiny_tokenizer, {**TINY_SHAPE, "num_key_value_heads": 3}, seed=0)


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


def test_a_reward_does_not_depend_on_padding(tiny_model_dir):
    model = ScalarModel.from_folder(tiny_model_dir, seed=3).eval()
    with torch.no_grad():
        alone = sequence_rewards(model(torch.tensor([[9, 10]]), torch.ones(1, 2).bool()), torch.ones(1, 2).bool())
        mask = torch.tensor([[1, 1, 0, 0, 0]]).bool()
        padded = sequence_rewards(model(torch.tensor([[9, 10, 2, 2, 2]]), mask), mask)
    torch.testing.assert_close(alone, padded)


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
