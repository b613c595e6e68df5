"""A run on a cluster, worked out beforehand: what every process needs, what fits, and what a step takes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayllm.config.base import merge, read_yaml, validate
from rayllm.config.plan import ClusterConfig, PlanConfig, WorkloadConfig
from rayllm.config.ppo import PPOConfig
from rayllm.config.pretrain import PretrainConfig
from rayllm.config.reward_model import RewardModelConfig
from rayllm.config.sft import SftConfig
from rayllm.errors import InputError
from rayllm.planning import memory
from rayllm.planning.hardware import GIB, GIGA, find_gpu
from rayllm.planning.memory import Memory
from rayllm.planning.phases import Phase, PlannedRole, ppo_seconds, training_seconds
from rayllm.planning.roles import Job, RoleSpec, roles_of
from rayllm.planning.roofline import Machine
from rayllm.planning.sharing import bundles_of, held_by_others

JOBS: dict[str, type[Any]] = {
    "ppo": PPOConfig, "sft": SftConfig, "pretrain": PretrainConfig, "reward-model": RewardModelConfig
}  # fmt: skip

DATA = {
    "ppo": {"run_dir": "-", "prompts": "-"},
    "sft": {"run_dir": "-", "data": "-"},
    "pretrain": {"run_dir": "-", "documents": "-", "heldout": "-"},
    "reward-model": {"run_dir": "-", "rankings": "-", "heldout_rankings": "-"},
}
"""Job -> inputs that a plan does without."""


@dataclass(frozen=True, slots=True)
class Plan:
    job: Job
    cluster: ClusterConfig
    workload: WorkloadConfig
    roles: tuple[PlannedRole, ...]
    host_bytes: float
    """Of the node that needs most host memory."""

    problems: tuple[str, ...]
    """Empty if all fits: what does not, in words."""

    phases: tuple[Phase, ...]
    step_seconds: float
    tokens_per_step: float
    """Sampled by the policy; of a training job, read."""

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def slowest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.seconds)

    @property
    def gpus(self) -> float:
        kinds = bundles_of([(role.spec, role.memory) for role in self.roles])
        return sum(bundle.gpus * count for bundle, count in kinds.items())

    @property
    def cost_per_thousand_steps(self) -> float | None:
        """Of the whole cluster, for as long as a thousand steps take."""
        price = self.cluster.price_per_gpu_hour
        units = self.cluster.nodes * (self.cluster.gpus_per_node or 1)
        return None if price is None else 1000 * self.step_seconds / 3600 * units * price


def load_job(config: PlanConfig) -> Job:
    """The config of the run that is planned.

    Raises:
        InputError: as of every job's config; a key is one below ``settings``, or of the run's own files.
    """
    given: dict[str, Any] = {}
    for file in config.config:
        given = merge(given, read_yaml(file)[0])
    given = merge(given, config.settings)
    usual: dict[str, Any] = dict(DATA[config.job])
    if config.job == "ppo":
        usual["reward_model"] = given.get("model")  # of the same size, as usual
    try:
        return validate(JOBS[config.job], merge(usual, given), {}).config
    except InputError as error:
        lines = (f"settings of {config.job}: {line}" for line in str(error).splitlines())
        raise InputError("\n".join(lines)) from None


def make_plan(job: Job, cluster: ClusterConfig, workload: WorkloadConfig) -> Plan:
    """Work it out; no accelerator, no cluster and no weights are needed."""
    machine = machine_of(cluster)
    found = [(spec, spec.memory(machine)) for spec in roles_of(job, workload)]
    roles = tuple(_plan_role(spec, needs, held_by_others(spec, found), machine) for spec, needs in found)
    problems = [role.problem for role in roles if role.problem is not None]
    nodes, left = place(roles, cluster)
    problems += _capacity(roles, cluster, left)
    host = max(nodes)
    if host > cluster.memory_gib * GIB:
        problems.append(
            f"a node needs {host / GIB:,.1f} GiB of host memory for its processes, it has {cluster.memory_gib:,.1f} GiB"
        )
    if isinstance(job, PPOConfig):
        phases, step, tokens = ppo_seconds(job, roles, machine, workload)
    else:
        phases, step, tokens = training_seconds(job, roles[0], machine, workload)
    return Plan(
        job=job, cluster=cluster, workload=workload, roles=roles, host_bytes=host, problems=tuple(problems),
        phases=phases, step_seconds=step, tokens_per_step=tokens,
    )  # fmt: skip


def machine_of(cluster: ClusterConfig) -> Machine:
    """The cluster as rates. Raises InputError for an unknown kind of GPU."""
    gpu = None
    if cluster.gpus_per_node:
        gpu = find_gpu(cluster.gpu)
        given = {
            "memory": cluster.gpu_memory_gib and cluster.gpu_memory_gib * GIB,
            "bfloat16_flops": cluster.gpu_tflops and cluster.gpu_tflops * 1e12,
            "bandwidth": cluster.gpu_bandwidth_gb_s and cluster.gpu_bandwidth_gb_s * GIGA,
            "link": cluster.link_gb_s and cluster.link_gb_s * GIGA,
        }
        gpu = replace(gpu, **{name: value for name, value in given.items() if value is not None})
    return Machine(
        nodes=cluster.nodes,
        gpus_per_node=cluster.gpus_per_node,
        cpus_per_node=cluster.cpus_per_node,
        gpu=gpu,
        network=cluster.network_gbit_s * GIGA / 8,
        core_flops=cluster.cpu_gflops * GIGA,
        core_bandwidth=cluster.cpu_bandwidth_gb_s * GIGA,
    )


def _plan_role(spec: RoleSpec, needs: Memory, others: float | None, machine: Machine) -> PlannedRole:
    available = room(spec, others, machine)
    return PlannedRole(spec, needs, available, _problem(spec, needs, available))


def room(spec: RoleSpec, others: float | None, machine: Machine) -> float | None:
    """Bytes of a GPU that one process can fill: of its share, or of one that ``others`` hold so much of."""
    if not spec.gpus or machine.gpu is None:
        return None
    # vLLM fills what it is told to; it must then have that much.
    usable = machine.gpu.memory * (1.0 if spec.kind == "engine" else memory.GPU_USABLE)
    return usable * min(1.0, spec.gpus / spec.split) if others is None else max(0.0, usable - others)


def _problem(spec: RoleSpec, needs: Memory, available: float | None) -> str | None:
    split = spec.split
    if split > 1 and spec.gpus and spec.gpus != split:
        return (
            f"{spec.name}: an engine over tensor_parallel_size={split} GPUs needs rollout.gpus_per_actor={split}, "
            f"got {spec.gpus:g}"
        )
    if available is not None and needs.peak > available:
        has = "those on the same GPU leave" if spec.share else "it has"
        return f"{spec.name}: a process needs {needs.peak / GIB:,.1f} GiB of GPU memory, {has} {available / GIB:,.1f}"
    if needs.cache_needed > needs.cache_size:
        return (
            f"{spec.name}: an engine's cache holds {needs.cache_size / GIB:,.2f} GiB, one sequence of its "
            f"max_model_len needs {needs.cache_needed / GIB:,.2f}"
        )
    return None


def place(roles: Sequence[PlannedRole], cluster: ClusterConfig) -> tuple[list[float], dict[str, int]]:
    """Fill the nodes one after the other, the processes with the most GPUs first; a process stays on one node.

    Returns:
        Host memory that each node's processes take, in bytes; and role -> number of processes without a place.
    """
    used = [memory.CPU_DRIVER] + [0.0] * (cluster.nodes - 1)
    gpus, cpus = [float(cluster.gpus_per_node)] * cluster.nodes, [cluster.cpus_per_node] * cluster.nodes
    left: dict[str, int] = {}
    kinds = bundles_of([(role.spec, role.memory) for role in roles])
    for bundle, rest in sorted(kinds.items(), key=lambda item: -item[0].gpus):
        for node in range(cluster.nodes):
            if not rest:
                break
            fits = min(
                math.floor(cpus[node] / bundle.cpus + 1e-6),
                math.floor(gpus[node] / bundle.gpus + 1e-6) if bundle.gpus else rest,
                rest,
            )
            gpus[node] -= fits * bundle.gpus
            cpus[node] -= fits * bundle.cpus
            used[node] += fits * bundle.host
            rest -= fits
        for name in bundle.names if rest else ():
            left[name] = left.get(name, 0) + rest
    return used, left


def _capacity(roles: Sequence[PlannedRole], cluster: ClusterConfig, left: dict[str, int]) -> list[str]:
    """Which processes find no place: need against have."""
    found = []
    bundles = bundles_of([(role.spec, role.memory) for role in roles])
    for unit, each, name in (("gpus", cluster.gpus_per_node, "GPUs"), ("cpus", cluster.cpus_per_node, "CPUs")):
        kinds: Counter[tuple[tuple[str, ...], float]] = Counter()
        for bundle, count in bundles.items():
            kinds[bundle.names, getattr(bundle, unit)] += count
        need = sum(amount * count for (_, amount), count in kinds.items())
        if need > cluster.nodes * each + 1e-6:
            listed = " + ".join(f"{' with '.join(names)} {n} x {amount:g}" for (names, amount), n in kinds.items())
            found.append(f"the roles need {need:g} {name} ({listed}), the cluster has {cluster.nodes * each:g}")
    if left and not found:
        listed = ", ".join(f"{count} of {name}" for name, count in left.items())
        found.append(f"processes that find no node with enough free GPUs and CPUs: {listed}")
    return found
