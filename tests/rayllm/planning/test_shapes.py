"""Parameter counts, against what was published and against transformers' own classes."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rayllm.config.common import LearnerConfig
from rayllm.errors import InputError
from rayllm.models.partial import choose_trained, count_trainable
from rayllm.planning.memory import trained_parameters
from rayllm.planning.shapes import ARCHITECTURES, KNOWN, find_shape, from_config

PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
}

SIZES = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 200, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_known_models_have_the_published_number_of_parameters(name, parameters):
    assert KNOWN[name].parameters == parameters


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_counts_are_those_of_transformers(kind, tied):
    config = AutoConfig.for_model(kind, **SIZES, **EXPERTS.get(kind, {}), tie_word_embeddings=tied)
    shape = from_config(config.to_dict(), name=kind)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        config.num_labels = 1
        scorer = AutoModelForSequenceClassification.from_config(config)
    assert shape.parameters == count_trainable(model)[1]
    assert shape.with_scalar_head().parameters == count_trainable(scorer)[1]


@pytest.mark.parametrize(
    "learner",
    [
        {"lora": {"rank": 4}},
        {"lora": {"rank": 8, "target_modules": ("q_proj", "v_proj")}},
        {"trainable_layers": 2},
        {},
    ],
)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_trained_parameters_are_those_that_learn(kind, learner):
    settings = LearnerConfig.model_validate(learner)
    config = AutoConfig.for_model(kind, **SIZES, tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        choose_trained(model, settings)
    assert trained_parameters(from_config(config.to_dict(), name=kind), settings) == count_trainable(model)


def test_a_models_numbers_by_hand():
    shape = KNOWN["llama-3-8b"]
    assert shape.kv_bytes(2) == 2 * 32 * 8 * 128 * 2 == 131_072  # keys and values, layers, heads, width, bfloat16
    assert shape.multiplied == shape.parameters - 128256 * 4096 - 65 * 4096  # all but embedding and norms
    mixtral = KNOWN["mixtral-8x7b"]
    assert mixtral.multiplied == pytest.approx(12.75e9, rel=0.01)  # "13B active", of which 0.13 are embeddings


def test_a_folder_a_name_and_what_is_neither(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES, "tie_word_embeddings": True}))
    assert find_shape(folder).name == "mine" and find_shape(folder).hidden == 64
    assert find_shape("/anywhere/Qwen2.5-7B") is KNOWN["qwen2.5-7b"]
    with pytest.raises(InputError, match=r"critic.model: .*llama-3-9b .*Did you mean llama-3-8b"):
        find_shape("llama-3-9b", key="critic.model")
    (folder / "config.json").write_text(json.dumps({"model_type": "no_such_thing"}))
    with pytest.raises(InputError, match="model_type='no_such_thing', which cannot be planned"):
        find_shape(folder)


@pytest.mark.parametrize(("kind", "more"), [("gemma2", {}), ("phi3", {"pad_token_id": 0}), ("gpt2", {})])
def test_an_architecture_without_a_formula_is_counted_on_the_model(kind, more):
    config = AutoConfig.for_model(kind, **SIZES, **more)
    shape = from_config({**config.to_dict(), "model_type": kind}, name=kind)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        config.num_labels = 1
        scorer = AutoModelForSequenceClassification.from_config(config)
    assert shape.parameters == count_trainable(model)[1] and shape.hidden == config.hidden_size
    assert shape.with_scalar_head().parameters == count_trainable(scorer)[1]
    assert shape.multiplied <= shape.parameters and shape.kv_bytes(2) > 0
