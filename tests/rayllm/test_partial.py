"""What is trained of a model, and what is refused before anything starts."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from rayllm.config.base import load_config
from rayllm.config.common import LearnerConfig, LoraConfig, OptimizerConfig
from rayllm.config.pretrain import PretrainConfig
from rayllm.config.rl import LearnerActorsConfig
from rayllm.errors import InputError
from rayllm.models.loading import load_causal_lm, num_parameters
from rayllm.models.optimizers import build_optimizer
from rayllm.models.partial import Adapter, add_adapters, plan_trained


@pytest.fixture(scope="module")
def half_billion(tmp_path_factory):
    """The config of Qwen2.5-0.5B; no weights."""
    folder = tmp_path_factory.mktemp("qwen")
    AutoConfig.for_model(
        "qwen2", vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_trained_parameters_by_hand(half_billion):
    assert plan_trained(half_billion, LearnerConfig()) is None
    trained, total = plan_trained(half_billion, LearnerConfig(lora=LoraConfig(rank=16)))
    per_block = 2 * (896 + 896) + 2 * (896 + 128) + 3 * (896 + 4864)  # q, o; k, v; gate, up, down
    assert trained == 24 * 16 * per_block and total == 494_032_768 + trained
    assert trained / total < 0.05
    queries = LearnerConfig(lora=LoraConfig(rank=16, target_modules=("q_proj",)))
    assert plan_trained(half_billion, queries)[0] == 24 * 16 * (896 + 896)
    assert plan_trained(half_billion, queries, scalar=True)[0] == 24 * 16 * (896 + 896) + 896  # and the head
    block = 2 * 896 * 896 + 2 * 896 * 128 + 896 + 2 * 128 + 3 * 896 * 4864 + 2 * 896  # with biases and norms
    assert plan_trained(half_billion, LearnerConfig(trainable_layers=2))[0] == 2 * block + 896
    assert plan_trained(half_billion, LearnerConfig(trainable_layers=1), scalar=True)[0] == block + 896 + 896


def test_a_part_that_is_not_there_is_named(half_billion):
    with pytest.raises(InputError, match=r"learner.lora.target_modules: \['qproj'\]: expected .*'q_proj'"):
        plan_trained(half_billion, LearnerConfig(lora=LoraConfig(rank=2, target_modules=("qproj", "v_proj"))))
    with pytest.raises(InputError, match="learner.trainable_layers=25: the model has 24 decoder blocks"):
        plan_trained(half_billion, LearnerConfig(trainable_layers=25))


def test_settings_that_exclude_each_other_are_named():
    refused = {
        "trainable_layers=1 and lora.rank=4 exclude each other": ["learner.trainable_layers=1", "learner.lora.rank=4"],
        "offload_parameters=true needs zero_stage=3, got 2": ["learner.offload_parameters=true"],
        "offload_optimizer=true needs zero_stage=1, 2 or 3": ["learner.offload_optimizer=true", "learner.zero_stage=0"],
        "optimizer.name=muon needs learner.zero_stage=0, got 2": ["optimizer.name=muon"],
        "learner.lora.rankk: unknown key. Did you mean learner.lora.rank": ["learner.lora.rankk=4"],
    }
    for message, overrides in refused.items():
        with pytest.raises(InputError, match=message):
            load_config(LearnerActorsConfig, None, overrides)
    load_config(LearnerActorsConfig, None, ["optimizer.name=muon", "learner.zero_stage=0", "learner.lora.rank=4"])
    with pytest.raises(InputError, match="pretraining starts from random weights"):
        load_config(
            PretrainConfig, None, ["run_dir=r", "documents=d", "heldout=h", "tokenizer=t", "learner.lora.rank=4"]
        )


def test_merging_is_done_in_float32():
    weight = torch.ones(2, 2, dtype=torch.bfloat16)
    a, b = torch.tensor([[1.0, 0.5]]), torch.tensor([[0.25], [2**-9]])
    adapter = Adapter(torch.nn.Parameter(a.bfloat16()), torch.nn.Parameter(b.bfloat16()), scaling=2.0)
    # 1 + 2 * b a = [[1.5, 1.25], [1 + 2**-8, 1 + 2**-9]]; the last row rounds back to 1.
    assert adapter.merged(weight).tolist() == [[1.5, 1.25], [1.0, 1.0]]
    assert adapter.merged(weight.float()).tolist() == [[1.5, 1.25], [1 + 2**-8, 1 + 2**-9]]


def test_new_adapters_change_nothing_and_are_the_same_every_time(tiny_model_dir):
    ids = torch.tensor([[5, 9, 17]])
    models = [load_causal_lm(tiny_model_dir) for _ in range(2)]
    expected = models[0](ids).logits
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for model in models:
        add_adapters(model, LoraConfig(rank=4))
        assert torch.equal(model(ids).logits, expected)
    one, two = (model.state_dict() for model in models)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_optimizers_share_all_trained_parameters(tiny_model_dir):
    model = load_causal_lm(tiny_model_dir)
    for name in ("adamw", "muon"):
        optimizer = build_optimizer(model, OptimizerConfig(name=name, weight_decay=0.1), fused=False)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert len({id(p) for p in held}) == len(held) and sum(p.numel() for p in held) == num_parameters(model)
        for group in optimizer.param_groups:
            assert all(bool(group["weight_decay"]) == (p.dim() == 2) for p in group["params"])
    hidden = [p for group in optimizer.param_groups if "momentum" in group for p in group["params"]]
    assert len(hidden) == 2 * 7 and all(p is not model.get_input_embeddings().weight for p in hidden)
