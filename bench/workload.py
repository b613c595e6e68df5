"""The fixed workload that is timed: random prompts, responses of one length, and settings that suit two cores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

NUM_RESPONSES = 64
"""Per step."""

PROMPT_TOKENS, NEW_TOKENS = 32, 64
MICRO_BATCH = 8
LEARNING_RATE = 1e-5
TEMPERATURE = 1.0
GROUPS = {"ppo": 1, "grpo": 4}
"""Algorithm -> responses to one prompt."""


def make_prompts(num: int, vocab_size: int, *, seed: int = 0) -> list[list[int]]:
    """``num`` prompts of random token ids."""
    ids = np.random.default_rng(seed).integers(vocab_size, size=(num, PROMPT_TOKENS))
    return [[int(token) for token in row] for row in ids]


def settings(algorithm: str, *, num_steps: int, **paths: Path) -> dict[str, Any]:
    """The `ppo` job's config of the workload, as plain data.

    Args:
        algorithm: "ppo", with reward model, critic and reference, or "grpo", with a Python reward and neither.
        paths: ``run_dir``, ``model``, ``prompts`` and, for "ppo", ``reward_model``.
    """
    optimizer = {"learning_rate": LEARNING_RATE, "schedule": "constant", "warmup_steps": 0}
    learner = {"micro_batch_size": MICRO_BATCH, "cpus_per_actor": 0.4, "optimizer": optimizer}
    scorer = {"micro_batch_size": MICRO_BATCH, "cpus_per_actor": 0.2}
    tree: dict[str, Any] = {
        **{key: str(path) for key, path in paths.items()},
        "num_steps": num_steps,
        "prompts_per_step": NUM_RESPONSES // GROUPS[algorithm],
        "samples_per_prompt": GROUPS[algorithm],
        "algorithm": {"num_epochs": 1, "num_minibatches": 1},
        "shaping": {"clip": None, "missing_eos_penalty": 0.0},
        "policy": learner,
        "critic": {**learner, "warmup_steps": 0},
        "reference": scorer,
        "reward": scorer,
        "rollout": {
            "num_actors": 1,
            "cpus_per_actor": 0.4,
            "temperature": TEMPERATURE,
            "max_new_tokens": NEW_TOKENS,
            "ignore_stop": True,
        },
        "checkpoint": {"every_steps": num_steps},
    }
    if algorithm == "grpo":
        tree["algorithm"] |= {"advantage": "grpo", "kl_coef": 0.0}
        tree["reward"] = {**scorer, "source": "function", "function": "bench.workload:variety"}
        tree["policy"] |= {"num_actors": 2}  # what PPO has a critic for: both cores at work
        tree["rollout"] |= {"num_actors": 2}
    return tree


def variety(prompts: Sequence[str], responses: Sequence[str], token_ids: Sequence[Sequence[int]], rows: Any) -> list:
    """Share of a response's tokens that are distinct: cheap, and seldom the same within a group."""
    return [len(set(ids)) / len(ids) for ids in token_ids]
