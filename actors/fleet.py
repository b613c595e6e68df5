"""Rollout actors as one, for the driver: work goes to the one that has the least of it, weights go to all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.carried import Carried
from actors.environment import this_node, worker_env
from actors.fleet_actor import EngineStatus, FleetActor
from actors.group import Role, Seats, collect, whereabouts
from actors.health import Deadlines
from actors.member import Call
from actors.proof import Proof
from actors.rollout import RolloutActor
from actors.supervisor import Blueprint, Size
from actors.vllm_engine import default_engine_args
from actors.watched import shell
from rayllm.config.environment import EnvironmentConfig
from rayllm.config.label import RolloutConfig
from rayllm.config.rl import FleetConfig
from rayllm.data.files import Row
from rayllm.data.rollout import Rollout

CHUNK = 64
"""Prompts in one call of `generate`: few enough to share the work evenly."""

AHEAD = 4
"""Calls of `generate` that an actor has at once: enough to fill an engine's batch while others are on their way."""

HUSH_S = 2.0

PROBE_TOKENS = 66
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


def start_rollout_fleet(
    config: RolloutConfig,
    model: Path,
    *,
    seed: int,
    environment: EnvironmentConfig = EnvironmentConfig(),
    fleet: FleetConfig = FleetConfig(),
    fixed: bool = False,
    wait_s: float = 0.0,
    setup: Sequence[Call] = (),
    seats: Seats | None = None,
) -> RolloutFleet:
    """Start the engines on a model folder. They serve after the first `RolloutFleet.sync`.

    Args:
        fixed: they make a group that none joins later and that cannot go on without one.
        wait_s: how long to wait for nodes where too few engines are left.
        setup: calls that make each engine ready for its first sync.
        seats: what is held for the first engines; None: wherever there is room.
    """
    arguments = rollout_arguments(config, model, seed=seed) | {"environment": environment}
    size = Size(
        start=config.num_actors,
        least=config.num_actors if fixed else fleet.min_engines,
        most=fleet.max_engines or config.num_actors,
        max_restarts=None if fixed else fleet.max_restarts,
        wait_s=wait_s,
    )
    deadlines = Deadlines(start_s=max(config.timeout_s, fleet.stall_s), work_s=fleet.stall_s)
    role, place = rollout_role(config), {} if seats is None else {"place": seats.options}
    blueprint = Blueprint(role, shell(RolloutActor), lambda number: arguments, setup, **place)
    return RolloutFleet(blueprint, size, deadlines)


def probe_tokens(vocab_size: int, max_positions: int) -> list[int]:
    """The text of the probe: random tokens, the same in every run."""
    rng = np.random.default_rng(0)
    return rng.integers(vocab_size, size=min(PROBE_TOKENS, max_positions - 1)).tolist()


class RolloutFleet:
    """The rollout actors of a run as one, through the actor that routes their work and watches them."""

    def __init__(self, blueprint: Blueprint, size: Size, deadlines: Deadlines) -> None:
        """Start that actor, on this node, and the first engines; all come up in parallel."""
        self.role, self.num_engines = blueprint.role, size.start
        """``num_engines``: that served after the last `sync`."""
        self._syncs = 0
        """That have begun."""
        here = NodeAffinitySchedulingStrategy(this_node(), soft=False)
        remote_cls: Any = ray.remote(FleetActor)
        environment = {"env_vars": worker_env(0)}
        options = {"num_cpus": 0, "max_concurrency": 10_000, "scheduling_strategy": here, "runtime_env": environment}
        self._actor = remote_cls.options(**options).remote(blueprint, size, deadlines)
        # Not started from there: that process comes up meanwhile.
        first = [blueprint.start(self._actor, number, number, deadlines) for number in range(size.start)]
        self._actor.adopt.remote(first)

    def started(self) -> ray.ObjectRef:
        """Done when the first engines are set up."""
        return self._actor.started.remote()

    def grow(self) -> None:
        """From now on take as many engines as there are to be had."""
        self._actor.grow.remote()

    def submit(
        self, method: Callable[..., Any], work: Sequence[Any], *, tokens: Sequence[int], **arguments: Any
    ) -> list[ray.ObjectRef]:
        """Start ``method`` on every piece, the longest first; references in order of the pieces.

        Args:
            work: first argument of each call, or its reference.
            tokens: of each piece, prompts and longest responses.
        """
        return self.submit_joined(method, [[one] for one in work], tokens=[[count] for count in tokens], **arguments)

    def submit_joined(
        self,
        method: Callable[..., Any],
        work: Sequence[list[Any]],
        *,
        tokens: Sequence[list[int]],
        join: Callable[[list[Any]], Any] | None = None,
        **arguments: Any,
    ) -> list[ray.ObjectRef]:
        """Like `submit`, of several pieces each, which may go to several engines: ``join`` makes one of their answers.
        """
        references: dict[int, ray.ObjectRef] = {}
        joining = join and Carried(join)
        for index in sorted(range(len(work)), key=lambda index: -sum(tokens[index])):
            references[index] = self._submit(method.__name__, work[index], tokens[index], joining, arguments)
        return [references[index] for index in range(len(work))]

    def _submit(self, *arguments: Any) -> ray.ObjectRef:
        return self._actor.work.remote(*arguments)

    def readers(self) -> ray.ObjectRef:
        """For whoever publishes the next weights: nodes where they will be read, None for any. Nobody begins to read
        from when it is done until the next `sync`."""
        return self._actor.readers.remote()

    def synced(self) -> ray.ObjectRef:
        """Done when the engines that serve have made the `sync` that begins next: for what is not to take a core from
        them before. Before the first one, and after `begin_again`, it is done at once."""
        return self._actor.synced.remote(self._syncs + 1)

    def sync(self, method: Callable[..., Any], *args: Any, proof: Proof | None = None, **kwargs: Any) -> None:
        """Call ``method`` on every engine, and on later ones before they serve. An engine that makes no progress is
        not waited for, and serves no more until it has made the call.

        Args:
            proof: that every engine gives before anything that it sampled under these weights is handed out; None asks
                for none.
        """
        self.end_sync(self.begin_sync(method, *args, proof=proof, **kwargs))

    def begin_sync(
        self, method: Callable[..., Any], *args: Any, proof: Proof | None = None, **kwargs: Any
    ) -> ray.ObjectRef:
        """`sync` in two parts. What ``args`` refer to is waited for; then it begins."""
        self._syncs += 1
        return self._sync(Call(method.__name__, args, kwargs), proof)

    def end_sync(self, begun: ray.ObjectRef) -> None:
        """Wait for what `begin_sync` has begun."""
        (self.num_engines,) = self._collect(begun)

    def _sync(self, call: Call, proof: Proof | None) -> ray.ObjectRef:
        return self._actor.sync.remote(call, proof)

    def prove(self) -> None:
        """Wait until every engine that has served has proved what it serves now."""
        self._collect(self._actor.prove.remote())

    def begin_again(self) -> None:
        """Whoever wrote the weights died; the next `sync` comes from another one."""
        self._collect(self._actor.begin_again.remote())

    def drop(self, references: Sequence[ray.ObjectRef]) -> None:
        """Nobody wants these pieces any more: engines give them up."""
        for reference in references:
            ray.cancel(reference, recursive=True)

    def call(self, method: Callable[..., Any], rows: Sequence[tuple[Any, ...]] = (), **kwargs: Any) -> list[Any]:
        """What ``method`` returns on every engine that is up, once the first ones are.

        Args:
            rows: arguments, for the first engine, the second and so on; without them: none.
            kwargs: for all of them.
        """
        (answers,) = self._collect(self._actor.each.remote(method.__name__, rows, kwargs))
        return list(answers)

    def whereabouts(self) -> list[tuple[str, list[str]]]:
        """As of an `ActorGroup`."""
        return self.call(whereabouts)

    def status(self) -> list[EngineStatus]:
        """Of all engines, the latest lost ones included."""
        (found,) = self._collect(self._actor.status.remote())
        return list(found)

    @contextmanager
    def told(self, say: Callable[[str, str], Any]) -> Iterator[None]:
        """Within the block ``say`` gets a line, and details or "", for every decision, in a thread."""
        thread = threading.Thread(target=self._tell, args=(say,), name="fleet-decisions", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._actor.hush.remote()
            thread.join(timeout=HUSH_S)

    def _tell(self, say: Callable[[str, str], Any]) -> None:
        told = 0
        with suppress(RayActorError):  # it ended with all that it had to say
            while lines := ray.get(self._actor.decisions.remote(told)):
                told += len(lines)
                for line, detail in lines:
                    say(line, detail)

    def stop(self) -> None:
        """End the processes."""
        with suppress(RayActorError):
            ray.get(self._actor.close.remote())
        ray.kill(self._actor)

    def _collect(self, *references: ray.ObjectRef) -> list[Any]:
        return collect(references, self.role.name)


def generate(
    fleet: RolloutFleet,
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
    sampling = {
        "num_samples": num_samples, "temperature": temperature, "max_new_tokens": max_new_tokens, "step": step
    }  # fmt: skip
    references: list[ray.ObjectRef] = []
    under_way: list[ray.ObjectRef] = []

    def report() -> None:
        if on_done is not None:
            on_done(min(len(prompts), CHUNK * (len(references) - len(under_way))))

    for start in range(0, len(prompts), CHUNK):
        if len(under_way) >= AHEAD * max(fleet.num_engines, 1):
            _, under_way = ray.wait(under_way, fetch_local=False)
            report()
        chunk = list(prompts[start : start + CHUNK])
        references += fleet.submit(method, [chunk], tokens=[len(chunk)], **sampling)
        under_way.append(references[-1])
    while under_way:
        _, under_way = ray.wait(under_way, fetch_local=False)
        report()
    return [rollout for found in collect(references, fleet.role.name) for rollout in found]
