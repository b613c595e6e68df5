"""What a person sees while a job runs: a block before the first step, live progress, a line at the end.

On a terminal progress is drawn with rich; elsewhere each update is one plain ``key=value`` line.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rayllm.report.run import Run

Tokens = Sequence[int] | np.ndarray
"""Token ids, or one flag a token."""

_CONTROL = {
    code: None
    for code in (*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
    if chr(code) not in "\n\t"
}
"""Characters that move the cursor, recolour the screen or turn the direction of what follows."""

PLAIN_INTERVAL = 10.0
"""Least seconds between two plain lines."""


def print_preamble(
    console: Console,
    run: Run,
    *,
    example: Sequence[tuple[str, bool]] = (),
    placement: Sequence[tuple[str, str]] = (),
    trained: Mapping[str, tuple[int, int] | None] | None = None,
) -> None:
    """The block before the first step.

    Args:
        console: where to print.
        run: gives settings, parents and data.
        example: one training example as (text, trained) pieces.
        placement: (role, where) rows.
        trained: name of a model -> numbers of its parameters that are trained, and in all; None if all are.
    """
    verb = "resumes in" if run.resuming else "in"
    console.rule(f"[bold]{run.stage}[/bold] {verb} {escape(shown_path(run.dir))}", align="left", style="dim")
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    if run.moved_aside:
        table.add_row("moved", escape(printable(run.moved_aside)))
    for parent in run.record["parents"]:
        table.add_row(parent["role"], f"{escape(shown_path(parent['path']))} [dim]{parent['id'][:12]}[/dim]")
    for data in run.record["data"]:
        table.add_row(data["name"], escape(printable(_data_line(data))))
    for key, change in run.record["changed"].items():
        if key in ("run_dir", "overwrite") or any(f"{name}.".startswith(f"{key}.") for name in run.inputs):
            continue
        setting = escape(f"{key} = {change['value']}")
        origin = escape(f"{change['origin']}, default {change['default']}")
        table.add_row("setting", f"{setting} [dim]({origin})[/dim]")
    for role, where in placement:
        table.add_row("placement", escape(f"{role}: {where}"))
    for name, counts in (trained or {}).items():
        if counts is not None:
            some, total = counts
            table.add_row("trained", f"{name}: {some:,} of {total:,} parameters ({100 * some / total:.3g} %)")
    if example:
        table.add_row("example", _example_text(example, plain=not console.is_terminal))
    console.print(table)


def print_where(console: Console, run: Run, rows: Sequence[Any]) -> None:
    """A table of where the actors of a run are, which goes into run.json too.

    Args:
        console: where to print.
        run: gets ``placement``.
        rows: dataclasses with ``role``, ``ranks``, ``node``, ``node_type`` and ``gpus``: actors of a role on one node.
    """
    run.describe(placement=[asdict(row) for row in rows])
    typed, on_gpu = any(row.node_type for row in rows), any(gpu for row in rows for gpu in row.gpus)
    columns = ["role", "ranks", "node", *["type"] * typed, *["GPU of each"] * on_gpu]
    table = Table(*columns, title="where each actor runs", title_justify="left", title_style="dim", box=None)
    for row in rows:
        ranks = ", ".join(map(str, row.ranks))
        cells = [row.role, ranks, row.node, *[row.node_type or "–"] * typed, *[" ".join(row.gpus) or "–"] * on_gpu]
        table.add_row(*map(escape, cells))
    console.print(table, highlight=False)


def printable(text: str) -> str:
    """``text`` without control characters other than newline and tab, and without half characters: whatever a model or
    a file says, it cannot move the cursor or dress up as another line."""
    return text.encode(errors="replace").decode().translate(_CONTROL)


def shown_path(path: Path | str) -> str:
    """Relative to the current folder when it lies below it."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _data_line(data: Mapping[str, Any]) -> str:
    source = shown_path(data["path"])
    if data.get("sources"):
        source = " + ".join(
            f"{shown_path(part['path'])} (weight {part['weight']:g}, {part['rows']:,} rows)" for part in data["sources"]
        )
    parts = [f"read as {data['format']}, {data['read']:,} rows; kept"] if data.get("format") else []
    counted = ("rows", "tokens", "pairs", "heldout_rows")
    parts = [*parts, ", ".join(f"{data[name]:,} {name.replace('_', ' ')}" for name in counted if name in data)]
    for name, what in (("duplicates", "of them again"), ("cut", "of them cut")):
        if data.get(name):
            parts[-1] += f" ({data[name]:,} {what})"
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in (data.get("dropped") or {}).items())
    end = f"dropped: {dropped}" if dropped else "none dropped"
    if data.get("bad_rows"):
        end += f"; passed over {data['bad_rows']:,} bad rows, first: " + "; ".join(data["first_bad_rows"])
    return f"{source}: {' '.join(parts)}; {end}"


def _example_text(pieces: Sequence[tuple[str, bool]], *, plain: bool) -> Text:
    text = Text()
    for piece, trained in pieces:
        shown = printable(piece.replace("\n", "⏎"))
        if plain:
            text.append(f"[[{shown}]]" if trained else shown)
        else:
            text.append(shown, style="bold green" if trained else "dim")
    text.append("  ([[trained]])" if plain else "  (green: trained)", style="dim")
    return text


def mark_example(tokenizer: Any, token_ids: Tokens, trained: Tokens) -> list[tuple[str, bool]]:
    """Runs of equal training state, decoded with their special tokens."""
    pieces: list[tuple[str, bool]] = []
    start = 0
    for index in range(1, len(token_ids) + 1):
        if index == len(token_ids) or trained[index] != trained[start]:
            pieces.append((tokenizer.decode(list(token_ids[start:index])), bool(trained[start])))
            start = index
    return pieces


class Progress:
    """Live view of a loop of ``num_steps``; use as a context manager and call `update`."""

    def __init__(self, console: Console, stage: str, num_steps: int) -> None:
        self.console, self.stage, self.num_steps = console, stage, num_steps
        self._began = time.monotonic()
        self._first_step: int | None = None
        self._last_plain = 0.0
        self._status = "starting"
        self._step = 0
        self._metrics: dict[str, float] = {}
        self._live = Live(self._draw(), console=console, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(self._draw())
            self._live.__exit__(kind, error, trace)
        elif kind is None and self._metrics:
            self._print_plain()

    def status(self, text: str) -> None:
        """Say what is being waited for before the first step."""
        self._status = text
        if self._live is not None:
            self._live.update(self._draw())
        else:
            self.console.print(f"{self.stage} status={text!r}", markup=False, highlight=False)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Step ``step`` (counted from 1) is done."""
        if self._first_step is None:
            self._first_step, self._began = step, time.monotonic()
        self._step = step
        self._metrics.update(metrics)
        self._status = ""
        if self._live is not None:
            self._live.update(self._draw())
        elif time.monotonic() - self._last_plain >= PLAIN_INTERVAL:
            self._print_plain()

    def _print_plain(self) -> None:
        self._last_plain = time.monotonic()
        metrics = " ".join(f"{name}={format_number(value)}" for name, value in self._metrics.items())
        line = f"{self.stage} step={self._step}/{self.num_steps} {metrics}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _draw(self) -> Group:
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=self.num_steps, completed=self._step, width=30)
        elapsed = time.monotonic() - self._began
        done = self._step - (self._first_step or 0)
        eta = f"eta {elapsed / done * (self.num_steps - self._step):.0f} s" if done > 0 else ""
        head.add_row(
            Text(self.stage, style="bold"), f"step {self._step}/{self.num_steps}", bar,
            f"{elapsed:.0f} s", eta, Text(self._status, style="dim"),
        )  # fmt: skip
        cells = [f"{name.split('/', 1)[-1]} {format_number(value)}" for name, value in self._metrics.items()]
        return Group(head, Text("   ".join(cells), style="dim"))


def format_number(value: float) -> str:
    """Short and stable: 4 significant digits, thousands grouped."""
    if isinstance(value, int) or (abs(value) >= 10_000):
        return f"{value:,.0f}".replace(",", "_")
    return f"{value:.4g}"


def print_done(console: Console, run: Run, metrics: Mapping[str, float]) -> None:
    """The line at the end of a stage."""
    figures = "  ".join(f"{name} {format_number(value)}" for name, value in metrics.items())
    model = run.record.get("model")
    made = f"  model {model['id'][:12]} in {shown_path(model['path'])}" if model else ""
    line = f"[green]✓[/green] [bold]{run.stage}[/bold] {run.seconds:.0f} s  {escape(figures)}[dim]{escape(made)}[/dim]"
    console.print(line, highlight=False, soft_wrap=True)
