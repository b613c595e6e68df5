"""Where a model came from: its tree down to the raw text, with what is missing or changed."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from rayllm.config.base import Loaded
from rayllm.config.lineage import LineageConfig
from rayllm.report.lineage import picture, problems, trace, tree
from rayllm.report.terminal import shown_path


def run(loaded: Loaded[LineageConfig], console: Console, *, verbose: bool = False) -> None:
    """The `lineage` job: prints the tree, draws it when asked to."""
    config = loaded.config
    source = trace(config.model)
    console.print(tree(source), soft_wrap=True)
    lines = problems(source)
    for line in lines:
        console.print(f"[red]![/red] {escape(line)}", highlight=False, soft_wrap=True)
    if not lines:
        console.print("[green]✓[/green] every parent is there and unchanged", highlight=False)
    if config.picture is not None:
        config.picture.parent.mkdir(parents=True, exist_ok=True)
        config.picture.write_text(picture(source), encoding="utf-8")
        console.print(f"  picture  {escape(shown_path(config.picture))}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("lineage")
