"""Random models to time things with: Qwen3-style, with a tokenizer of the same vocabulary.

    python -m bench.models OUT --size 1m|10m
"""

from __future__ import annotations

import argparse
import random
import string
from pathlib import Path

from rayllm.data.tokenizer import train_tokenizer
from rayllm.models.folders import load_tokenizer
from rayllm.models.heads import ScalarModel
from rayllm.models.loading import create_causal_lm, num_parameters, save_model

MAX_POSITIONS = 512
SIZES = {
    "1m": (2048, {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
                  "num_key_value_heads": 2, "head_dim": 32}),
    "10m": (4096, {"hidden_size": 320, "intermediate_size": 1024, "num_hidden_layers": 7, "num_attention_heads": 10,
                   "num_key_value_heads": 5, "head_dim": 32}),
}  # fmt: skip
"""Name -> vocabulary and shape."""


def make_model(path: Path, size: str) -> int:
    """Write a model folder with random weights; returns the number of its parameters."""
    vocab_size, shape = SIZES[size]
    rng = random.Random(0)
    words = ("".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 8))) for _ in range(8 * vocab_size))
    tokenizer = train_tokenizer(words, vocab_size=vocab_size, max_length=MAX_POSITIONS)
    assert len(tokenizer) == vocab_size, "too few words for the vocabulary"
    shape = {**shape, "max_position_embeddings": MAX_POSITIONS, "tie_word_embeddings": True}
    model = create_causal_lm("qwen3", tokenizer, shape, seed=0)
    save_model(model, tokenizer, path)
    return num_parameters(model)


def make_reward_model(model: Path, path: Path) -> None:
    """Write a reward model of the same size: the language model in the folder ``model`` with a random head."""
    save_model(ScalarModel.from_folder(model, seed=0).classifier, load_tokenizer(model), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=sorted(SIZES), required=True)
    arguments = parser.parse_args()
    print(f"{arguments.out}: {make_model(arguments.out, arguments.size):,} parameters")


if __name__ == "__main__":
    main()
