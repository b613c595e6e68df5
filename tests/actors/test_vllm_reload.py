"""The short way of new weights into vLLM's models against vLLM's own, and against the models of transformers."""

import asyncio

import pytest
import torch
import transformers

from actors.vllm_stepped import SteppedEngine
from actors.weights import pack, read_safetensors, unpack

SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 384, "max_position_embeddings": 128,
}  # fmt: skip
TEXT = list(range(3, 75))
UPDATES = 10


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """Two models of one configuration with every weight, biases and norms too, drawn anew."""

    def written(config):
        folders = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
            for weight in model.parameters():
                weight.data += 0.2 * torch.randn_like(weight)
            folders.append(tmp_path_factory.mktemp("model"))
            model.save_pretrained(folders[-1])
        return folders

    return written


def updated(folders, engine):
    """Whether the model is renewable, and the log-probabilities of a text under each model in turn, after an update:
    first by the engine's own choice of way, then by vLLM's. Runs in a process of its own."""

    async def run():
        served = SteppedEngine(str(folders[0]), stop_token_ids=[], overrides=engine)
        renewal, ways = served._renewal, []
        for way in (renewal, None):
            served._renewal = way
            answers = []
            for update in range(UPDATES):
                bundle = pack(read_safetensors(folders[(update + 1) % 2]), version=update + 1)
                await served.update(unpack(bundle), bundle.shapes(), version=update + 1)
                answers.append(await served.prompt_logprobs(TEXT))
            ways.append(answers)
        await served.shutdown()
        return renewal is not None, ways

    return asyncio.run(run())


def by_transformers(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logprobs = model(torch.tensor([TEXT])).logits[0, :-1].log_softmax(-1)
    return logprobs[range(len(TEXT) - 1), TEXT[1:]]


@pytest.mark.parametrize(
    ("config", "engine", "renewable", "tolerance"),
    [
        (transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True), {}, True, 1e-4),  # biases, one weight twice
        (transformers.LlamaConfig(**SHAPE), {"dtype": "bfloat16"}, True, 0.1),  # a head of its own, weights cast
        (transformers.LlamaConfig(**SHAPE), {"enable_lora": True}, False, 1e-4),  # vLLM wraps the layers
    ],
)
def test_renewed_weights_serve_like_vllms_own_reload(local_ray, write, config, engine, renewable, tolerance):
    folders = write(config)
    task = local_ray.remote(num_cpus=1, max_calls=1)(updated)
    found, (short, own) = local_ray.get(task.remote(folders, engine))
    assert found is renewable
    assert short == own
    for update, answer in enumerate(short):
        difference = (torch.tensor(answer) - by_transformers(folders[(update + 1) % 2])).abs()
        assert difference.mean() < tolerance
    assert short[0] != short[1]
