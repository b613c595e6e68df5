"""What a step consists of, and the seconds of its parts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rayllm.config.common import TrainConfig
from rayllm.config.plan import WorkloadConfig
from rayllm.config.ppo import PPOConfig
from rayllm.config.pretrain import PretrainConfig
from rayllm.config.reward_model import RewardModelConfig
from rayllm.planning import roofline
from rayllm.planning.hardware import PCIE
from rayllm.planning.memory import Memory
from rayllm.planning.roles import RoleSpec
from rayllm.planning.roofline import Machine


@dataclass(frozen=True, slots=True)
class PlannedRole:
    """A role and what one of its processes takes."""

    spec: RoleSpec
    memory: Memory
    available: float | None
    """Bytes of its share of a GPU that can be filled, less what others hold on it; None on CPU, where a node's
    processes share its memory."""

    problem: str | None
    """Why it does not fit by itself."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Part of a step. Roles of one phase work side by side."""

    name: str
    seconds: float
    role: str
    """The one that takes longest."""


Seconds = tuple[tuple[Phase, ...], float, float]
"""Phases, seconds of a step, and its tokens."""


def ppo_seconds(job: PPOConfig, roles: tuple[PlannedRole, ...], machine: Machine, workload: WorkloadConfig) -> Seconds:
    """Of a step: sampling, scoring, the updates side by side, and the weights' way to the engines."""
    found = {role.spec.name: role for role in roles}
    rows = job.prompts_per_step * job.samples_per_prompt
    new = min(workload.response_tokens or job.rollout.max_new_tokens, job.rollout.max_new_tokens)
    tokens = workload.prompt_tokens + new
    passes: dict[str, int] = {
        name: 1 for name in ("reference", "reward", "critic") if name in found and found[name].spec.shape
    }
    # Its log-probabilities before the first of several updates, and with LoRA those of the start policy.
    is_reference = job.algorithm.kl_coef > 0 and job.policy.learner.lora.rank is not None
    passes["policy"] = (job.algorithm.updates_per_step > 1) + is_reference
    scores: dict[str, float] = {
        name: n * _score(found[name].spec, machine, rows, tokens) for name, n in passes.items() if n
    }
    learners = [name for name in ("policy", "critic") if name in found]
    updates: dict[str, float] = {
        name: _update(job, found[name].spec, machine, rows, tokens) + _moving(found[name]) for name in learners
    }
    sampling = {"rollout": _sampling(job, found["rollout"], machine, workload.prompt_tokens, new)}
    engine = found["rollout"].spec
    assert engine.shape is not None
    dtype = str(engine.engine.get("dtype", "bfloat16" if engine.gpus else "float32"))
    phases = (
        _phase("rollout", sampling, found, machine),
        _phase("score", scores, found, machine),
        _phase("update", updates, found, machine),
        Phase("sync", roofline.sync_seconds(machine, engine.shape, job.policy.learner, dtype), "policy"),
    )
    rollout, score, update, sync = (phase.seconds for phase in phases)
    turn = max(rollout, score + update) if job.max_policy_lag else rollout + score + update
    return phases, turn + sync, float(rows * new)


def _moving(role: PlannedRole) -> float:
    """Of optimizer states, in and out."""
    on_gpu = role.spec.takes_turns and role.spec.gpus
    return 2 * role.memory.optimizer / PCIE if on_gpu else 0.0


def _score(spec: RoleSpec, machine: Machine, rows: int, tokens: float) -> float:
    assert spec.shape is not None
    dtype = spec.learner.dtype if spec.learner is not None else "float32"
    return roofline.score_seconds(
        _machine_for(spec, machine), spec.shape, sequences=rows / spec.num_actors, tokens=tokens, dtype=dtype,
        cores=spec.cpus,
    )  # fmt: skip


def _sampling(job: PPOConfig, engine: PlannedRole, machine: Machine, prompt_tokens: int, new_tokens: int) -> float:
    spec = engine.spec
    assert spec.shape is not None
    seconds = roofline.sampling_seconds(
        _machine_for(spec, machine), spec.shape, spec.engine,
        sequences=job.prompts_per_step * job.samples_per_prompt / spec.num_actors,
        prompts=job.prompts_per_step / spec.num_actors, prompt_tokens=prompt_tokens, new_tokens=new_tokens,
        concurrency=engine.memory.concurrency or 1, cores=spec.cpus,
    )  # fmt: skip
    greedy = job.algorithm.advantage_kind.needs_greedy_baseline
    return seconds * (1 + 1 / job.samples_per_prompt) if greedy else seconds


def _update(job: PPOConfig, spec: RoleSpec, machine: Machine, rows: int, tokens: float) -> float:
    assert spec.shape is not None and spec.learner is not None
    algorithm = job.algorithm
    minibatch = -(-rows // spec.num_actors // algorithm.num_minibatches)
    return roofline.update_seconds(
        _machine_for(spec, machine), spec.shape, spec.learner, ranks=spec.num_actors,
        sequences=rows / spec.num_actors * algorithm.num_epochs, tokens=tokens,
        optimizer_steps=algorithm.updates_per_step,
        micro_batches=algorithm.updates_per_step * max(1, -(-minibatch // spec.rows)), cores=spec.cpus,
    )  # fmt: skip


def training_seconds(job: TrainConfig, role: PlannedRole, machine: Machine, workload: WorkloadConfig) -> Seconds:
    """Of one optimizer step."""
    spec = role.spec
    assert spec.shape is not None and spec.learner is not None
    per_prompt = workload.responses_per_prompt if isinstance(job, RewardModelConfig) else 1
    tokens = spec.tokens if isinstance(job, PretrainConfig) else min(workload.row_tokens or spec.tokens, spec.tokens)
    rows = job.batch_size * per_prompt
    seconds = roofline.update_seconds(
        _machine_for(spec, machine), spec.shape, spec.learner, ranks=spec.num_actors,
        sequences=rows / spec.num_actors, tokens=tokens, optimizer_steps=1,
        micro_batches=max(1, -(-rows // spec.num_actors // spec.rows)), cores=spec.cpus,
    )  # fmt: skip
    seconds = _side_by_side({spec.name: seconds}, {spec.name: role}, machine)
    return (Phase("update", seconds, spec.name),), seconds, float(rows * tokens)


def _machine_for(spec: RoleSpec, machine: Machine) -> Machine:
    """A role without GPUs computes on CPU wherever it is."""
    return machine if spec.gpus else replace(machine, gpu=None)


def _phase(name: str, seconds: dict[str, float], roles: dict[str, PlannedRole], machine: Machine) -> Phase:
    if not seconds:
        return Phase(name, 0.0, "none")
    return Phase(name, _side_by_side(seconds, roles, machine), max(seconds, key=lambda role: seconds[role]))


def _side_by_side(seconds: dict[str, float], roles: dict[str, PlannedRole], machine: Machine) -> float:
    """The slowest, of roles that share GPUs their sum; on CPU also no less than all the work over all the cores."""
    on_cpu = {name: s for name, s in seconds.items() if not roles[name].spec.gpus}
    work = sum(s * roles[name].spec.num_actors * max(1.0, roles[name].spec.cpus) for name, s in on_cpu.items())
    shares: dict[tuple[str, ...], float] = {}
    for name, each in seconds.items():
        share = roles[name].spec.share if roles[name].spec.gpus else ()
        shares[share or (name,)] = shares.get(share or (name,), 0.0) + each
    return max([*shares.values(), work / (machine.nodes * machine.cpus_per_node)])
