"""When a process of a model dies under an RL run: its group is rebuilt inside the job, and the loop goes on.

Policy and critic go back together, by the code that resumes a run: to the newest checkpoint that is whole, or to where
they started. Prompts, metrics and the engines' weights go back with them, so that the run ends as an undisturbed one.
A reference or a source of rewards has nothing to lose: only the step begins again, on the responses that are there.
Whoever is started anew must have the weights that it had at the first start. Engines are none of this: ``fleet.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import ray

from actors.group import collect, find_lost, never_ran
from actors.learner import LearnerActor
from actors.placement import LEARNERS, UNITS
from actors.supervisor import BUDGET_S, PLACE_S
from actors.watchman import WatchedGroup
from jobs.ppo_roles import setup
from jobs.ppo_watch import Watch
from rayllm.errors import FleetExhausted

LOOK_S = 0.5
CONTINUES = "The last checkpoint is intact: the same command continues"


class Recovery:
    """Of one run, from the moment that its roles are ready."""

    def __init__(self, watch: Watch, startup: Mapping[str, float]) -> None:
        """
        Args:
            startup: logged with the metrics of the start.
        """
        self._watch, self._roles, self._config = watch, watch.roles, watch.config
        self._startup = dict(startup)
        digests = {name: group.submit(LearnerActor.digest) for name, group in self._roles.models.items()}
        self._digests = {name: collect(found, name) for name, found in digests.items()}
        for group in self._roles.models.values():
            group.guard()
        self._lost: set[str] = set()
        """Roles that are to be started anew."""
        self._behind = True
        """Policy and critic are not where the run is."""
        self._rebuilds: list[float] = []

    def run(self, train: Callable[[], None]) -> None:
        """Train to the end: from the newest checkpoint on, and again after every loss.

        Raises:
            FleetExhausted: something was lost for which nothing can be started any more.
            RuntimeError: what ``train`` raised, with all processes alive.
        """
        found: tuple[Mapping[str, str], RuntimeError] | None = None
        while True:
            try:
                if found is not None:
                    self._account(*found)
                self._rebuild()
                if self._behind:
                    self._watch.resume(self._startup)
                    self._behind = False
                return train()
            except FleetExhausted:
                raise
            except RuntimeError as error:
                found = find_lost(list(self._roles.models.values())), error
                if not found[0]:
                    raise

    @property
    def _changing(self) -> set[str]:
        """Roles whose weights change in the run."""
        moves = {"reference"} if self._config.reference.update_every is not None else set()
        return (moves | set(LEARNERS)) & self._roles.models.keys()

    def _account(self, lost: Mapping[str, str], error: RuntimeError) -> None:
        """Decide what becomes of the run."""
        told = "; ".join(f"{role} is lost: {self._reason(role) or how}" for role, how in lost.items())
        self._watch.tell(told)
        self._check(told, error)
        self._lost |= lost.keys()
        step = self._watch.step
        if not (self._behind or self._lost & self._changing or step is None or self._begun(step)):
            self._watch.tell(f"{_names(self._lost)} starts anew; step {step + 1} begins again")
            return
        self._watch.forget_step()
        self._behind = True
        steps = self._watch.checkpoints.steps()
        if self._watch.changed and not steps:
            self._lost |= self._changing
        where = f"the checkpoint of step {steps[-1]}" if steps else "the start"
        self._watch.tell(f"{_names(self._lost)} starts anew; the run goes back to {where}")

    def _reason(self, role: str) -> str:
        """Why the processes of a role were ended for want of progress, if they were; their stacks go to the logs."""
        why, stacks = self._roles.models[role].leave()
        if stacks:
            logs = self._watch.job.logs_dir
            logs.mkdir(exist_ok=True)
            with (logs / "model-stacks.txt").open("a") as file:
                file.write(f"{role}: {why}\n{stacks}\n")
        return why

    def _begun(self, step: int) -> bool:
        """Whether policy or critic has begun the update of a step. They are asked when they are done with it: what they
        cannot do for want of what was lost fails at once."""
        learners = [group for name, group in self._roles.models.items() if name in LEARNERS]
        return any(any(group.call(LearnerActor.has_begun, step)) for group in learners)

    def _check(self, told: str, error: RuntimeError) -> None:
        """Whether anything may be started anew."""
        rollout, placement, now = self._config.rollout, self._config.placement, time.monotonic()
        self._rebuilds = [when for when in self._rebuilds if now - when < BUDGET_S]
        allowed, reason = self._config.recovery.max_rebuilds, None
        if len(self._rebuilds) >= allowed:
            reason = f"the rebuilds of an hour (recovery.max_rebuilds={allowed}) are used up"
        elif placement.mode == "colocated" or rollout.weight_transfer != "memory":
            modes = f"placement.mode={placement.mode} and rollout.weight_transfer={rollout.weight_transfer}"
            reason = f"with {modes} nobody can be replaced"
        if reason:
            raise FleetExhausted(f"{told}: {reason}. {CONTINUES}") from error
        self._rebuilds.append(now)

    def _rebuild(self) -> None:
        """Start anew what was lost, and let the step begin again if that is all there is to do."""
        if not self._lost:
            return
        began = time.monotonic()
        groups = {name: group for name, group in self._roles.models.items() if name in self._lost}
        for group in groups.values():
            group.renew()
        if "policy" in groups:
            self._roles.rollout.begin_again()
        self._wait_for_places(groups)
        starting = {name: (setup(group), group.submit(LearnerActor.digest)) for name, group in groups.items()}
        for name, (ready, found) in starting.items():
            collect(ready, name)
            self._compare(name, collect(found, name))
        self._watch.tell(f"{_names(groups)} is back after {time.monotonic() - began:.1f} s")
        if self._lost >= self._changing:
            self._watch.changed = False
        if not self._behind:
            self._watch.step_again(score=bool(self._lost - {"reference"}))
        self._lost.clear()

    def _wait_for_places(self, groups: Mapping[str, WatchedGroup[Any]]) -> None:
        """Where a node went, others must have room, or come in time."""
        limit, deadline = max(self._config.placement.wait_s, PLACE_S), 0.0
        waiting = {reference: group for group in groups.values() for reference in group.ready()}
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=LOOK_S)
            astray = {waiting[reference] for reference in done if never_ran(reference)}
            waiting = {ref: group for ref, group in waiting.items() if ref not in done and group not in astray}
            for group in astray:
                group.renew()
                waiting |= dict.fromkeys(group.ready(), group)
            homeless = [group.role for group in groups.values() if not group.held()]
            deadline = deadline or time.monotonic() + limit if homeless else 0.0
            if homeless and time.monotonic() > deadline:
                needs = ", ".join(f"{r.name} {r.num_actors} x {r.cpus:g} CPU and {r.gpus:g} GPU" for r in homeless)
                free = ray.available_resources()
                have = " and ".join(f"{free.get(unit, 0):g} {unit}" for unit in UNITS)
                raise FleetExhausted(
                    f"no place was found within {limit:g} s: needed are {needs}, free are {have}. {CONTINUES}"
                )

    def _compare(self, name: str, found: list[str]) -> None:
        """Raise RuntimeError unless a role has the weights that it started from first."""
        first = self._digests[name]
        if found != first:
            raise RuntimeError(
                f"{name} has other weights than at the first start of the run (xxh3 {', '.join(found)}; then "
                f"{', '.join(first)}): its model folder was changed meanwhile"
            )


def _names(roles: Mapping[str, Any] | set[str]) -> str:
    return " with ".join(sorted(roles))
