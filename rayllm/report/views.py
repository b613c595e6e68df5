"""The parts of the report as plain data, from the records of a run; no HTML here.

Every function takes what was written by the stages and bears missing fields: a partial run has a report too.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from rayllm.report.curves import series
from rayllm.report.findings import Evaluation, rate_margin
from rayllm.report.glossary import (
    DASH,
    EVALUATION,
    ROWS,
    UNIT_NAMES,
    count,
    duration,
    grouped,
    model_name,
    number,
    short_id,
    short_number,
    written,
)


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage's ``run.json`` and its logged events."""

    name: str
    record: dict[str, Any]
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def status(self) -> str:
        return str(self.record.get("status") or "unknown")

    @property
    def metrics(self) -> dict[str, Any]:
        return self.record.get("metrics") or {}

    @property
    def model(self) -> dict[str, Any]:
        return self.record.get("model") or {}

    def tokens(self) -> float | None:
        """Tokens processed as the stage reports them, else the tokens of its data."""
        for name in ("tokens", "train/tokens", "perf/tokens"):
            if number(self.metrics.get(name)) is not None:
                return number(self.metrics[name])
        known = [
            n for n in (number(data.get("tokens")) for data in self.record.get("data") or []) if n is not None
        ]
        return sum(known) if known else None

    def tokens_per_second(self) -> float | None:
        """Median of the logged throughput, else the stage's own figure."""
        points, _ = series(self.events, "perf/tokens_per_second")
        if points:
            return statistics.median(value for _, value in points)
        return number(self.metrics.get("perf/tokens_per_second", self.metrics.get("tokens_per_second")))


def stages_table(data: Evaluation, split: str) -> dict[str, Any]:
    """Rows grouped by what they measure, one cell a model, and the change from parent to last model."""
    final = data.final
    parent = data.parent(final) if final else None
    groups = []
    for group, names in ROWS:
        rows = [row for name in names if (row := _row(data, split, name))]
        if group == "preference":
            rows += [row] if (row := _outcomes(data, split)) else []
        if rows:
            groups.append({"name": group, "rows": rows})
    prompts = data.prompts(split)
    return {
        "split": split,
        "description": (data.raw.get("splits") or {}).get(split),
        "prompts": prompts,
        "models": [{"name": name, "label": model_name(name)} for name in data.models],
        "final": final,
        "change": f"{model_name(parent)} → {model_name(final)}" if parent and final else None,
        "margin": grouped(100 * rate_margin(0.5, 0.5, prompts)) if prompts else None,
        "groups": groups,
    }


def _row(data: Evaluation, split: str, name: str) -> dict[str, Any] | None:
    about = EVALUATION[name]
    values = [data.value(model, split, name) for model in data.models]
    if all(value is None for value in values):
        return None
    cells = [
        {
            "value": value,
            "text": written(value, about.unit),
            "share": value if about.unit == "rate" else None,
            "outcomes": None,
        }
        for value in values
    ]
    change = data.change(split, name) if name not in ("win_rate", "kl") else None
    return {
        "metric": name,
        "label": about.label,
        "meaning": about.meaning,
        "unit": UNIT_NAMES[about.unit],
        "cells": cells,
        "change": _change(data, split, name, *change) if change else None,
    }


def _change(data: Evaluation, split: str, name: str, old: float, new: float) -> dict[str, Any]:
    unit, delta = EVALUATION[name].unit, new - old
    shown = delta * 100 if unit == "rate" else delta
    text = grouped(shown, {"bits": 3, "tokens": 1, "rate": 1}.get(unit, 2))
    flat = not any(digit in text for digit in "123456789")
    return {
        "value": delta,
        "text": text if flat or delta < 0 else f"+{text}",
        "arrow": "" if flat else "↑↓"[delta < 0],
        "judged": "" if flat else data.judged(split, name, old, new),
    }


def _outcomes(data: Evaluation, split: str) -> dict[str, Any] | None:
    """Win, tie and loss against the parent as one row."""
    cells, found = [], False
    for model in data.models:
        shares = [data.value(model, split, name) for name in ("win", "tie", "lose")]
        known = [share for share in shares if share is not None]
        found = found or bool(known)
        text = (
            " / ".join(DASH if share is None else grouped(100 * share) for share in shares) if known else DASH
        )
        cells.append(
            {
                "value": dict(zip(("win", "tie", "lose"), shares, strict=True)),
                "text": text,
                "share": None,
                "outcomes": [share or 0.0 for share in shares] if known else None,
            }
        )
    meaning = (
        "Percent of prompts where the answer is better than, as good as, or worse than the parent model's."
    )
    return (
        {
            "metric": "win_tie_lose",
            "label": "win / tie / lose",
            "meaning": meaning,
            "unit": "",
            "cells": cells,
            "change": None,
        }
        if found
        else None
    )


def timings(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Seconds, tokens and throughput of each stage; ``share`` is of the slowest stage, for a bar."""
    slowest = max([number(stage.record.get("seconds")) or 0.0 for stage in stages], default=0.0)
    rows = []
    for stage in stages:
        seconds, tokens, rate = number(stage.record.get("seconds")), stage.tokens(), stage.tokens_per_second()
        rows.append(
            {
                "stage": stage.name,
                "status": stage.status,
                "seconds": seconds,
                "tokens": tokens,
                "tokens_per_second": rate,
                "share": (seconds or 0.0) / slowest if slowest else 0.0,
                "text": {"seconds": duration(seconds), "tokens": count(tokens), "rate": count(rate)},
            }
        )
    return rows


def placements(stages: Sequence[Stage]) -> list[dict[str, str]]:
    """Where each stage's actors ran: those of one role on one node in a row."""
    return [
        {
            "stage": stage.name,
            "role": str(row.get("role") or DASH),
            "ranks": ", ".join(map(str, row.get("ranks") or [])),
            "node": str(row.get("node") or DASH),
            "type": str(row.get("node_type") or DASH),
            "gpus": " ".join(gpu for gpu in row.get("gpus") or [] if gpu) or DASH,
        }
        for stage in stages
        for row in stage.record.get("placement") or []
    ]


def data_rows(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """What each stage read: rows and tokens kept, and rows dropped by reason, the largest reason first."""
    rows = []
    for stage in stages:
        for data in stage.record.get("data") or []:
            dropped = {str(k): int(n) for k, v in (data.get("dropped") or {}).items() if (n := number(v))}
            if data.get("bad_rows"):
                dropped["bad rows"] = int(data["bad_rows"])
            reasons = sorted(dropped.items(), key=lambda item: -item[1])
            rows.append(
                {
                    "stage": stage.name,
                    "name": data.get("name") or DASH,
                    "path": data.get("path") or "",
                    "rows": count(data.get("rows")),
                    "tokens": count(data.get("tokens")),
                    "dropped": [(reason, count(value)) for reason, value in reasons],
                    "dropped_total": count(sum(dropped.values())) if dropped else "0",
                    "id": short_id(data.get("sha256")),
                }
            )
    return rows


def lineage(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Trees of stages: each hangs under its first parent made by this run; its other sources are named."""
    by_id = {stage.model["id"]: stage.name for stage in stages if stage.model.get("id")}
    names = [stage.name for stage in stages]
    nodes: dict[str, dict[str, Any]] = {}
    roots: list[dict[str, Any]] = []
    for stage in stages:
        parents = [p for p in stage.record.get("parents") or [] if isinstance(p, dict)]
        if stage.name == "evaluate" or not (stage.model or parents):
            continue
        sources = [_source(parent, by_id, names, stage.name) for parent in parents]
        main = next((index for index, source in enumerate(sources) if source in nodes), None)
        others = [
            {
                "role": parent.get("role") or "parent",
                "id": short_id(parent.get("id")),
                "from": source or parent.get("path") or "",
            }
            for index, (parent, source) in enumerate(zip(parents, sources, strict=True))
            if index != main
        ]
        read = [_source(data, {}, names, stage.name) for data in stage.record.get("data") or []]
        others += [{"role": "data", "id": "", "from": source} for source in dict.fromkeys(read) if source]
        nodes[stage.name] = {
            "stage": stage.name,
            "id": short_id(stage.model.get("id")),
            "path": stage.model.get("path") or "",
            "parameters": count(stage.model.get("parameters")),
            "others": others,
            "children": [],
        }
        (roots if main is None else nodes[str(sources[main])]["children"]).append(nodes[stage.name])
    return roots


def _source(origin: dict[str, Any], by_id: dict[str, str], names: list[str], child: str) -> str | None:
    """The stage of this run that made ``origin``: by id, else by the last stage folder in its path."""
    if origin.get("id") in by_id:
        return by_id[origin["id"]]
    folders = PurePath(str(origin.get("path") or "")).parts
    return next((name for name in reversed(folders) if name in names and name != child), None)


def configuration(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Per stage: its command, the settings that differ from the defaults and its final metrics."""
    rows = []
    for stage in stages:
        changed = [
            {
                "key": key,
                "value": _setting(entry.get("value")),
                "default": _setting(entry.get("default")),
                "origin": entry.get("origin") or "",
            }
            for key, entry in (stage.record.get("changed") or {}).items()
            if isinstance(entry, dict)
        ]
        metrics = [
            (key, short_number(value))
            for key, raw in stage.metrics.items()
            if (value := number(raw)) is not None
        ]
        rows.append(
            {
                "stage": stage.name,
                "command": stage.record.get("command") or "",
                "changed": changed,
                "metrics": metrics,
            }
        )
    return rows


def _setting(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
