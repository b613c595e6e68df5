"""How a cluster's GPUs are shared out between learners and engines."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rayllm.config.ppo import PPOConfig
from rayllm.config.rl import LearnerActorsConfig
from rayllm.planning.changes import Changes, is_valid, with_changes
from rayllm.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class Split:
    """GPUs of the learners and of the engines, and a step's seconds with them."""

    changes: Changes
    learner_gpus: int
    rollout_gpus: int
    plan: Plan


def best_split(plan: Plan) -> Split | None:
    """The split of the GPUs between learners and engines with the fewest seconds a step, of those that fit; None for a
    job without engines on GPUs."""
    fitting = [split for split in splits(plan) if split.plan.fits]
    return min(fitting, key=lambda split: split.plan.step_seconds, default=None)


def splits(plan: Plan) -> list[Split]:
    """Numbers of policy and critic ranks and of engines that fill the cluster's GPUs, fastest first."""
    job = plan.job
    if not isinstance(job, PPOConfig) or not (job.policy.gpus_per_actor and job.rollout.gpus_per_actor):
        return []
    learners = [name for name in ("policy", "critic") if name in job.learner_ranks]
    sections: dict[str, LearnerActorsConfig] = {name: getattr(job, name) for name in learners}
    others = sum(
        role.spec.num_actors * role.spec.gpus for role in plan.roles if role.spec.name not in (*learners, "rollout")
    )
    room = plan.cluster.nodes * plan.cluster.gpus_per_node - others
    each = sum(section.gpus_per_actor for section in sections.values())
    found = []
    for ranks in _counts(int(room // each), job.prompts_per_step):
        left = room - ranks * each
        engines = _engines(int(left // job.rollout.gpus_per_actor), ranks, job.prompts_per_step)
        if not engines:
            continue
        changes: Changes = {f"{name}.num_actors": ranks for name in learners} | {"rollout.num_actors": engines}
        if is_valid(plan, changes):
            split = with_changes(plan, changes)
            gpus = math.ceil(engines * job.rollout.gpus_per_actor)
            found.append(Split(changes, math.ceil(ranks * each), gpus, split))
    return sorted(found, key=lambda split: split.plan.step_seconds)


def _counts(most: int, prompts: int) -> list[int]:
    """Numbers of ranks that divide a step's prompts."""
    return [n for n in range(1, min(most, prompts) + 1) if prompts % n == 0]


def _engines(most: int, ranks: int, prompts: int) -> int:
    """The most engines with which the shards of ``ranks`` learners divide a step's prompts; 0 for none."""
    for engines in range(min(most, prompts), 0, -1):
        shards = ranks * -(-max(2, engines) // ranks)
        if prompts % shards == 0:
            return engines
    return 0
