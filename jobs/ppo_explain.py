"""`rayllm ppo --explain`: the arithmetic of a run's batches, before anything starts."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from rayllm.config.ppo import PPOConfig


def explain(config: PPOConfig, console: Console) -> None:
    """Print what one step and the whole run amount to. What does not divide was refused with the config."""
    table = Table.grid(padding=(0, 3))
    for what, number, how in lines(config):
        table.add_row(what, f"[bold]{number}[/bold]", f"[dim]{how}[/dim]")
    console.print(table, highlight=False)


def lines(config: PPOConfig) -> list[tuple[str, str, str]]:
    """(what, number, how it comes about)."""
    algorithm, shards = config.algorithm, config.num_shards
    rows = config.prompts_per_step * config.samples_per_prompt
    updates = algorithm.updates_per_step
    tokens = rows * config.rollout.max_new_tokens
    found = [
        ("prompts a step", f"{config.prompts_per_step:,}", "prompts_per_step"),
        ("responses a step", f"{rows:,}", f"x samples_per_prompt {config.samples_per_prompt}"),
        ("response tokens a step", f"at most {tokens:,}", f"x rollout.max_new_tokens {config.rollout.max_new_tokens}"),
        ("shards", f"{shards}", f"{rows // shards:,} responses each, over {config.rollout.num_actors} rollout actors"),
        ("steps under way", f"{1 + config.max_policy_lag}", f"responses are at most max_policy_lag "
         f"{config.max_policy_lag} updates old; off-policy correction: {config.off_policy}"),
        ("optimizer steps a step", f"{updates}",
         f"{algorithm.num_epochs} epochs x {algorithm.num_minibatches} minibatches"),
    ]  # fmt: skip
    for role, ranks in config.learner_ranks.items():
        on_rank = rows // ranks
        least, most = on_rank // algorithm.num_minibatches, -(-on_rank // algorithm.num_minibatches)
        size = getattr(config, role).micro_batch_size
        found += [
            (f"{role}: responses a rank", f"{on_rank:,}", f"over {ranks} ranks"),
            (f"{role}: minibatch a rank", f"{most:,}" if least == most else f"{least:,} to {most:,}",
             f"/ {algorithm.num_minibatches} minibatches; {most * ranks:,} over all ranks"),
            (f"{role}: micro-batches", f"{-(-most // size)}", f"of at most {size} responses, for each optimizer step"),
        ]  # fmt: skip
    extra = config.shaping.resample_rounds
    if extra:
        found.append(("resampled a step", f"at most {extra * rows:,} responses", f"{extra} rounds"))
    steps = config.num_steps
    found += [
        ("steps", f"{steps:,}", "num_steps"),
        ("responses in all", f"{steps * rows:,}", ""),
        ("optimizer steps in all", f"{max(0, steps - warmup_steps(config)) * updates:,}", _warmup_note(config)),
    ]
    return found


def warmup_steps(config: PPOConfig) -> int:
    """Steps in which the policy does not learn yet."""
    return config.critic.warmup_steps if "critic" in config.learner_ranks else 0


def _warmup_note(config: PPOConfig) -> str:
    steps = warmup_steps(config)
    return f"of the policy: not in the first {steps} steps (critic.warmup_steps)" if steps else "of the policy"
