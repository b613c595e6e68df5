"""Where a model came from, as far as files tell: from the model down to the raw text, as a tree and as a picture.

A model names its parents and data in `lineage.json`; a data file that one of our jobs wrote lies beside that job's
`run.json`, which names its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from html import escape as html_escape
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.tree import Tree

from rayllm.errors import InputError
from rayllm.lineage import content_id, read_manifest
from rayllm.report.run import read_run
from rayllm.report.terminal import shown_path

BOX = (270, 46)
GAP = (16, 44)
"""Width and height of a box of the picture and of the space between two, in pixels."""

IN_HUB_CACHE = re.compile(r"/models--([^/]+)--([^/]+)/snapshots/")
"""Where `hf://ORG/NAME` lies on this machine."""


@dataclass(frozen=True, slots=True)
class Source:
    """A model or a data file, and what it was made from."""

    role: str
    """What it was to its child, such as `reward_model` or `data`; empty for the model that was asked about."""

    stage: str | None
    """The job that made it; None: made elsewhere."""

    path: Path
    id: str
    problem: str | None
    """Why it is not what its child was made from: missing, or changed."""

    sources: tuple[Source, ...] = ()

    @property
    def hub_name(self) -> str | None:
        """``ORG/NAME`` of a model from the Hugging Face hub."""
        found = IN_HUB_CACHE.search(f"{self.path}/")
        return None if found is None else "/".join(found.groups())

    @property
    def name(self) -> str:
        return self.stage or self.hub_name or "made elsewhere"


def trace(model: Path) -> Source:
    """The tree of a model folder. Every file and model that it names is looked at once.

    Raises:
        InputError: no such folder, or it has no lineage.
    """
    if read_manifest(model) is None:
        raise InputError(f"model: {model} has no lineage.json: it was not made by rayllm")
    return _Tracer().source("", model, content_id(model))


class _Tracer:
    def __init__(self) -> None:
        self._ids: dict[Path, str] = {}

    def source(self, role: str, path: Path, recorded: str) -> Source:
        if not path.exists():
            return Source(role, None, path, recorded, "missing")
        if path not in self._ids:
            self._ids[path] = content_id(path)
        found = self._ids[path]
        problem = None if found == recorded else f"changed: was {recorded[:8]}, is {found[:8]}"
        made = read_manifest(path) if path.is_dir() else read_run(path.parent)
        if made is None:
            return Source(role, None, path, recorded, problem)
        return Source(role, made["stage"], path, recorded, problem, tuple(self._parents(path, made)))

    def _parents(self, path: Path, made: Mapping[str, Any]) -> Iterator[Source]:
        then, now = Path(made["config"]["run_dir"]), path.parent
        for entry in made["parents"]:
            yield self.source(entry["role"], _moved(Path(entry["path"]), then, now), entry["id"])
        for entry in made["data"]:
            yield self.source(entry["name"], _moved(Path(entry["path"]), then, now), entry["sha256"])


def _moved(path: Path, then: Path, now: Path) -> Path:
    """Where an input lies if all runs were moved together: it is found from the run folder as before."""
    if path.exists():
        return path
    moved = Path(os.path.normpath(now / os.path.relpath(path, then)))
    return moved if moved.exists() else path


def problems(source: Source) -> list[str]:
    """One line for everything in the tree that is missing or changed."""
    found = [f"{source.path}: {source.problem}"] if source.problem else []
    return list(dict.fromkeys(found + [line for below in source.sources for line in problems(below)]))


def tree(source: Source, *, place: Callable[[Path], str] = shown_path) -> Tree:
    """For the terminal. What was shown once is not unfolded again; ``place`` writes the paths."""
    return _branch(source, place, set())


def short_place(path: Path) -> str:
    """The last two parts: enough to tell the files of a tree apart."""
    return "/".join(path.parts[-2:])


def _branch(source: Source, place: Callable[[Path], str], shown: set[tuple[Path, str]]) -> Tree:
    key = (source.path, source.id)
    role = f"[cyan]{escape(source.role)}[/cyan]: " if source.role else ""
    label = f"{role}[bold]{escape(source.name)}[/bold]  {escape(place(source.path))}  [dim]{source.id[:8]}[/dim]"
    if source.problem:
        label += f"  [red]{escape(source.problem)}[/red]"
    if key in shown and source.sources:
        return Tree(f"{label}  [dim](see above)[/dim]", highlight=False)
    shown.add(key)
    branch = Tree(label, highlight=False)
    for below in source.sources:
        branch.children.append(_branch(below, place, shown))
    return branch


def picture(source: Source) -> str:
    """The same as SVG: the model on top, its raw text at the bottom, everything once."""
    levels = _levels(source)
    rows: dict[int, list[Source]] = {}
    for node, level in levels.values():
        rows.setdefault(level, []).append(node)
    width = max(len(row) for row in rows.values()) * (BOX[0] + GAP[0]) + GAP[0]
    height = len(rows) * (BOX[1] + GAP[1]) + GAP[1]
    places = {}
    for level, row in rows.items():
        left = (width - len(row) * (BOX[0] + GAP[0]) + GAP[0]) / 2
        for column, node in enumerate(row):
            places[_key(node)] = (left + column * (BOX[0] + GAP[0]), GAP[1] / 2 + level * (BOX[1] + GAP[1]))
    lines = [_line(places[_key(node)], places[_key(below)]) for node, _ in levels.values() for below in node.sources]
    boxes = [_box(node, *places[_key(node)]) for node, _ in levels.values()]
    style = "text{font:12px sans-serif;text-anchor:middle}.i{fill:#666}.p{fill:#b00020}path{stroke:#888;fill:none}"
    body = "\n".join([*dict.fromkeys(lines), *boxes])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">\n'
        f"<style>{style}</style>\n{body}\n</svg>\n"
    )


def _key(source: Source) -> tuple[Path, str]:
    return source.path, source.id


def _levels(source: Source) -> dict[tuple[Path, str], tuple[Source, int]]:
    """Every node once, as many steps below the model as its longest way down."""
    found: dict[tuple[Path, str], tuple[Source, int]] = {}

    def visit(node: Source, level: int) -> None:
        if _key(node) not in found or found[_key(node)][1] < level:
            found[_key(node)] = (node, level)
            for below in node.sources:
                visit(below, level + 1)

    visit(source, 0)
    return found


def _line(child: tuple[float, float], parent: tuple[float, float]) -> str:
    x, y = child[0] + BOX[0] / 2, child[1] + BOX[1]
    return f'<path d="M{x:g} {y:g}L{parent[0] + BOX[0] / 2:g} {parent[1]:g}"/>'


def _box(node: Source, x: float, y: float) -> str:
    middle = x + BOX[0] / 2
    second = f'<text class="p" x="{middle:g}" y="{y + 36:g}">{html_escape(node.problem)}</text>' if node.problem else (
        f'<text class="i" x="{middle:g}" y="{y + 36:g}">{node.id[:8]}</text>'
    )
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{BOX[0]}" height="{BOX[1]}" rx="6" fill="#fff" stroke="#444"/>'
        f'<text x="{middle:g}" y="{y + 19:g}">{html_escape(f"{node.name}: {short_place(node.path)}")}</text>{second}'
    )
