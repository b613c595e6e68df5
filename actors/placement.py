"""Roles to placement groups: what a job needs against what the cluster has, held from the check until the job ends.

Each role has a group of its own, or shares one with others (`PlacementConfig.shares`). A bundle is what lies on one
node: one actor's CPUs and GPUs (so an engine over several GPUs has them on one node), or, where roles share, one GPU
and the CPUs of all actors on it. Ray label selectors keep the bundles on nodes of their type: unlike custom resources
labels are not used up, and autoscalers and Kubernetes know them.
"""

from __future__ import annotations

import difflib
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from actors.group import Role, Seats
from rayllm.config.common import PlacementConfig
from rayllm.errors import InputError

LABEL = "rayllm.role"
"""The Ray label of nodes that says their type."""

LEARNERS = ("policy", "critic")
"""Their ranks wait for each other: near together. Others are spread: a node that is lost takes few with it."""

UNITS = ("CPU", "GPU")
LOOK_S = 2.0

PATIENCE_S = 20.0
"""Seconds, the first time, after which a job that has some of its groups and not all gives them back and asks anew."""


@dataclass(frozen=True, slots=True)
class Share:
    """Roles in one placement group. Where they are several, rank i of each is in bundle i, and a bundle has one GPU."""

    roles: tuple[Role, ...]
    node_type: str | None

    @property
    def on_gpu(self) -> list[Role]:
        return [role for role in self.roles if role.gpus]

    @property
    def gpus(self) -> float:
        """Of each actor of a role with GPUs: one that shares has a part."""
        sharing = len(self.on_gpu)
        if sharing > 1:
            return (10_000 // sharing) / 10_000  # Ray counts in ten-thousandths
        return self.on_gpu[0].gpus if sharing else 0.0

    def bundle_of(self, rank: int) -> int:
        """Of an actor."""
        return rank % max(role.num_actors for role in self.on_gpu or self.roles)

    def bundles(self) -> list[dict[str, float]]:
        """Resources of each."""
        found: dict[int, dict[str, float]] = {}
        for role in self.roles:
            for rank in range(role.num_actors):
                bundle = found.setdefault(self.bundle_of(rank), {"CPU": 0.0})
                bundle["CPU"] = round(bundle["CPU"] + role.cpus, 4)
                if role.gpus:
                    bundle["GPU"] = 1.0 if len(self.on_gpu) > 1 else role.gpus
        return [found[index] for index in sorted(found)]

    def selector(self) -> dict[str, str]:
        """Ray's label selector of its nodes."""
        return {} if self.node_type is None else {LABEL: self.node_type}

    def ask(self) -> PlacementGroup:
        """For its bundles; an autoscaler sees what is asked for."""
        near = len(self.roles) > 1 or self.roles[0].name in LEARNERS
        bundles, selector = self.bundles(), self.selector()
        selectors = [selector] * len(bundles) if selector else None
        return placement_group(bundles, "PACK" if near else "SPREAD", bundle_label_selector=selectors)


class Placement:
    """Resources that are held for roles, until `close` or the end of this process.

    As a context it closes unless an error ended it: Ray itself may be what is gone, and then its calls hang.
    """

    def __init__(self, shares: Sequence[Share], groups: Sequence[PlacementGroup]) -> None:
        self._shares, self._groups = shares, groups

    def seats(self, role: Role) -> Seats:
        """Where the actors of a role go."""
        (found,) = (index for index, share in enumerate(self._shares) if role in share.roles)
        share = self._shares[found]
        bundles = tuple(share.bundle_of(rank) for rank in range(role.num_actors))
        return Seats(self._groups[found], bundles, share.gpus if role.gpus else 0.0, share.selector())

    def describe(self) -> list[tuple[str, str]]:
        """(role, what is held for it) rows for people."""
        rows = []
        for share in self._shares:
            for role in share.roles:
                device = f"{role.gpus:g} GPU, {role.cpus:g} CPU" if role.gpus else f"{role.cpus:g} CPU"
                others = ", ".join(other.name for other in share.roles if other is not role)
                where = f" on {share.node_type} nodes" if share.node_type else ""
                rows.append((role.name, f"{role.num_actors} x {device}{where}" + f", with {others}" * bool(others)))
        return rows

    def close(self) -> None:
        """Give all back; what runs there ends."""
        give_back(self._groups)

    def __enter__(self) -> Placement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()


def reserve(roles: Sequence[Role], config: PlacementConfig, say: Callable[[str], Any]) -> Placement:
    """Hold what all roles need. Ray itself would wait for ever without a word.

    A cluster that is too small is an error at once, or after ``config.wait_s`` seconds in which an autoscaler may bring
    nodes; for resources that other jobs hold it waits as long as they do. Either way it says what it waits for.

    Raises:
        InputError: need against have.
    """
    deadline = time.monotonic() + config.wait_s
    shares = shares_of(roles, config)
    lacks = _lacks(shares)
    if lacks and not config.wait_s:
        raise InputError(f"placement: {lacks}; ask for less, or set placement.wait_s where nodes may come")
    told = lacks or ""
    if told:
        say(f"waiting for nodes: {told}")
    groups, patience, asked = [share.ask() for share in shares], PATIENCE_S, time.monotonic()
    while not _all_there(groups):
        lacks = _lacks(shares)
        if lacks and time.monotonic() > deadline:
            give_back(groups)
            raise InputError(f"placement: {lacks}; no nodes came within placement.wait_s={config.wait_s:g}")
        if told != (lacks or "busy"):  # what is free changes all the time
            say(f"waiting for nodes: {lacks}" if lacks else f"waiting for other jobs to end: {_busy(shares)}")
            told = lacks or "busy"
        if not lacks and time.monotonic() - asked > patience:
            # Two jobs that hold a half each would wait for each other for ever.
            give_back(groups)
            time.sleep(LOOK_S + random.uniform(0, LOOK_S))
            if _nobody_else():
                raise InputError(f"placement: {_busy(shares)}, but no way was found to place them node by node")
            groups, patience, asked = [share.ask() for share in shares], 2 * patience, time.monotonic()
    return Placement(shares, groups)


def shares_of(roles: Sequence[Role], config: PlacementConfig) -> list[Share]:
    """The roles with those that they share with, and their types of nodes on this cluster."""
    labelled = any(LABEL in node["Labels"] for node in alive_nodes())
    found = {role.name: role for role in roles}
    shares = [
        Share(tuple(found[name] for name in names), config.node_type(names[0], labelled=labelled))
        for names in config.shares(list(found))
    ]
    # Ray places one group after the other: those that need most of one node first.
    return sorted(shares, key=lambda share: max((b.get("GPU", 0), b["CPU"]) for b in share.bundles()), reverse=True)


def give_back(groups: Iterable[PlacementGroup]) -> None:
    for group in groups:
        remove_placement_group(group)


def _all_there(groups: Sequence[PlacementGroup]) -> bool:
    """After `LOOK_S` at the latest."""
    found, _ = ray.wait([group.ready() for group in groups], num_returns=len(groups), timeout=LOOK_S)
    return len(found) == len(groups)


def alive_nodes() -> list[dict[str, Any]]:
    """What Ray tells of the nodes that it takes to be alive."""
    return [node for node in ray.nodes() if node["Alive"]]


def _lacks(shares: Sequence[Share]) -> str | None:
    """What the cluster can never place as it is; None if it is large enough."""
    nodes = alive_nodes()
    for node_type in dict.fromkeys(share.node_type for share in shares):
        wanted = [share for share in shares if share.node_type == node_type]
        there = [n["Resources"] for n in nodes if node_type is None or n["Labels"].get(LABEL) == node_type]
        if not there:
            return _no_such_type(wanted, nodes)
        where = "" if node_type is None else f" on {node_type} nodes"
        for unit in UNITS:
            need, has = _total(wanted, unit), sum(node.get(unit, 0) for node in there)
            if need > has + 1e-6:
                listed = " + ".join(_listed(share, unit) for share in wanted)
                return f"the roles need {need:g} {unit}{where} ({listed}), the cluster has {has:g}"
        for share in wanted:
            for bundle in share.bundles():
                if not any(all(bundle.get(unit, 0) <= node.get(unit, 0) for unit in UNITS) for node in there):
                    names = " + ".join(role.name for role in share.roles)
                    return (
                        f"one actor of {names} needs {bundle['CPU']:g} CPU and {bundle.get('GPU', 0):g} GPU{where}; "
                        "no node has both"
                    )
    return None


def _no_such_type(wanted: Sequence[Share], nodes: Sequence[dict[str, Any]]) -> str:
    """In words, with the types that there are."""
    node_type = str(wanted[0].node_type)
    names = ", ".join(role.name for share in wanted for role in share.roles)
    types = sorted({node["Labels"][LABEL] for node in nodes if LABEL in node["Labels"]})
    near = difflib.get_close_matches(node_type, types, n=1)
    hint = f", did you mean {near[0]}?" if near else ""
    has = f"those of the cluster are {', '.join(types)}" if types else "no node of the cluster has that label"
    leader = wanted[0].roles[0].name.split(".")[0]
    return (
        f"{names} go{'es' * (', ' not in names)} to nodes with {LABEL}={node_type} (placement.node_types.{leader}), "
        f"{has}{hint}"
    )


def _listed(share: Share, unit: str) -> str:
    """What one share asks for."""
    bundles = [bundle.get(unit, 0) for bundle in share.bundles()]
    names = " with ".join(role.name for role in share.roles)
    if len(set(bundles)) == 1:
        return f"{names} {len(bundles)} x {bundles[0]:g}"
    return f"{names} {sum(bundles):g}"


def _busy(shares: Sequence[Share]) -> str:
    has, free = ray.cluster_resources(), ray.available_resources()
    return ", ".join(
        f"the roles need {need:g} {unit}, {free.get(unit, 0):g} of {has[unit]:g} are free"
        for unit in UNITS
        if (need := _total(shares, unit))
    )


def _nobody_else() -> bool:
    """Whether all that there is is free."""
    free = ray.available_resources()
    return all(free.get(unit, 0) >= amount - 1e-6 for unit, amount in ray.cluster_resources().items() if unit in UNITS)


def _total(shares: Sequence[Share], unit: str) -> float:
    return sum(bundle.get(unit, 0) for share in shares for bundle in share.bundles())


@dataclass(frozen=True, slots=True)
class Where:
    """Actors of one role on one node."""

    role: str
    ranks: list[int]
    node: str
    """Its address, and the first digits of Ray's id: nodes of a test cluster share one address."""

    node_type: str | None
    gpus: list[str]
    """Ray's ids of the node's GPUs, a rank each; those of one rank are joined by a comma."""


class Placed(Protocol):
    """Actors of one role."""

    role: Role

    def whereabouts(self) -> list[tuple[str, list[str]]]:
        """As of an `ActorGroup`."""


def where(groups: Iterable[Placed]) -> list[Where]:
    """Where every actor really runs; they must be up."""
    nodes = {node["NodeID"]: node for node in ray.nodes()}
    rows: dict[tuple[str, str], Where] = {}
    for group in groups:
        for rank, (node_id, gpus) in enumerate(group.whereabouts()):
            node = nodes[node_id]
            name = f"{node['NodeManagerAddress']} {node_id[:6]}"
            row = Where(group.role.name, [], name, node["Labels"].get(LABEL), [])
            row = rows.setdefault((group.role.name, node_id), row)
            row.ranks.append(rank)
            row.gpus.append(",".join(gpus))
    return list(rows.values())
