"""Prompts with the answer of every model, chosen so that the bad ones are seen too."""

from __future__ import annotations

from typing import Any

from rayllm.report.findings import Evaluation
from rayllm.report.glossary import model_name, number, written

MAX_SAMPLES, MAX_TEXT = 24, 700
SPECIAL_SAMPLES = 4  # of the worst answers, and again of the most changed ones


def samples(data: Evaluation) -> dict[str, Any]:
    """Prompts with every model's answer: the worst and the most changed ones, then some of each kind."""
    everything = [sample for sample in data.raw.get("samples") or [] if isinstance(sample, dict)]
    parent = data.parent(data.final) if data.final else None
    chosen = _choose(everything, data.final, parent)
    shown = [
        {
            "prompt": clean(sample.get("prompt")),
            "kind": str(sample.get("kind") or "prompt"),
            "split": sample.get("split"),
            "reason": reason,
            "answers": [_answer(model, (sample.get("responses") or {}).get(model)) for model in data.models],
        }
        for sample, reason in chosen
    ]
    return {"shown": shown, "total": len(everything)}


def _choose(
    everything: list[dict[str, Any]], final: str | None, parent: str | None
) -> list[tuple[dict, str]]:
    if len(everything) <= MAX_SAMPLES:
        return [(sample, "") for sample in everything]
    gold = {i: (_gold(s, final), _gold(s, parent)) for i, s in enumerate(everything)}
    scored = [i for i, (new, _) in gold.items() if new is not None]
    worst = sorted(scored, key=lambda i: gold[i][0] or 0.0)[:SPECIAL_SAMPLES]
    moved = [i for i in scored if gold[i][1] is not None and i not in worst]
    moved = sorted(moved, key=lambda i: -abs((gold[i][0] or 0.0) - (gold[i][1] or 0.0)))[:SPECIAL_SAMPLES]
    reasons = dict.fromkeys(worst, "among the worst") | dict.fromkeys(moved, "among the most changed")
    by_kind: dict[tuple, list[int]] = {}
    for i, sample in enumerate(everything):
        by_kind.setdefault((str(sample.get("split")), str(sample.get("kind"))), []).append(i)
    queues = [iter([i for i in members if i not in reasons]) for members in by_kind.values()]
    picked = list(reasons)
    while len(picked) < MAX_SAMPLES:
        turn = [i for i in (next(queue, None) for queue in queues) if i is not None]
        picked += turn[: MAX_SAMPLES - len(picked)]
        if not turn:
            break
    return [(everything[i], reasons.get(i, "")) for i in sorted(picked)]


def _gold(sample: dict[str, Any], model: str | None) -> float | None:
    return number(((sample.get("responses") or {}).get(model) or {}).get("gold"))


def _answer(model: str, response: dict[str, Any] | None) -> dict[str, Any]:
    if not isinstance(response, dict):
        return {"model": model_name(model), "missing": True}
    flags = []
    if response.get("stopped") is False:
        flags.append("did not stop")
    if not str(response.get("text") or "").strip():
        flags.append("empty")
    return {
        "model": model_name(model),
        "missing": False,
        "text": clean(response.get("text")),
        "gold": written(response.get("gold"), "score"),
        "reward": written(response.get("reward"), "score"),
        "gold_value": number(response.get("gold")),
        "reward_value": number(response.get("reward")),
        "flags": flags,
    }


def clean(text: Any, limit: int = MAX_TEXT) -> str:
    """Model text fit to show: control characters as pictures, lone surrogates replaced, long text cut."""
    text = str(text if text is not None else "").encode("utf-8", "replace").decode("utf-8")
    text = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text)
    return text if len(text) <= limit else f"{text[:limit].rstrip()} … ({len(text) - limit} more characters)"
