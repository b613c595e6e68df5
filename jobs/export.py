"""A model folder to hand over: its files, checked, its lineage without this machine's paths, and a model card."""

from __future__ import annotations

import shutil

from rich.console import Console
from rich.markup import escape

from rayllm.config.base import Loaded
from rayllm.config.export import ExportConfig
from rayllm.errors import InputError
from rayllm.lineage import MANIFEST, check_files, write_json
from rayllm.report.card import model_card, shorten_paths
from rayllm.report.lineage import trace
from rayllm.report.run import read_run
from rayllm.report.terminal import shown_path


def run(loaded: Loaded[ExportConfig], console: Console, *, verbose: bool = False) -> None:
    """The `export` job.

    Raises:
        InputError: the model has no lineage, a file of it is missing or changed, or ``out`` is in use.
    """
    model, out = loaded.config.model, loaded.config.out
    manifest = check_files(model, key="model")
    if manifest is None:
        raise InputError(f"model: {model} has no {MANIFEST}: there is nothing to make a model card from")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"out: {out} is not an empty folder; name another")
    record = read_run(model.parent)
    made_it = record is not None and (record.get("model") or {}).get("id") == manifest["id"]
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in manifest["files"]:
        shutil.copy2(model / name, partial / name)
    short = shorten_paths(manifest)
    write_json(partial / MANIFEST, short)
    card = model_card(out.name, short, trace(model), record["command"] if record is not None and made_it else None)
    (partial / "README.md").write_text(card, encoding="utf-8")
    if out.exists():
        out.rmdir()
    partial.rename(out)
    console.print(
        f"[green]✓[/green] {escape(shown_path(out))}: {len(manifest['files'])} files, {MANIFEST} and a model card",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    console.print(f"  upload   hf upload ORG/{escape(out.name)} {escape(shown_path(out))}", highlight=False)


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("export")
