"""The scorecard: tests that stand for a row, run in one process, and the table of what was seen.

    make faults          every row of the fast tier: real Ray, a fake engine with the real one's interface
    make faults-full     all rows: real vLLM and DeepSpeed too, and what takes too long for `make test`

A test becomes part of a row by ``@pytest.mark.scorecard("R38")`` (several ids are fine; ``tier="full"`` where it needs
vLLM or a whole pipeline, ``partly=True`` where it stands for a part of what the row expects). What it saw it may tell the
fixture ``seen``, with the seconds until a fault was noticed and until the run had recovered; else the test's name, which
is a sentence, is what was seen. A row passes if all its tests did, and one of them at least stands for all of it.

``@pytest.mark.long``, of a row or not: too long for `make test`; `make test-long` runs these alone.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.scorecard.rows import ROWS

TIERS = ("fast", "full")
PAGE_START, PAGE_END = "<!-- scorecard: begin -->", "<!-- scorecard: end -->"


@dataclass
class Result:
    """Of one test, or of all of a row's."""

    name: str
    outcome: str = ""
    seconds: float = 0.0
    said: list[str] = field(default_factory=list)
    detected: float | None = None
    recovered: float | None = None
    partly: set[str] = field(default_factory=set)
    """Rows that this test stands for a part of."""

    def tell(self, text: str, *, detected: float | None = None, recovered: float | None = None) -> None:
        """What was seen.

        Args:
            text: half a sentence.
            detected: seconds from the fault until somebody knew.
            recovered: seconds from the fault until the run was as before.
        """
        self.said.append(text)
        self.detected, self.recovered = _longer(self.detected, detected), _longer(self.recovered, recovered)


class Scorecard:
    """Collects the results of a session."""

    def __init__(self, tier: str) -> None:
        self.tier = tier
        self.tests: dict[str, Result] = {}
        self.rows: dict[str, list[str]] = {row: [] for row in ROWS}
        self.elsewhere: set[str] = set()
        """Rows that only the other tier holds."""

    def result(self, row: str) -> Result:
        """Of all tests of a row."""
        tests = [self.tests[test] for test in self.rows[row]]
        total = Result(row, seconds=sum(test.seconds for test in tests))
        for test in [test for test in tests if test.outcome]:
            for text in test.said or [test.name]:
                if text not in total.said:
                    total.said.append(text)
            total.detected = _longer(total.detected, test.detected)
            total.recovered = _longer(total.recovered, test.recovered)
        outcomes = {test.outcome for test in tests}
        if not tests:
            total.outcome = "full tier" if row in self.elsewhere else "not covered"
        else:
            total.outcome = next((o for o in ("failed", "", "skipped", "passed") if o in outcomes), "") or "not run"
            if total.outcome == "passed" and all(row in test.partly for test in tests):
                total.outcome = "partly"
        return total


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("scorecard")
    choices = (*TIERS, "rest")
    group.addoption("--scorecard", choices=choices, help="run its tests of a tier alone; rest: all but the fast tier")
    group.addoption("--long", action="store_true", help="run what takes too long for every day, alone")
    group.addoption("--scorecard-page", type=Path, help="write the table into this page")


def pytest_configure(config: pytest.Config) -> None:
    line = "scorecard(*rows, tier='fast', partly=False): the test stands for (a part of) rows of the scorecard"
    config.addinivalue_line("markers", line)
    config.addinivalue_line("markers", "long: takes too long for every day; `make test` leaves it out")
    config.stash[_CARD] = Scorecard(config.getoption("--scorecard") or "")


_CARD = pytest.StashKey[Scorecard]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what was asked for, and note which test stands for which row."""
    card = config.stash[_CARD]
    kept, left = [], []
    for item in items:
        marks = list(item.iter_markers("scorecard"))
        rows = [row for mark in marks for row in mark.args]
        unknown = set(rows) - set(ROWS)
        assert not unknown, f"{item.nodeid}: no such row: {unknown}"
        tier = "full" if any(mark.kwargs.get("tier") == "full" for mark in marks) else "fast"
        long = item.get_closest_marker("long") is not None
        assert not long or not marks or tier == "full", f"{item.nodeid}: long, and not of the full tier"
        wanted = {
            "": long == config.getoption("--long"),
            "fast": bool(marks) and tier == "fast",
            "full": bool(marks),
            "rest": not long and (not marks or tier == "full"),
        }[card.tier]
        (kept if wanted else left).append(item)
        if marks and wanted:
            partly = {row for mark in marks if mark.kwargs.get("partly") for row in mark.args}
            card.tests[item.nodeid] = Result(_sentence(item.name), partly=partly)
        for row in rows:
            if wanted:
                card.rows[row].append(item.nodeid)
            else:
                card.elsewhere.add(row)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> Any:
    """`Result.tell` of this test; without a row it goes nowhere."""
    card = request.config.stash[_CARD]
    return card.tests.get(request.node.nodeid, Result(request.node.name)).tell


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    outcome = yield
    report = outcome.get_result()
    result = item.config.stash[_CARD].tests.get(item.nodeid)
    if result is None:
        return
    if report.when != "teardown":
        result.seconds += report.duration  # set-up belongs to it: starting what is to fail is a part
    if report.when == "call" or report.outcome != "passed":
        result.outcome = report.outcome
    if report.failed:
        result.said = [_first_line(report)]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    card = config.stash[_CARD]
    if card.tier not in TIERS:
        return
    from rich.console import Console

    results = {row: card.result(row) for row in ROWS}
    console = Console(width=160)
    console.print(_table(results, card.tier))
    console.print(summary(results))
    page = config.getoption("--scorecard-page")
    if page is not None:
        write_page(page, results, card.tier)


def summary(results: dict[str, Result]) -> str:
    """Counts, of the R rows and of the S rows."""
    parts = []
    for kind in "RS":
        of_kind = {row: result for row, result in results.items() if row.startswith(kind)}
        counts = Counter(result.outcome for result in of_kind.values())
        ran = counts["passed"] + counts["partly"] + counts["failed"]
        starred = Counter(result.outcome for row, result in of_kind.items() if ROWS[row].starred)
        parts.append(
            f"{kind}: of {len(of_kind)} rows {counts['passed']} pass, {counts['partly']} partly, {counts['failed']} fail, "
            f"{len(of_kind) - ran} did not run; of {starred.total()} starred ones {starred['passed']} pass, "
            f"{starred['partly']} partly, {starred['failed']} fail."
        )
    return "\n".join(parts)


def _table(results: dict[str, Result], tier: str) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"Scorecard, {tier} tier", title_justify="left")
    for name, options in (("row", {}), ("expected", {"ratio": 3}), ("seen", {"ratio": 4})):
        table.add_column(name, **options)
    table.add_column("seconds", justify="right")
    table.add_column("")
    for row, result in results.items():
        said = "; ".join(result.said)
        text = said if len(said) <= 240 else said[:237] + "..."
        colour = {"passed": "green", "failed": "red", "partly": "yellow"}.get(result.outcome, "dim")
        what = f"{ROWS[row].what}: [dim]{escape(ROWS[row].expected)}[/dim]"
        table.add_row(
            _name(row), what, escape(text), f"{result.seconds:.1f}" if result.said else "",
            f"[{colour}]{result.outcome}[/{colour}]",
        )  # fmt: skip
    return table


def write_page(page: Path, results: dict[str, Result], tier: str) -> None:
    """Put the table between the page's two marks."""
    before, rest = page.read_text().split(PAGE_START)
    _, after = rest.split(PAGE_END)
    lines = [f"`make faults{'-full' if tier == 'full' else ''}` wrote this. " + " ".join(summary(results).split("\n")), ""]
    lines += ["| row | what | expected | seen | noticed, s | recovered, s | all, s | |", "|---|---|---|---|---:|---:|---:|---|"]
    for row, result in results.items():
        cells = [_name(row), ROWS[row].what, ROWS[row].expected, "; ".join(result.said)]
        cells += [_number(result.detected), _number(result.recovered), _number(result.seconds if result.said else None)]
        cells.append({"passed": "pass", "failed": "FAIL"}.get(result.outcome, result.outcome))
        lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    page.write_text(before + PAGE_START + "\n" + "\n".join(lines) + "\n" + PAGE_END + after)


def _name(row: str) -> str:
    return row + "*" * ROWS[row].starred


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _longer(one: float | None, other: float | None) -> float | None:
    return max((value for value in (one, other) if value is not None), default=None)


def _sentence(name: str) -> str:
    """The test's name as words, without its parameters."""
    return re.sub(r"\[.*", "", name).removeprefix("test_").replace("_", " ")


def _first_line(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash is not None else str(report.longrepr)).strip().splitlines()[0][:200]
