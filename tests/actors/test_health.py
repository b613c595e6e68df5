"""The state machine of one watched actor, by hand: a deadline of 10 s for work, 100 s for the start."""

from __future__ import annotations

import pytest

from actors.health import Deadlines, Health, State


@pytest.fixture
def health() -> Health:
    return Health(Deadlines(start_s=100.0, work_s=10.0), 0.0)


def ready(health: Health, now: float) -> Health:
    health.report({}, now)
    health.started()
    health.synced()
    return health


def test_it_serves_after_start_and_sync_and_not_before(health):
    assert health.state is State.STARTING and not health.up
    health.report({}, 1.0)
    assert health.up and health.state is State.STARTING  # that it is heard of says nothing of what it serves
    health.started()
    assert health.state is State.SYNCING
    health.synced()
    assert health.state is State.READY


def test_waiting_for_a_place_has_no_deadline_but_starting_has(health):
    health.began(0.0)
    assert health.look(1e6) is None
    health.report({}, 1e6)
    assert health.look(1e6 + 100) is None
    assert health.look(1e6 + 101) is State.DEAD


@pytest.mark.scorecard("R23")
def test_with_nothing_to_do_it_is_enough_to_be_heard_of(health):
    ready(health, 0.0)
    for now in range(1, 100):
        health.report({"tokens": 5}, float(now))
        assert health.look(now + 0.5) is None
    assert health.look(104.0) is None  # 5 s after the last word
    assert health.look(104.1) is State.SUSPECT
    assert health.look(109.0) is None
    assert health.look(109.1) is State.DEAD


@pytest.mark.scorecard("R17", "R23")
def test_with_work_only_counters_that_move_are_progress(health):
    ready(health, 0.0).began(50.0)
    assert health.look(55.0) is None  # the time without work is not counted
    health.report({"tokens": 1}, 52.0)
    for now in (53.0, 55.0, 57.0):  # it answers, but does nothing
        health.report({"tokens": 1}, now)
    assert health.look(57.5) is State.SUSPECT
    health.report({"tokens": 2}, 58.0)
    assert health.look(58.5) is State.READY
    assert health.look(68.5) is State.DEAD


@pytest.mark.scorecard("R19", "R23")
def test_another_call_does_not_put_the_deadline_off_but_an_answer_does(health):
    ready(health, 0.0).began(0.0)
    health.began(4.0)
    assert health.look(5.5) is State.SUSPECT
    health.ended(6.0)
    assert health.look(6.5) is State.READY
    assert health.still(8.0) == 2.0


@pytest.mark.scorecard("R19", "R24")
def test_a_suspect_that_comes_to_serves_only_what_is_newest(health):
    ready(health, 0.0).began(0.0)
    assert health.look(6.0) is State.SUSPECT
    health.behind()  # new weights meanwhile
    assert health.state is State.SUSPECT
    health.report({"tokens": 1}, 7.0)
    assert health.look(7.5) is State.SYNCING
    health.synced()
    assert health.state is State.READY


@pytest.mark.scorecard("R01")
def test_the_dead_stay_dead(health):
    ready(health, 0.0).died()
    health.report({"tokens": 1}, 1.0)
    health.started()
    health.synced()
    health.behind()
    assert health.state is State.DEAD and health.look(2.0) is None


@pytest.mark.scorecard("R22")
def test_a_sync_that_hangs_is_found_out(health):
    ready(health, 0.0).began(0.0)
    health.behind()
    assert health.state is State.SYNCING
    assert health.look(5.5) is State.SUSPECT
    assert health.look(10.5) is State.DEAD


def test_a_process_reports_seldom_unless_its_deadline_is_short():
    every = {work_s: Deadlines(start_s=600.0, work_s=work_s).report_s for work_s in (1.0, 6.0, 60.0, 120.0, 600.0, 7200.0)}
    assert every == {1.0: 0.5, 6.0: 0.5, 60.0: 1.0, 120.0: 2.0, 600.0: 10.0, 7200.0: 10.0}
