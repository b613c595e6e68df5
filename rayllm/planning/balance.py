"""How a cluster's GPUs are shared out between those that learn, score and sample."""

from __future__ import annotations

from dataclasses import dataclass

from rayllm.config.ppo import PPOConfig
from rayllm.planning.changes import Changes, is_valid
from rayllm.planning.plan import Plan, make_plan


@dataclass(frozen=True, slots=True)
class Split:
    """Numbers of processes that fill the cluster, and the plan with them."""

    changes: Changes
    """Those that differ from what was planned."""

    plan: Plan

    def gpus(self, *names: str) -> int:
        """Of some roles together."""
        roles = [role.spec for role in self.plan.roles if role.spec.name in names]
        return round(sum(spec.num_actors * spec.gpus for spec in roles))


def best_split(plan: Plan) -> Split | None:
    """The split of the GPUs with the fewest seconds a step, of those that fit; None for a job without engines on
    GPUs."""
    return next((split for split in splits(plan) if split.plan.fits and is_valid(plan, split.changes)), None)


def splits(plan: Plan) -> list[Split]:
    """Shares of the cluster's GPUs for learners (policy and critic, as many ranks each), scorers (reference and reward
    model, as many each) and engines, which get what is left; the fastest first. Their configs are not yet validated."""
    job = plan.job
    if not isinstance(job, PPOConfig) or not (job.policy.gpus_per_actor and job.rollout.gpus_per_actor):
        return []
    if job.placement.mode != "split":  # roles that share a GPU have no part to give to another
        return []
    specs = {role.spec.name: role.spec for role in plan.roles if role.spec.gpus and role.spec.shape is not None}
    learners = {name: specs[name].gpus for name in ("policy", "critic") if name in specs}
    scorers = {name: specs[name].gpus for name in ("reference", "reward") if name in specs}
    room = plan.cluster.nodes * plan.cluster.gpus_per_node
    found = []
    for ranks in _counts(int(room // sum(learners.values())), job.prompts_per_step):
        left = room - ranks * sum(learners.values())
        for num_scorers in _powers(int(left // sum(scorers.values()))) if scorers else [0]:
            rest = int((left - num_scorers * sum(scorers.values())) // job.rollout.gpus_per_actor)
            engines = _engines(rest, ranks, job.prompts_per_step)
            if not engines:
                continue
            numbers: dict[str, int] = {name: ranks for name in learners} | {name: num_scorers for name in scorers}
            numbers["rollout"] = engines
            changed = {name: n for name, n in numbers.items() if n != getattr(job, name).num_actors}
            sections = {name: getattr(job, name).model_copy(update={"num_actors": n}) for name, n in changed.items()}
            other = make_plan(job.model_copy(update=sections), plan.cluster, plan.workload)
            found.append(Split({f"{name}.num_actors": n for name, n in changed.items()}, other))
    return sorted(found, key=lambda split: split.plan.step_seconds)


def _counts(most: int, prompts: int) -> list[int]:
    """Numbers of ranks that divide a step's prompts."""
    return [n for n in range(1, min(most, prompts) + 1) if prompts % n == 0]


def _powers(most: int) -> list[int]:
    """Powers of two up to ``most``, and the numbers half-way to the next."""
    found = [1 << k for k in range(most.bit_length())]
    return sorted({n for power in found for n in (power, power + power // 2) if n <= most})


def _engines(most: int, ranks: int, prompts: int) -> int:
    """The most engines with which the shards of ``ranks`` learners divide a step's prompts; 0 for none."""
    for engines in range(min(most, prompts), 0, -1):
        shards = ranks * -(-max(2, engines) // ranks)
        if prompts % shards == 0:
            return engines
    return 0
