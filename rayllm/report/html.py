"""The report of a pipeline run: one self-contained HTML page and the same content as JSON.

Both are views of the files that the stages wrote (``run.json``, ``events.jsonl``, ``evaluation.json``);
nothing is measured here. All text goes through autoescaping, and the page's content security policy allows
no script but the page's own, so that text from a model is never markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rayllm.report import curves, figures, views
from rayllm.report.findings import Evaluation, Finding, headline, overoptimised, verdict
from rayllm.report.glossary import DASH, count, date, duration, number, percent
from rayllm.report.reward import REPORT
from rayllm.report.reward_view import reward_view
from rayllm.report.samples import clean, samples
from rayllm.report.views import Stage

__all__ = ["headline", "verdict", "write_report"]

STAGES = ("world", "tokenizer", "pretrain", "sft", "label", "reward_model", "ppo", "evaluate")
TEMPLATES = Path(__file__).with_name("templates")


def write_report(run_dir: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.json`` into ``run_dir`` and return their paths.

    ``run_dir`` is that of a pipeline, or of one job.

    Raises:
        ValueError: if ``run_dir`` holds no stage, or a record there is not valid JSON.
    """
    run_dir = Path(run_dir).resolve()
    stages = load_stages(run_dir)
    if not stages:
        raise ValueError(
            f"{run_dir} holds no run: expected <stage>/run.json with a stage such as {STAGES[2]}"
        )
    evaluation = _read_json(run_dir / "evaluate" / "evaluation.json")
    reward = _read_json(run_dir / "reward_model" / REPORT) or _read_json(run_dir / REPORT)
    page, record = run_dir / "report.html", run_dir / "report.json"
    content = _content(run_dir.name, stages, evaluation, reward)
    told = _record(content, stages, evaluation, reward)
    _write(record, json.dumps(_strict(told), indent=1, ensure_ascii=False))
    _write(page, render(content))
    return page, record


def load_stages(run_dir: Path) -> list[Stage]:
    """The stages of the run in pipeline order; one that the list does not know comes before ``evaluate``."""
    alone = _read_json(run_dir / "run.json")
    if alone:
        return [Stage(str(alone.get("stage")), alone, _read_events(run_dir / "events.jsonl"))]
    names = [path.parent.name for path in sorted(run_dir.glob("*/run.json"))]
    names = [name for name in names if "." not in name]  # sft.old-20261112 was replaced by another run
    order = {name: position for position, name in enumerate(STAGES)}
    names.sort(key=lambda name: order.get(name, order["evaluate"] - 0.5))
    return [
        Stage(name, _read_json(run_dir / name / "run.json"), _read_events(run_dir / name / "events.jsonl"))
        for name in names
    ]


def render(content: dict[str, Any]) -> str:
    """The page for ``_content``; every expression of the template is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = lambda text: text.replace(" %", "\u00a0%")
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    return environment.get_template("report.html").render(
        **content, script=Markup(script), script_hash=digest, style=Markup(style), dash=DASH
    )


def _content(
    name: str, stages: list[Stage], evaluation: dict[str, Any], reward: dict[str, Any]
) -> dict[str, Any]:
    """Everything on the page, in its order."""
    data = Evaluation(evaluation)
    events = {stage.name: stage.events for stage in stages}
    tables = [views.stages_table(data, split) for split in data.splits] if data.models else []
    seconds = [number(stage.record.get("seconds")) or 0.0 for stage in stages]
    finding, sentences = _findings(stages, evaluation, reward)
    return {
        "name": name,
        "facts": _facts(stages, sum(seconds)),
        "strip": _strip(stages),
        "verdict": finding,
        "sentences": sentences,
        "tables": [table for table in tables if table["groups"]],
        "sampling": _pairs(evaluation.get("sampling")),
        "reward_model": _reward_model(evaluation),
        "reward": reward_view(reward),
        "figures": curves.build(figures.FIGURES, events),
        "more_figures": curves.build(figures.MORE_FIGURES, events),
        "samples": samples(data),
        "timings": views.timings(stages),
        "total": {"seconds": sum(seconds), "text": duration(sum(seconds))},
        "placements": views.placements(stages),
        "data": views.data_rows(stages),
        "lineage": views.lineage(stages),
        "configuration": views.configuration(stages),
        "notes": [
            (stage.name, clean(event["text"]))
            for stage in stages
            for event in stage.events
            if event.get("kind") == "note" and event.get("text")
        ][:40],
        "environment": _environment(stages),
    }


def _findings(
    stages: list[Stage], evaluation: dict[str, Any], reward: dict[str, Any]
) -> tuple[Finding, list[str]]:
    """The verdict and its sentences; a stage that failed comes before anything that was measured."""
    failed = [stage for stage in stages if stage.status == "failed"]
    if failed:
        error = str(failed[0].record.get("error") or "no error text").strip()
        finding = Finding("bad", f"The stage {failed[0].name} failed: {clean(error.splitlines()[-1], 300)}")
    elif reward and len(stages) == 1:
        finding = Finding(reward["verdict"]["tone"], f"Reward model: {reward['verdict']['text']}")
    elif not evaluation.get("metrics"):
        unfinished = [f"{stage.name} is {stage.status}" for stage in stages if stage.status != "done"]
        told = f" ({', '.join(unfinished)})" if unfinished else ""
        finding = Finding("none", f"Not evaluated yet: {len(stages)} of {len(STAGES)} stages are here{told}.")
    else:
        finding = verdict(evaluation)
    sentences = headline(evaluation)[1:] if evaluation.get("metrics") else []
    ppo = next((stage.events for stage in stages if stage.name == "ppo"), [])
    warning = overoptimised(curves.series(ppo, "eval/gold")[0], curves.series(ppo, "objective/rewards")[0])
    return finding, [*sentences, *([warning] if warning else [])]


def _facts(stages: list[Stage], seconds: float) -> list[tuple[str, str]]:
    started = min(
        (str(stage.record["started"]) for stage in stages if stage.record.get("started")), default=""
    )
    seeds = {
        str(seed): None for stage in stages if (seed := _seed(stage.record.get("config") or {})) is not None
    }
    hardware: Any = next(
        (stage.record["hardware"] for stage in reversed(stages) if stage.record.get("hardware")), {}
    )
    told = [f"{key.replace('_', ' ')} {value}" for key, value in _pairs(hardware)[:5]]
    return [
        ("started", date(started)),
        ("seed", ", ".join(seeds) or DASH),
        ("total time", duration(seconds)),
        ("hardware", " · ".join(told) or DASH),
    ]


def _seed(config: dict[str, Any]) -> Any:
    """The first ``seed`` in a nested configuration, outermost first."""
    if config.get("seed") is not None:
        return config["seed"]
    nested = (_seed(value) for value in config.values() if isinstance(value, dict))
    return next((seed for seed in nested if seed is not None), None)


def _strip(stages: list[Stage]) -> list[dict[str, str]]:
    """Every stage of the pipeline with its state, those that have not run included."""
    marks = {"done": "✓", "running": "…", "failed": "✕", "stopped": "■"}
    by_name = {stage.name: stage for stage in stages}
    names = list(dict.fromkeys([*STAGES[:-1], *by_name]))
    names = [name for name in names if name != "evaluate"] + ["evaluate"]
    return [
        {
            "name": name.replace("_", " "),
            "status": by_name[name].status if name in by_name else "not run",
            "mark": marks.get(by_name[name].status, "?") if name in by_name else "○",
            "time": duration(by_name[name].record.get("seconds")) if name in by_name else "not run",
        }
        for name in names
    ]


def _reward_model(evaluation: dict[str, Any]) -> list[tuple[str, str, str]]:
    entries = (evaluation.get("reward_model") or {}).items()
    return [
        (split, percent(number((entry or {}).get("pair_accuracy"))), count((entry or {}).get("num_pairs")))
        for split, entry in entries
    ]


def _environment(stages: Sequence[Stage]) -> dict[str, list[tuple[str, str]]]:
    """Versions, code and hardware; where stages differ each value is shown with a stage that had it."""
    result: dict[str, list[tuple[str, str]]] = {}
    for part in ("versions", "code", "hardware"):
        seen: dict[str, dict[str, str]] = {}
        for stage in stages:
            for key, value in _pairs(stage.record.get(part)):
                seen.setdefault(key, {})[value] = stage.name
        result[part] = [
            (
                key,
                next(iter(values))
                if len(values) == 1
                else ", ".join(f"{value} ({name})" for value, name in values.items()),
            )
            for key, values in seen.items()
        ]
    return result


def _pairs(values: Any) -> list[tuple[str, str]]:
    """The non-empty entries of a mapping as text."""
    if not isinstance(values, dict):
        return []
    shown = {
        key: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for key, value in values.items()
        if value is not None and value != []
    }
    return [(str(key), text) for key, text in shown.items()]


def _record(
    content: dict[str, Any], stages: list[Stage], evaluation: dict[str, Any], reward: dict[str, Any]
) -> dict[str, Any]:
    """The machine-readable report; unlike the page it holds full ids and unrounded numbers."""
    kept = (
        "stage",
        "status",
        "started",
        "seconds",
        "error",
        "command",
        "model",
        "parents",
        "data",
        "metrics",
    )
    timings = [
        {key: row[key] for key in ("stage", "seconds", "tokens", "tokens_per_second")}
        for row in content["timings"]
    ]
    return {
        "format": 1,
        "name": content["name"],
        "facts": dict(content["facts"]),
        "verdict": {"tone": content["verdict"].tone, "text": content["verdict"].text},
        "headline": content["sentences"],
        "stages": [{key: stage.record.get(key) for key in kept} | {"stage": stage.name} for stage in stages],
        "stages_table": content["tables"],
        "evaluation": {key: value for key, value in evaluation.items() if key != "samples"},
        "reward_model": {key: value for key, value in reward.items() if key != "disagreements"},
        "timings": {"total_seconds": content["total"]["seconds"], "stages": timings},
        "lineage": content["lineage"],
    }


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file, or an empty one where there is no file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def _read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a stage; a line cut off by a kill, or still being written, becomes a note."""
    if not path.exists():
        return []
    events = []
    for position, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            event = json.loads(line) if line.strip() else None
        except ValueError:
            event = {
                "kind": "note",
                "text": f"line {position} of {path.name} could not be read and is left out",
            }
        if isinstance(event, dict):
            events.append(event)
    return events


def _strict(value: Any) -> Any:
    """The value with NaN and infinities as null, which is all that strict JSON has for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    return value


def _write(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new one, never half of it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
