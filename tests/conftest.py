"""Shared fixtures: a tiny tokenizer and tiny models, written once per test session."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

pytest_plugins = ["tests.scorecard.plugin"]

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TINY_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def heed_ctrl_c() -> None:
    """For ``preexec_fn``: below a shell's "&" SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    from rayllm.data.tokenizer import train_tokenizer

    texts = ["The capital of France is Paris.", "What colour is snow? Snow is white.", "user assistant system"] * 4
    return train_tokenizer(texts, vocab_size=384, max_length=512)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tiny_tokenizer) -> Path:
    """A random Qwen3 with tied embeddings, 0.1M parameters."""
    return _write_model(tmp_path_factory, tiny_tokenizer, seed=0)


@pytest.fixture(scope="session")
def other_tiny_model_dir(tmp_path_factory, tiny_tokenizer) -> Path:
    """The same shape as ``tiny_model_dir`` with other weights."""
    return _write_model(tmp_path_factory, tiny_tokenizer, seed=1)


def _write_model(tmp_path_factory, tokenizer, *, seed: int) -> Path:
    from rayllm.models.loading import create_causal_lm, save_model

    path = tmp_path_factory.mktemp(f"tiny-model-{seed}")
    model = create_causal_lm("qwen3", tokenizer, {**TINY_SHAPE, "initializer_range": 0.2}, seed=seed)
    save_model(model, tokenizer, path)
    return path


@pytest.fixture(scope="session")
def local_ray():
    """One Ray cluster on this machine for every test that needs one."""
    import ray

    # vLLM and DeepSpeed leave sockets in TMPDIR, and their paths must be short.
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir="/tmp", prefix="rt-") as folder:
        patch.setenv("TMPDIR", folder)
        ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
        yield ray
        ray.shutdown()
