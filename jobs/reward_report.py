"""How far a reward model can be trusted: its scores of any file of rankings or pairs, as report.html and JSON."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from actors.group import ActorGroup, Role, collect
from actors.placement import reserve
from actors.reward import RewardActor
from jobs.session import ray_session
from rayllm.config.base import Loaded
from rayllm.config.reward_report import RewardReportConfig
from rayllm.data.preferences import read_rankings
from rayllm.data.sources import check_sources
from rayllm.errors import InputError
from rayllm.lineage import write_json
from rayllm.models.folders import check_model_dir, load_tokenizer
from rayllm.report.html import write_report
from rayllm.report.reward import REPORT, Scored, reward_report
from rayllm.report.reward_view import reward_view
from rayllm.report.run import Run
from rayllm.report.terminal import print_done, print_preamble


def run(loaded: Loaded[RewardReportConfig], console: Console, *, verbose: bool = False) -> Run:
    """The `reward-report` job."""
    config = loaded.config
    check_model_dir(config.model, key="model")
    check_sources(config.rankings, key="rankings")
    job = Run("reward_report", loaded)
    if job.done:
        return job
    with job:
        tokenizer = load_tokenizer(config.model)
        limits = {"max_length": config.max_length, "max_bad_rows": config.max_bad_rows}
        data = read_rankings(config.rankings, tokenizer, **limits)
        found = {"rows": len(data.rankings), "pairs": data.num_pairs, "tokens": data.num_tokens}
        job.add_data("rankings", **data.origins.facts, **found, dropped=data.dropped)
        if not data.rankings:
            raise InputError(f"rankings: {config.rankings} has no pair with a better response")
        sequences = [sequence for ranking in data.rankings for sequence in ranking.sequences]
        with ray_session(job.logs_dir, verbose=verbose):
            role = Role("reward", config.reward.num_actors, config.reward.cpus_per_actor, config.reward.gpus_per_actor)
            with reserve([role], config.placement, console.print) as placement:
                print_preamble(console, job, placement=placement.describe())
                arguments = {"model": str(config.model), "micro_batch_size": config.reward.micro_batch_size}
                actors = ActorGroup(role, RewardActor, lambda rank: arguments, placement.seats(role))
                part = -(-len(sequences) // config.reward.num_actors)
                parts = [sequences[i : i + part] for i in range(0, len(sequences), part)]
                scores = torch.cat(collect(actors.map(RewardActor.raw_scores, parts), "reward"))
        report = reward_report(Scored(data.rankings, scores.double().numpy()), tokenizer)
        write_json(config.run_dir / REPORT, report)
        metrics = {name: report["accuracy"][name] for name in ("accuracy", "low", "high")}
        job.finish(metrics | {"calibration_error": report["calibration"]["error"]})
        page, _ = write_report(config.run_dir)
        print_table(console, report)
        console.print(f"  report   {page}", highlight=False, soft_wrap=True)
        print_done(console, job, {})
    return job


def print_table(console: Console, report: dict[str, Any]) -> None:
    """The verdict, and accuracies by group."""
    view = reward_view(report)
    assert view is not None
    table = Table(title=view["verdict"]["text"], title_justify="left", header_style="bold", pad_edge=False)
    for name in ("", "accuracy", "95 %", "pairs"):
        table.add_column(name, justify="right" if name else "left")
    for group in view["tables"]:
        if group["title"]:
            table.add_row(f"[dim]{group['title']}[/dim]")
        for row in group["rows"]:
            table.add_row(f"  {escape(row['group'])}", row["accuracy"], row["interval"], row["pairs"])
        table.add_section()
    console.print(table)
    for sentence in view["sentences"]:
        console.print(sentence, highlight=False)


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("reward-report")
