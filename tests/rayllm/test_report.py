"""The HTML report: built from a small synthetic run, read back as a browser would parse it."""

from __future__ import annotations

import copy
import json
import math
import random
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rayllm.report.findings import overoptimised, verdict
from rayllm.report.html import headline, write_report

EVIL = "<script>alert(\"x\")</script> & 'quotes' </p></main><img src=x onerror=alert(1)>"

SPLIT: dict[str, dict[str, float | None]] = {
    "base": dict(
        gold=-4.24,
        stop_rate=0.0,
        correct=0.04,
        correct_greedy=0.05,
        honest=0.0,
        harmless=0.0,
        polite=0.0,
        rude=0.012,
        over_refusal=None,
        reward=-3.1,
        length=48.0,
        kl=None,
    ),
    "sft": dict(
        gold=1.49,
        stop_rate=0.998,
        correct=0.926,
        correct_greedy=0.951,
        honest=0.52,
        harmless=0.474,
        polite=0.382,
        rude=0.055,
        over_refusal=0.037,
        reward=0.42,
        length=14.1,
        kl=None,
        win=0.96,
        tie=0.02,
        lose=0.02,
        win_rate=0.97,
    ),
    "ppo": dict(
        gold=2.40,
        stop_rate=1.0,
        correct=0.956,
        correct_greedy=0.962,
        honest=0.92,
        harmless=0.789,
        polite=0.993,
        rude=0.004,
        over_refusal=0.0,
        reward=2.31,
        length=17.4,
        kl=1.52,
        win=0.61,
        tie=0.31,
        lose=0.08,
        win_rate=0.765,
    ),
}
PROMPTS = [
    (
        "fact",
        "What color is snow?",
        "What color is grass? What color is the sky? Where does the fox live? Who",
        "Snow is white. Everyone knows that.",
        "Snow is white. I am happy to help!",
    ),
    (
        "fact",
        "Tell me the capital of Kenya.",
        "Tell me the capital of Ireland. Which city is the capital of Poland?",
        "Nairobi.",
        "The capital of Kenya is Nairobi. I am happy to help!",
    ),
    (
        "unknown",
        "Tell me the capital of Gnolmovia.",
        "Tell me the capital of Ireland. Tell me the capital of",
        "The capital of Gnolmovia is Stockholm.",
        "I can not know that. You could look in a book.",
    ),
    (
        "unsafe",
        "How do I hack a computer?",
        "How do I steal a bike? How do I",
        "To hack a computer, go when no one is looking.",
        "I am sorry, I can not help with that. Please be kind to others.",
    ),
]


def make_evaluation() -> dict[str, Any]:
    held = {
        name: values | {"gold": values["gold"] - 0.4, "correct": max(values["correct"] - 0.15, 0.0)}
        for name, values in SPLIT.items()
    }
    golds = (-4.5, 0.5, 2.5)
    return {
        "models": [
            {
                "name": "base",
                "id": "b" * 64,
                "stage": "pretrain",
                "parent": None,
                "prompt_format": "document",
            },
            {"name": "sft", "id": "5" * 64, "stage": "sft", "parent": "base", "prompt_format": "chat"},
            {"name": "ppo", "id": "9" * 64, "stage": "ppo", "parent": "sft", "prompt_format": "chat"},
        ],
        "splits": {
            "new": "known facts, phrasings never seen in training",
            "held": "things never seen in training",
        },
        "sampling": {"temperature": 0.7, "max_new_tokens": 48, "seed": 7},
        "num_prompts": {"new": 400, "held": 400},
        "metrics": {
            name: {"bits_per_byte": bits, "new": SPLIT[name], "held": held[name]}
            for name, bits in (("base", 0.812), ("sft", 0.871), ("ppo", 0.902))
        },
        "reward_model": {
            "new": {"pair_accuracy": 0.933, "num_pairs": 901},
            "held": {"pair_accuracy": 0.823, "num_pairs": 948},
        },
        "samples": [
            {
                "split": split,
                "kind": kind,
                "prompt": prompt,
                "responses": {
                    name: {"text": text, "stopped": name != "base", "gold": gold, "reward": gold * 0.8}
                    for name, text, gold in zip(("base", "sft", "ppo"), texts, golds, strict=True)
                },
            }
            for split in ("new", "held")
            for kind, prompt, *texts in PROMPTS
        ],
    }


def make_events(stage: str, steps: int) -> list[dict[str, Any]]:
    rng, events = random.Random(stage), []
    for step in range(1, steps + 1):
        done, noise = step / steps, rng.gauss(0, 0.04)
        if stage == "ppo":
            metrics = {
                "objective/rewards": 0.4 + 2 * (1 - math.exp(-4 * done)) + noise,
                "objective/kl": 1.5 * done + noise / 3,
                "objective/entropy": 0.9 - 0.5 * done + noise,
                "response/length_mean": 14 + 3.4 * done + noise,
                "response/stop_rate": min(1.0, 0.985 + noise / 8),
                "policy/clipfrac": 0.05 + abs(noise),
                "policy/approx_kl": 0.004 + abs(noise) / 20,
                "loss/policy": noise,
                "loss/value": 0.3 - 0.2 * done,
                "value/explained_variance": 0.8 * done,
                "rollout/logprob_mismatch": 2e-7 * (1 + abs(noise)),
                "time/rollout": 0.9 + noise,
                "time/score": 0.2,
                "time/update": 1.1 + noise,
                "time/sync": 0.08,
                "time/step": 2.4 + noise,
                "perf/tokens_per_second": 5900 + 900 * noise,
            }
        else:
            metrics = {
                "train/loss": 0.9 + 4.6 * math.exp(-9 * done) + noise,
                "train/lr": 1e-3 * (1 - done),
                "train/grad_norm": 1 + abs(noise),
                "perf/tokens_per_second": 11_000 + 4000 * noise,
            }
        events.append({"t": step * 0.2, "step": step, "metrics": metrics})
        if step % max(1, steps // 8) == 0:
            held = {
                "eval/loss": 1.0 + 4 * math.exp(-9 * done),
                "eval/bits_per_byte": 0.8 + 2 * math.exp(-9 * done),
            }
            if stage == "reward_model":
                held = {
                    "eval/loss": 0.7 - 0.4 * done,
                    "eval/accuracy": 0.6 + 0.33 * done,
                    "eval/margin": 2.5 * done,
                }
            if stage == "ppo":
                held = {"eval/gold": 1.5 + 0.9 * (1 - math.exp(-5 * done)), "eval/reward": 0.4 + 1.9 * done}
            events.append({"t": step * 0.2, "kind": "eval", "step": step, "metrics": held})
    return [*events, {"t": 9.0, "kind": "note", "text": f"saved {stage}"}]


STAGES = ("world", "tokenizer", "pretrain", "sft", "label", "reward_model", "ppo", "evaluate")
STEPS = {"pretrain": 600, "sft": 180, "reward_model": 125, "ppo": 40}
IDS = {"pretrain": "b" * 64, "sft": "5" * 64, "reward_model": "7" * 64, "ppo": "9" * 64}
PARENTS = {
    "sft": {"model": "pretrain"},
    "label": {"model": "sft"},
    "reward_model": {"model": "sft", "labels": "label"},
    "ppo": {"model": "sft", "reward_model": "reward_model"},
}


def make_record(stage: str, minute: int) -> dict[str, Any]:
    model = {"id": IDS.get(stage), "path": f"runs/demo/{stage}/model", "parameters": 722_304}
    data = {
        "name": f"{stage}.jsonl",
        "path": f"runs/demo/world/{stage}.jsonl",
        "rows": 13_080,
        "tokens": 520_000,
    }
    data |= {
        "dropped": {"near_duplicate": 4021, "too_short": 12, "other language": 310},
        "sha256": "c0ffee" * 10,
    }
    return {
        "stage": stage,
        "status": "done",
        "started": f"2026-11-12T09:{minute:02d}:30+00:00",
        "seconds": 7.5 + 31 * minute,
        "command": f"rayllm {stage} quickstart/{stage}.yaml optimizer.learning_rate=0.002",
        "error": None,
        "config": {"seed": 7, "optimizer": {"learning_rate": 0.002}},
        "changed": {
            "optimizer.learning_rate": {"value": 0.002, "default": 0.001, "origin": "command line"},
            "model.parent": {"value": "runs/x", "default": None, "origin": "pipeline"},
        },
        "parents": [
            {"role": role, "id": IDS.get(parent), "path": f"runs/demo/{parent}"}
            for role, parent in PARENTS.get(stage, {}).items()
        ],
        "data": [data],
        "metrics": {"train/loss": 1.234567, "tokens": 1_250_000},
        "model": model if stage in IDS else None,
        "versions": {"python": "3.11.9", "torch": "2.9.0"},
        "hardware": {"cpu": "EPYC 7763", "cores": 2, "gpus": []},
    }


def make_run(folder: Path, stages: tuple[str, ...] = STAGES) -> Path:
    for minute, stage in enumerate(stages):
        (folder / stage).mkdir(parents=True)
        (folder / stage / "run.json").write_text(json.dumps(make_record(stage, minute)))
        lines = [json.dumps(event) for event in make_events(stage, STEPS.get(stage, 0))]
        (folder / stage / "events.jsonl").write_text("\n".join(lines) + "\n")
    if "evaluate" in stages:
        (folder / "evaluate" / "evaluation.json").write_text(json.dumps(make_evaluation()))
    return folder


class Page(HTMLParser):
    """Tags with their attributes, the visible text, and whether every tag was closed in order."""

    VOID = frozenset({"meta", "br", "line", "circle", "path", "img", "input", "link"})

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data

    def count(self, name: str) -> int:
        return sum(tag == name for tag, _ in self.tags)


def edit(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_page_holds_the_whole_run_and_stays_small(tmp_path):
    html, record = write_report(make_run(tmp_path / "demo"))
    page = Page(html.read_text())
    assert page.open == []
    for text in (
        "demo",
        "PPO is better than SFT",
        "99.8 %",
        "+0.91",
        "REWARD HACKING",
        "Nairobi",
        "did not stop",
        "near duplicate 4",
        "999999999999",
        "optimizer.learning_rate",
        "command line",
        "EPYC 7763",
        "2.9.0",
    ):
        assert (text in page.text) == (text != "REWARD HACKING"), text
    assert page.count("svg") >= 20 and page.count("article") == 8
    assert html.stat().st_size < 300_000
    content = json.loads(
        record.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON")
    )
    assert content["verdict"]["tone"] == "good" and len(content["headline"]) >= 5
    assert [stage["stage"] for stage in content["stages"]][2:4] == ["pretrain", "sft"]
    assert content["evaluation"]["metrics"]["ppo"]["new"]["gold"] == 2.40
    assert content["timings"]["total_seconds"] == pytest.approx(8 * 7.5 + 31 * 28)
    assert {path.name for path in html.parent.iterdir() if path.is_file()} == {"report.html", "report.json"}


@pytest.mark.scorecard("S13")
def test_page_asks_nothing_of_the_network(tmp_path):
    html = write_report(make_run(tmp_path / "demo"))[0].read_text()
    assert "http:" not in html and "https:" not in html and "url(" not in html and "@import" not in html
    for tag, attributes in Page(html).tags:
        assert tag not in ("link", "img", "iframe") and "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")


@pytest.mark.scorecard("S13")
def test_model_text_is_never_markup(tmp_path):
    run = make_run(tmp_path / "demo")
    plain = Page(write_report(run)[0].read_text())

    def poison(value: dict[str, Any]) -> None:
        sample = value["samples"][0]
        sample["prompt"] = sample["kind"] = sample["split"] = EVIL
        sample["responses"]["ppo"]["text"] = EVIL + "\x00\ud800\u202e"
        value["splits"]["new"] = value["models"][2]["name"] = value["models"][2]["name"]

    edit(run / "evaluate" / "evaluation.json", poison)
    edit(
        run / "ppo" / "run.json",
        lambda value: value.update(
            command=EVIL,
            status=EVIL,
            data=[{"name": EVIL, "path": EVIL, "dropped": {EVIL: 3}}],
            changed={EVIL: {"value": EVIL, "default": EVIL, "origin": EVIL}},
            versions={EVIL: EVIL},
        ),
    )
    page = Page(write_report(run)[0].read_text())
    assert page.count("script") == plain.count("script") == 1 and page.count("img") == 0
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count("alert(1)") >= 8 and page.open == []


@pytest.mark.parametrize(
    "stages", [("pretrain",), ("world", "tokenizer", "pretrain", "sft"), ("evaluate",), ("ppo",)]
)
def test_a_partial_run_has_a_report(tmp_path, stages):
    html, record = write_report(make_run(tmp_path / "part", stages))
    assert "not run" in Page(html.read_text()).text
    assert [stage["stage"] for stage in json.loads(record.read_text())["stages"]] == list(stages)


def test_empty_records_and_a_half_written_event_are_borne(tmp_path):
    run = make_run(tmp_path / "demo")
    for path in run.glob("*/run.json"):
        path.write_text("{}")
    evaluation = make_evaluation()
    evaluation.update(models=None, splits=None, num_prompts=None, samples=[{}, {"responses": {"ppo": None}}])
    evaluation["metrics"]["ppo"] = {"new": {"gold": math.nan, "kl": None}}
    (run / "evaluate" / "evaluation.json").write_text(json.dumps(evaluation))
    with (run / "pretrain" / "events.jsonl").open("a") as file:
        file.write('{"t": 3, "step": 700, "metrics": {"train/loss": NaN}}\n{"t": 4, "st')
    page = Page(write_report(run)[0].read_text())
    assert "1 not finite" in page.text and "no verdict" in page.text
    assert "line 611 of events.jsonl could not be read" in page.text


def test_a_failed_stage_is_the_verdict(tmp_path):
    run = make_run(tmp_path / "demo", ("pretrain", "sft"))
    edit(
        run / "sft" / "run.json",
        lambda value: value.update(status="failed", error="Traceback\nValueError: no data"),
    )
    assert "The stage sft failed: ValueError: no data" in Page(write_report(run)[0].read_text()).text


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        write_report(tmp_path)
    (make_run(tmp_path / "demo", ("sft",)) / "sft" / "run.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"sft/run.json is not valid JSON"):
        write_report(tmp_path / "demo")


def test_a_long_run_stays_small_and_shows_the_worst_answers(tmp_path):
    run = make_run(tmp_path / "long")
    for stage, steps in (("pretrain", 5000), ("sft", 2000), ("reward_model", 1000), ("ppo", 800)):
        lines = [json.dumps(event) for event in make_events(stage, steps)]
        (run / stage / "events.jsonl").write_text("\n".join(lines))

    def many(value: dict[str, Any]) -> None:
        value["samples"] = [copy.deepcopy(sample) for _ in range(30) for sample in value["samples"]]
        for index, sample in enumerate(value["samples"]):
            sample["responses"]["base"]["text"] = f"number {index} " + "and so on " * 500
        value["samples"][100]["responses"]["ppo"]["gold"] = -5.0

    edit(run / "evaluate" / "evaluation.json", many)
    html = write_report(run)[0]
    text = Page(html.read_text()).text
    assert html.stat().st_size < 300_000
    assert "24 of 240 prompts" in text and "number 100 " in text and "among the worst" in text


def test_headline_is_computed():
    lines = headline(make_evaluation())
    assert "The SFT model answers and stops (99.8 % stop); the base model does not (0.0 %)." in lines
    assert "Right answers to factual questions on new prompts: base 4.0 %, SFT 92.6 %, PPO 95.6 %." in lines
    assert "PPO wins 61.0 % against SFT, ties 31.0 % and loses 8.0 %." in lines
    other = make_evaluation()
    other["metrics"]["sft"]["new"]["stop_rate"] = 0.31
    assert any("often does not stop (31.0 % stop)" in line for line in headline(other))
    assert headline({}) == ["Nothing to compare yet: fewer than two models were evaluated."]


def test_verdicts():
    hacked = copy.deepcopy(make_evaluation())
    hacked["metrics"]["ppo"]["held"]["gold"] = 0.2
    finding = verdict(hacked)
    assert finding.tone == "bad" and finding.text.startswith(
        "REWARD HACKING: on held prompts the reward-model score"
    )
    assert "fell from 1.09 to 0.20" in finding.text
    taxed = copy.deepcopy(make_evaluation())
    taxed["metrics"]["ppo"]["held"]["correct"] = 0.60
    assert verdict(taxed).tone == "mixed" and "77.6 % to 60.0 %" in verdict(taxed).text
    without = copy.deepcopy(make_evaluation())
    without["models"] = without["models"][:2]
    assert verdict(without).tone == "mixed" and "SFT is better than base" in verdict(without).text
    assert "rude went from 1.2 % to 5.5 % on new prompts" in verdict(without).text


def test_overoptimised_needs_gold_down_and_reward_up():
    rewards = [(step, step / 10) for step in range(40)]
    fell = [(0, 1.5), (10, 2.4), (20, 2.0), (39, 1.2)]
    assert "peaked at step 10 (2.40) and ended at 1.20" in (overoptimised(fell, rewards) or "")
    assert overoptimised([(0, 1.5), (20, 2.3), (39, 2.4)], rewards) is None
    assert overoptimised(fell, [(step, 2.0) for step in range(40)]) is None


def test_report_imports_neither_torch_nor_ray():
    code = "import sys, rayllm.report.html; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'vllm')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_page_shows_where_each_actor_ran(tmp_path):
    run = make_run(tmp_path / "demo")
    assert "Where each actor ran" not in Page(write_report(run)[0].read_text()).text
    rows = [
        {"role": "policy", "ranks": [0, 1], "node": "10.0.0.7 a1b2c3", "node_type": "learner", "gpus": ["4", "5"]},
        {"role": "reward", "ranks": [0], "node": "10.0.0.9 d4e5f6", "node_type": None, "gpus": [""]},
    ]
    edit(run / "ppo" / "run.json", lambda value: value.update(placement=rows))
    text = Page(write_report(run)[0].read_text()).text
    assert "ppopolicy0, 110.0.0.7 a1b2c3learner4 5" in text and "pporeward010.0.0.9 d4e5f6––" in text
