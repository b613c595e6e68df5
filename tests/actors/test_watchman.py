"""Who is watched, and from when on, without Ray."""

from __future__ import annotations

import asyncio

from actors import watchman
from actors.member import LOOK_S
from actors.watched import Report
from actors.watchman import BEGUN, DONE, STARTED, Place, Watchman


def test_a_rank_that_stops_right_after_it_is_guarded_is_known_by_what_it_said_before(monkeypatch):
    """It sends nothing more; the ranks of an earlier generation are forgotten."""

    async def bury(report: Report) -> tuple[str, bool]:
        return f"stacks of {report.pid}", True

    async def scenario() -> tuple[str, str]:
        watching = Watchman(stall_s=0.1)
        for generation in (0, 1):
            for rank in (0, 1):
                done = {BEGUN: STARTED + 1, DONE: STARTED}
                report = Report("node", pid=10 * generation + rank, started=0, stacks=0, counters=done)
                await watching.report(Place("policy", generation, rank), report)
        await watching.guard("policy", 1)
        await watching.begin()
        await asyncio.sleep(4 * LOOK_S)
        return await watching.leave("policy")

    monkeypatch.setattr(watchman, "bury", bury)
    why, stacks = asyncio.run(scenario())
    assert why.startswith("rank 0 made no progress")
    assert stacks == "policy rank 0:\nstacks of 10\npolicy rank 1:\nstacks of 11\n"
