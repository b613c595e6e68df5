"""Rollout actors as one: prompts are shared out, weights go to all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from actors.group import ActorGroup, Role, collect
from actors.rollout import RolloutActor
from rayllm.config.environment import EnvironmentConfig
from rayllm.config.label import RolloutConfig
from rayllm.data.files import Row
from rayllm.data.rollout import Rollout

CHUNK = 64
"""Prompts in one call: enough to fill an engine's batch, few enough to share the work evenly."""


def rollout_role(config: RolloutConfig) -> Role:
    return Role("rollout", config.num_actors, config.cpus_per_actor, config.gpus_per_actor)


def start_rollout_actors(
    config: RolloutConfig, model: Path, *, seed: int, environment: EnvironmentConfig = EnvironmentConfig()
) -> ActorGroup[RolloutActor]:
    """Start the engines on a model folder; all sample with one seed, so that it does not matter who gets a prompt."""
    arguments = {
        "model_dir": str(model),
        "engine": config.engine,
        "seed": seed,
        "environment": environment,
        "ignore_stop": config.ignore_stop,
    }
    return ActorGroup(rollout_role(config), RolloutActor, lambda rank: arguments)


def generate(
    group: ActorGroup[RolloutActor],
    prompts: Sequence[tuple[int, list[int]]] | Sequence[tuple[int, Row]],
    *,
    method: Callable[..., Any] = RolloutActor.generate,
    num_samples: int,
    temperature: float,
    max_new_tokens: int,
    step: int = 0,
    on_done: Callable[[int], None] | None = None,
) -> list[Rollout]:
    """Sample for (prompt id, token ids) pairs; results in the order of the prompts.

    Args:
        method: ``RolloutActor.converse`` for (prompt id, row) pairs.
        on_done: called with the number of prompts done so far.
    """
    chunks = [list(prompts[i : i + CHUNK]) for i in range(0, len(prompts), CHUNK)]
    references = group.map(
        method,
        chunks,
        num_samples=num_samples,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        step=step,
    )
    rollouts: list[Rollout] = []
    done = 0
    for chunk, reference in zip(chunks, references, strict=True):
        rollouts.extend(collect([reference], group.role.name)[0])
        done += len(chunk)
        if on_done is not None:
            on_done(done)
    return rollouts
