"""Whether a model's files are those that were written."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from rayllm.config.base import Loaded
from rayllm.config.verify import VerifyConfig
from rayllm.errors import InputError
from rayllm.lineage import MANIFEST, check_files
from rayllm.report.terminal import shown_path


def run(loaded: Loaded[VerifyConfig], console: Console, *, verbose: bool = False) -> None:
    """The `verify` job.

    Raises:
        InputError: the model has no lineage, or a file is missing or changed, by name.
    """
    model = loaded.config.model
    manifest = check_files(model, key="model")
    if manifest is None:
        raise InputError(f"model: {model} has no {MANIFEST}: nothing says what its files should be")
    files = manifest["files"]
    console.print(
        f"[green]✓[/green] {escape(shown_path(model))}: {len(files)} files are as {manifest['stage']} wrote them",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    others = sorted(f.name for f in model.iterdir() if f.name != MANIFEST and f.name not in files)
    if others:
        console.print(f"  not in {MANIFEST}: {escape(', '.join(others))}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("verify")
