"""Who is watched, and from when on, without Ray."""

from __future__ import annotations

import asyncio

from actors import watchman
from actors.member import LOOK_S
from actors.watched import Report
from actors.watchman import BEGUN, DONE, STARTED, Place, Watchman

STARTED_AND_BUSY = {BEGUN: STARTED + 1, DONE: STARTED}


def ended(monkeypatch, counters: dict[str, int], generation: int | None) -> tuple[str, str]:
    """What is told of two ranks, of two generations each, that say this and then nothing more; one of them is guarded."""

    async def bury(report: Report) -> tuple[str, bool]:
        return f"stacks of {report.pid}", True

    async def scenario() -> tuple[str, str]:
        watching = Watchman(stall_s=0.1)
        for one in (0, 1):
            for rank in (0, 1):
                report = Report("node", pid=10 * one + rank, started=0, stacks=0, counters=counters)
                await watching.report(Place("policy", one, rank), report)
        if generation is not None:
            await watching.guard("policy", generation)
        await watching.begin()
        await asyncio.sleep(4 * LOOK_S)
        return await watching.leave("policy")

    monkeypatch.setattr(watchman, "bury", bury)
    return asyncio.run(scenario())


def test_ranks_that_stopped_before_they_are_guarded_are_known_by_what_they_said(monkeypatch):
    why, stacks = ended(monkeypatch, STARTED_AND_BUSY, 1)
    assert why.startswith("rank 0 made no progress")
    said = f"last said {STARTED_AND_BUSY}"
    assert stacks == f"policy rank 0: {said}\nstacks of 10\npolicy rank 1: {said}\nstacks of 11\n"


def test_nobody_is_ended_who_is_not_guarded(monkeypatch):
    assert ended(monkeypatch, STARTED_AND_BUSY, None) == ("", "")


def test_with_nothing_to_do_a_rank_must_still_be_heard_of(monkeypatch):
    assert ended(monkeypatch, {**STARTED_AND_BUSY, DONE: STARTED + 1, "x": 1}, 1)[0].startswith("rank 0")


def test_a_constructor_that_hangs_is_found_later(monkeypatch):
    assert ended(monkeypatch, {BEGUN: 1}, 1) == ("", "")
    monkeypatch.setattr(watchman, "START_S", 0.2)
    assert ended(monkeypatch, {BEGUN: 1}, 1)[0].startswith("rank 0 made no progress")
