"""Rollout actors as one: work goes to the one that has the least of it, weights go to all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.group import ActorGroup, Role, Seats, collect
from actors.rollout import RolloutActor
from actors.vllm_engine import default_engine_args
from rayllm.config.environment import EnvironmentConfig
from rayllm.config.label import RolloutConfig
from rayllm.data.files import Row
from rayllm.data.rollout import Rollout

CHUNK = 64
"""Prompts in one call of `generate`: few enough to share the work evenly."""

AHEAD = 4
"""Calls of `generate` that an actor has at once: enough to fill an engine's batch while others are on their way."""

PROBE_TOKENS = 80
"""Length of the text that shows which weights an engine serves: over two blocks of its cache."""


def rollout_role(config: RolloutConfig) -> Role:
    return Role("rollout", config.num_actors, config.cpus_per_actor, config.gpus_per_actor)


def engine_dtype(config: RolloutConfig) -> str:
    """Name of the dtype in which the engines hold the weights."""
    defaults = default_engine_args("cuda" if config.gpus_per_actor else "cpu")
    return str({**defaults, **config.engine}["dtype"])


def engine_workers(config: RolloutConfig) -> int:
    """Processes of one engine that hold a part of the weights each."""
    sizes = [config.engine.get(name, 1) for name in ("tensor_parallel_size", "pipeline_parallel_size")]
    return int(sizes[0] * sizes[1])


def logprob_tolerance(given: float | None, *dtypes: str) -> float:
    """Nats a token by which two computations of a text's log-probabilities may differ on average: as ``given``, or what
    is possible in these dtypes. On random tokens, 0.07 was seen in bfloat16 on a model of 135M."""
    return given or (0.01 if set(dtypes) == {"float32"} else 0.25)


def rollout_arguments(config: RolloutConfig, model: Path, *, seed: int) -> dict[str, Any]:
    """Of a `RolloutActor`; all sample with one seed, so that it does not matter who gets a prompt."""
    return {
        "model_dir": str(model),
        "engine": config.engine,
        "seed": seed,
        "ignore_stop": config.ignore_stop,
        "timeout_s": config.timeout_s,
    }


def start_rollout_actors(
    config: RolloutConfig,
    model: Path,
    *,
    seed: int,
    environment: EnvironmentConfig = EnvironmentConfig(),
    seats: Seats | None = None,
) -> ActorGroup[RolloutActor]:
    """Start the engines on a model folder."""
    arguments = rollout_arguments(config, model, seed=seed) | {"environment": environment}
    return ActorGroup(rollout_role(config), RolloutActor, lambda rank: arguments, seats)


def probe_tokens(vocab_size: int, max_positions: int) -> list[int]:
    """The text of the probe: random tokens, the same in every run."""
    rng = np.random.default_rng(0)
    return rng.integers(vocab_size, size=min(PROBE_TOKENS, max_positions - 1)).tolist()


class Dispatcher:
    """Gives every piece of work to the rollout actor with the fewest tokens before it."""

    def __init__(self, group: ActorGroup[RolloutActor]) -> None:
        self.group = group
        self._open: list[dict[ray.ObjectRef, int]] = [{} for _ in range(len(group))]

    def submit(
        self, method: Callable[..., Any], work: Sequence[Any], *, tokens: Sequence[int], **arguments: Any
    ) -> list[ray.ObjectRef]:
        """Start ``method`` on every piece, the longest first; references in order of the pieces.

        Args:
            work: first argument of each call.
            tokens: of each piece, prompts and longest responses.
        """
        references: dict[int, ray.ObjectRef] = {}
        loads = [sum(self._unfinished(rank).values()) for rank in range(len(self.group))]
        for index in sorted(range(len(work)), key=lambda index: -tokens[index]):
            rank = loads.index(min(loads))
            loads[rank] += tokens[index]
            (references[index],) = self.group.submit(method, work[index], rank=rank, **arguments)
            self._open[rank][references[index]] = tokens[index]
        return [references[index] for index in range(len(work))]

    def wait_for_room(self) -> None:
        """Until some actor has fewer than ``AHEAD`` calls before it."""
        while min(len(self._unfinished(rank)) for rank in range(len(self.group))) >= AHEAD:
            ray.wait([reference for calls in self._open for reference in calls], fetch_local=False)

    def num_unfinished(self) -> int:
        """Calls under way."""
        return sum(len(self._unfinished(rank)) for rank in range(len(self.group)))

    def _unfinished(self, rank: int) -> dict[ray.ObjectRef, int]:
        calls = self._open[rank]
        if calls:
            done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0, fetch_local=False)
            for reference in done:
                del calls[reference]
        return calls


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
    dispatcher = Dispatcher(group)
    references: list[ray.ObjectRef] = []

    def report() -> None:
        if on_done is not None:
            on_done(min(len(prompts), CHUNK * (len(references) - dispatcher.num_unfinished())))

    for start in range(0, len(prompts), CHUNK):
        chunk = list(prompts[start : start + CHUNK])
        dispatcher.wait_for_room()
        references += dispatcher.submit(
            method,
            [chunk],
            tokens=[len(chunk)],
            num_samples=num_samples,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            step=step,
        )
        report()
    rollouts: list[Rollout] = []
    for reference in references:
        rollouts.extend(collect([reference], group.role.name)[0])
        report()
    return rollouts
