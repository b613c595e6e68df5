"""The `rayllm` command: one sub-command a job, ``--config FILE`` and ``key=value`` overrides."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from jobs import stopping
from rayllm.config.base import Config, describe_fields, is_on_hub, is_remote, load_config
from rayllm.errors import FleetExhausted, InputError
from rayllm.lineage import config_inputs
from rayllm.startup import without_garbage_collection

LOG_WIDTH = 140
"""Columns of tables and paragraphs when the output goes to a file or a pipe."""

EXIT_FAILED, EXIT_INPUT, EXIT_EXHAUSTED = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Command:
    """Where a sub-command lives; imported when it is used."""

    module: str
    config: str
    summary: str
    words: tuple[str, ...] = ()
    """Keys whose values may be given without their names, in this order."""

    def config_class(self) -> type[Config]:
        module, name = self.config.split(":")
        found: type[Config] = getattr(importlib.import_module(f"rayllm.config.{module}"), name)
        return found


COMMANDS = {
    "world": Command("world", "world:WorldConfig", "write the toy world's documents, demonstrations and prompts"),
    "tokenizer": Command("tokenizer", "tokenizer:TokenizerConfig", "train a byte-level BPE tokenizer"),
    "pretrain": Command("pretrain", "pretrain:PretrainConfig", "next-token prediction on documents"),
    "sft": Command("sft", "sft:SftConfig", "supervised fine-tuning on demonstrations"),
    "label": Command("label", "label:LabelConfig", "sample answers with vLLM and rank them, best to worst"),
    "reward-model": Command("reward_model", "reward_model:RewardModelConfig", "learn a reward from rankings"),
    "process-reward-model": Command(
        "process_reward_model", "process_reward_model:ProcessRewardModelConfig", "learn a reward from labelled steps"
    ),
    "reward-report": Command(
        "reward_report", "reward_report:RewardReportConfig", "how far a reward model can be trusted, on any rankings"
    ),
    "preference": Command("preference", "preference:PreferenceConfig", "DPO and its kin: learn straight from rankings"),
    "online-preference": Command(
        "online_preference", "online_preference:OnlinePreferenceConfig", "label and preference in turns"
    ),
    "ppo": Command("ppo", "ppo:PPOConfig", "RLHF: improve the SFT model against the reward model"),
    "evaluate": Command("evaluate", "evaluate:EvaluateConfig", "all models side by side on held-out prompts"),
    "serve": Command("serve", "serve:ServeConfig", "serve a model as an OpenAI-compatible chat API"),
    "chat": Command("chat", "chat:ChatConfig", "talk to a served model in the terminal"),
    "lineage": Command("lineage", "lineage:LineageConfig", "where a model came from, down to the text", ("model",)),
    "verify": Command("verify", "verify:VerifyConfig", "whether a model's files are those written", ("model",)),
    "export": Command("export", "export:ExportConfig", "a folder for the hub, with a model card", ("model", "out")),
    "pipeline": Command("pipeline", "pipeline:PipelineConfig", "from the toy world to the evaluation, then a report"),
    "plan": Command("plan", "plan:PlanConfig", "what a run needs on a cluster: memory, seconds, the nearest fit"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 failed, 2 wrong input, 3 too few engines left, 130 Ctrl-C, 143 SIGTERM."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print_overview(console)
        sys.exit(0 if arguments else EXIT_INPUT)
    name, *rest = arguments
    if name == "--version":
        from importlib.metadata import version

        console.print(f"rayllm {version('rayllm')}", highlight=False)
        sys.exit(0)
    try:
        sys.exit(run_command(name, rest, console))
    except InputError as error:
        from rayllm.report.terminal import printable

        for line in printable(str(error)).splitlines():
            console.print(f"[red]error:[/red] {escape(line)}", highlight=False, soft_wrap=True)
        sys.exit(EXIT_INPUT)
    except KeyboardInterrupt:
        console.print("stopped; the same command continues where it was", highlight=False)
        sys.exit(stopping.status())


def main_of(name: str) -> None:
    """Entry point of ``python -m jobs.<name>``."""
    main([name, *sys.argv[1:]])


def run_command(name: str, arguments: Sequence[str], console: Console) -> int:
    """Parse, validate, run. Returns the exit status.

    Raises:
        InputError: unknown command or key, bad value, missing or unusable input.
    """
    command = find_command(name)
    parsed = parse(name, arguments)
    if parsed.help:
        print_command_help(console, name, command)
        return 0
    loaded = load_config(command.config_class(), parsed.config, parsed.overrides)
    if parsed.explain:
        if name != "ppo":
            raise InputError(f"--explain: for `rayllm ppo` only, got {name}")
        from jobs.ppo_explain import explain

        config: Any = loaded.config
        explain(config, console)
        return 0
    if parsed.json and name != "plan":
        raise InputError(f"--json: for `rayllm plan` only, got {name}")
    if name == "plan":
        from jobs.plan import plan

        planned: Any = loaded
        return plan(planned, console, address=parsed.address, to_json=parsed.json)
    if parsed.address:
        from jobs.submit import submit, submit_stages
        from rayllm.config.pipeline import PipelineConfig

        given = [word for path in parsed.config for word in ("--config", str(path))] + parsed.overrides
        if isinstance(loaded.config, PipelineConfig):
            return submit_stages(given, loaded.config, parsed.address, console)
        return submit(command.module, given, loaded.config, parsed.address, console)
    stopping.install()
    inputs = config_inputs(loaded.config).values()
    if any(map(is_on_hub, inputs)):
        from rayllm.hub import fetch_inputs

        loaded = fetch_inputs(loaded)
    if any(map(is_remote, inputs)):
        from rayllm.storage import fetch_inputs

        loaded = fetch_inputs(loaded)
    with without_garbage_collection():
        module = importlib.import_module(f"jobs.{command.module}")
    try:
        job = module.run(loaded, console, verbose=parsed.verbose)
    except (RuntimeError, OSError) as error:
        from rayllm.report.terminal import printable

        if parsed.verbose:
            raise
        console.print(f"[red]failed:[/red] {escape(printable(str(error)))}", highlight=False, soft_wrap=True)
        console.print("[dim]-v prints the libraries' own output[/dim]")
        return EXIT_EXHAUSTED if isinstance(error, FleetExhausted) else EXIT_FAILED
    if getattr(job, "done", False):
        console.print(f"[dim]✓ {job.stage} in {job.dir} is done and unchanged[/dim]", highlight=False)
    return 0


def find_command(name: str) -> Command:
    """Raises InputError with the nearest known name."""
    import difflib

    if name in COMMANDS:
        return COMMANDS[name]
    near = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(COMMANDS)}"
    raise InputError(f"{name}: no such command. {hint}")


def parse(name: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Options and overrides, in any order."""
    parser = argparse.ArgumentParser(prog=f"rayllm {name}", add_help=False, exit_on_error=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--config", type=Path, action="append", default=[])
    parser.add_argument("--address")
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("--explain", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*")
    try:
        parsed, unknown = parser.parse_known_intermixed_args(list(arguments))
    except argparse.ArgumentError as error:
        raise InputError(f"{name}: {error}") from None
    if unknown:
        known = "--config FILE, --address URL, --explain, --json, -v, --help, key=value"
        raise InputError(f"{unknown[0]}: unknown option. Known: {known}")
    parsed.overrides = name_words(parsed.overrides, find_command(name).words)
    return parsed


def name_words(overrides: Sequence[str], names: Sequence[str]) -> list[str]:
    """``key=value`` for each word: the n-th without ``=`` is the value of the n-th name."""
    left, named = list(names), []
    for word in overrides:
        named.append(f"{left.pop(0)}={word}" if left and "=" not in word else word)
    return named


def print_overview(console: Console) -> None:
    """`rayllm --help`."""
    console.print("[bold]rayllm[/bold]: from raw text to an aligned assistant, on a Ray cluster\n", highlight=False)
    usage = "usage: rayllm COMMAND \\[--config FILE] \\[key=value ...] \\[--address URL] \\[-v]\n"
    console.print(usage, highlight=False)
    table = Table.grid(padding=(0, 3))
    for name, command in COMMANDS.items():
        table.add_row(f"  [bold cyan]{name}[/bold cyan]", command.summary)
    console.print(table)
    console.print(
        "\n  --config FILE   settings as YAML; of several files later ones win, and key=value wins over all\n"
        "  --address URL   run as a Ray job on the cluster with this dashboard, e.g. http://HEAD:8265\n"
        "  --explain       ppo: the arithmetic of its batches as a table; starts nothing\n"
        "  --json          plan: as one JSON object\n"
        "  -v              show what Ray, vLLM and DeepSpeed print\n"
        "  --version       of rayllm\n\n"
        "rayllm COMMAND --help lists every setting. Start with:\n"
        "  rayllm pipeline --config jobs/configs/quickstart.yaml",
        highlight=False,
    )


def print_command_help(console: Console, name: str, command: Command) -> None:
    """Every field with its type, default and docstring."""
    console.print(f"[bold]rayllm {name}[/bold]: {command.summary}\n", highlight=False)
    words = "".join(f"{word.upper()} " for word in command.words)
    config = command.config_class()
    more = " \\[--address URL]" if "run_dir" in config.model_fields or name == "plan" else ""
    more += {"ppo": " \\[--explain]", "plan": " \\[--json]"}.get(name, "")
    usage = f"usage: rayllm {name} {words}\\[--config FILE] \\[key=value ...]{more} \\[-v]\n"
    console.print(usage, highlight=False)
    for key, kind, default, doc in describe_fields(config):
        console.print(f"  [bold cyan]{key}[/bold cyan]  [dim]{escape(kind)}, {escape(default)}[/dim]", highlight=False)
        if doc:
            console.print(Padding(escape(doc), (0, 0, 0, 6)), highlight=False)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
