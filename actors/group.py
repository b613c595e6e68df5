"""Sets of identical actors, called by passing the method itself: ``group.call(PolicyActor.update, ...)``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.environment import worker_env
from rayllm.errors import FleetExhausted
from rayllm.startup import without_garbage_collection

ActorT = TypeVar("ActorT")

OUT_OF_MEMORY = "running low on memory"
"""In Ray's account of an actor that its memory monitor killed; it guesses at an OOM killer in every account."""

NEVER_RAN = "The actor never ran"
"""In Ray's account of an actor that it had sent to a node of which it did not know yet that it was gone."""

FIND_S, TOGETHER_S = 30.0, 1.0
"""How long `find_lost` waits for busy actors: until one is found lost, and after that for those that went with it."""


@dataclass(frozen=True, slots=True)
class Role:
    """What a group of actors is called and what each of them needs."""

    name: str
    num_actors: int
    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True)
class Seats:
    """Where the actors of a role go: into bundles of a placement group that is held for them, whether they live or not.
    """

    group: PlacementGroup
    bundles: tuple[int, ...]
    """Of each rank."""

    gpus: float
    """Of each actor: a part of one where roles share it."""

    selector: dict[str, str]
    """Labels of the nodes. For actors beyond those that were planned, which get what is free there."""

    def options(self, rank: int) -> dict[str, Any]:
        """Of Ray, for one actor."""
        if rank >= len(self.bundles):
            return {"num_gpus": self.gpus, **({"label_selector": self.selector} if self.selector else {})}
        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=self.bundles[rank])
        return {"num_gpus": self.gpus, "scheduling_strategy": strategy}


class ActorGroup(Generic[ActorT]):
    """``num_actors`` Ray actors of one class. Ranks are numbered from 0."""

    def __init__(
        self, role: Role, cls: type[ActorT], arguments: Callable[[int], dict[str, Any]], seats: Seats | None = None
    ) -> None:
        """Start the actors; they come up in parallel.

        Args:
            role: how many, and what each needs.
            cls: a plain class.
            arguments: rank -> the constructor's keyword arguments.
            seats: what is held for them; None: wherever there is room.
        """
        self.role, self._cls, self._arguments, self._seats = role, cls, arguments, seats
        self._remote_cls: Any = ray.remote(type(cls.__name__, (cls,), self._methods()))
        self._actors = [self._start(rank) for rank in range(role.num_actors)]

    def _methods(self) -> dict[str, Any]:
        """What the actors have beside or in place of the methods of their class."""
        return {"__init__": constructor(self._cls), "whereabouts": whereabouts}

    def _arguments_of(self, rank: int) -> dict[str, Any]:
        """Of the constructor."""
        return self._arguments(rank)

    def _start(self, rank: int) -> Any:
        """The actor of a rank."""
        seat = {} if self._seats is None else self._seats.options(rank)
        options = {**actor_options(self.role, self._cls), **seat}
        return self._remote_cls.options(**options).remote(**self._arguments_of(rank))

    def whereabouts(self) -> list[tuple[str, list[str]]]:
        """Of every rank: Ray's id of its node, and of the GPUs that it has there."""
        return collect([actor.whereabouts.remote() for actor in self._actors], self.role.name)

    def __len__(self) -> int:
        return len(self._actors)

    def submit(self, method: Callable[..., Any], *args: Any, rank: int | None = None, **kwargs: Any) -> list[Any]:
        """Start ``method`` on every rank, or on one; returns object references."""
        actors = self._actors if rank is None else [self._actors[rank]]
        return [getattr(actor, method.__name__).remote(*args, **kwargs) for actor in actors]

    def call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Run ``method`` on every rank and wait for all.

        Raises:
            RuntimeError: one failed or died; the text names role and cause.
        """
        return collect(self.submit(method, *args, **kwargs), self.role.name)

    def map(self, method: Callable[..., Any], *columns: Sequence[Any], **kwargs: Any) -> list[Any]:
        """Start ``method`` on row i of ``columns`` for every i, in turn on every rank; returns object references in
        order of the rows."""
        rows = list(zip(*columns, strict=True))
        return [
            getattr(self._actors[i % len(self._actors)], method.__name__).remote(*row, **kwargs)
            for i, row in enumerate(rows)
        ]

    def stop(self) -> None:
        """End the processes."""
        for actor in self._actors:
            ray.kill(actor)

    def renew(self) -> None:
        """End the processes and start others on their seats; what the old ones were asked for fails."""
        self.stop()
        self._actors = [self._start(rank) for rank in range(self.role.num_actors)]

    def ready(self) -> list[Any]:
        """References, a rank each, that are done when it has been constructed and is not busy."""
        return [actor.__ray_ready__.remote() for actor in self._actors]

    def held(self) -> bool:
        """Whether its seats are there: those of a node that went are sought anew, as long as no other node has room."""
        if self._seats is None:
            return True
        return bool(placement_group_table(self._seats.group)["state"] == "CREATED")


def find_lost(groups: Sequence[ActorGroup[Any]]) -> dict[str, str]:
    """Role -> which of its actors ended, and how. Who is busy is asked for at most `FIND_S`: a process that has just
    ended looks like that, too."""
    asked = {
        reference: (group.role.name, rank) for group in groups for rank, reference in enumerate(group.ready())
    }
    found: dict[str, str] = {}
    pending, deadline = list(asked), time.monotonic() + FIND_S
    while pending and (left := deadline - time.monotonic()) > 0:
        done, pending = ray.wait(pending, timeout=left)
        for reference in done:
            try:
                ray.get(reference)
            except (RayActorError, OutOfMemoryError) as error:
                role, rank = asked[reference]
                found.setdefault(role, f"rank {rank}: {end_of(error)}")
                deadline = min(deadline, time.monotonic() + TOGETHER_S)
    return found


def never_ran(ready: Any) -> bool:
    """Of a reference of `ActorGroup.ready` that is done: whether its actor was sent to a node that was gone."""
    try:
        ray.get(ready)
    except RayActorError as error:
        return NEVER_RAN in str(error)
    except OutOfMemoryError:
        pass
    return False


def end_of(error: RayActorError | OutOfMemoryError) -> str:
    """How an actor ended."""
    if isinstance(error, OutOfMemoryError) or OUT_OF_MEMORY in str(error):
        return "its process was killed, the node was out of memory"
    return "its process ended: " + last_line(error).rpartition("Worker exit detail: ")[2]


def last_line(error: BaseException) -> str:
    """Without what Ray guesses."""
    return str(error).strip().splitlines()[-1].split(" Some common causes")[0].strip()


def whereabouts(self: Any) -> tuple[str, list[str]]:
    """A method of every actor: Ray's id of its node, and of the GPUs that it has there."""
    return ray.get_runtime_context().get_node_id(), [str(gpu) for gpu in ray.get_gpu_ids()]


def actor_options(role: Role, cls: type) -> dict[str, Any]:
    """Ray's options of each actor of a role."""
    return {
        "num_cpus": role.cpus,
        "num_gpus": role.gpus,
        "max_concurrency": 1000 if is_async(cls) else 1,
        "runtime_env": {"env_vars": worker_env(role.gpus)},
    }


def constructor(cls: type) -> Callable[..., None]:
    """What makes an actor of the class; what it imports is collected by nobody, the tensors that it returns travel as
    arrays."""

    def construct(self: Any, **arguments: Any) -> None:
        with without_garbage_collection():
            from actors.tensors import send_as_arrays  # torch, which who starts it may do without

            send_as_arrays()
            cls.__init__(self, **arguments)  # type: ignore[misc]

    return construct


def collect(references: Sequence[Any], role: str) -> list[Any]:
    """Results in order. The first failure raises at once, even while another rank still waits for the dead one.

    Raises:
        RuntimeError: a call failed or its actor died; the text names ``role`` and the cause.
        FleetExhausted: as it was raised, also where it is why an argument of the call never came.
    """
    pending = list(references)
    try:
        while pending:
            done, pending = ray.wait(pending, num_returns=1)
            ray.get(done)
        return list(ray.get(list(references)))
    except RayTaskError as error:
        cause = root_cause(error)
        if isinstance(cause, FleetExhausted):
            raise FleetExhausted(str(cause)) from error
        raise RuntimeError(f"{role}: {_cause_line(error)}") from error
    except OutOfMemoryError as error:
        raise RuntimeError(f"{role}: killed, the node was out of memory: {_first_line(error)}") from error
    except RayActorError as error:
        if OUT_OF_MEMORY in str(error):
            raise RuntimeError(f"{role}: an actor was killed, the node was out of memory: {error}") from error
        raise RuntimeError(f"{role}: an actor died: {error}") from error


def root_cause(error: BaseException) -> BaseException:
    """What was raised at first, behind the errors of the calls that it failed."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _cause_line(error: RayTaskError) -> str:
    cause = error.cause
    if isinstance(cause, RayTaskError | RayActorError):  # an argument of the call failed: its text says which
        return str(cause).strip().splitlines()[-1]
    return f"{type(cause).__name__}: {cause}" if cause is not None else str(error).strip().splitlines()[-1]


def methods_for_others(cls: type) -> dict[str, Callable[..., Any]]:
    """Name -> function, of what may be called on an actor of the class."""
    import inspect

    return {name: method for name, method in inspect.getmembers(cls, inspect.isfunction) if not name.startswith("_")}


def is_async(cls: type) -> bool:
    """Whether Ray runs its actors on an event loop."""
    import inspect

    return any(inspect.iscoroutinefunction(getattr(cls, name)) for name in dir(cls))
