"""Engines that are killed, stopped, hang, come and go, on real Ray; the engine is a stand-in with the real interface.

Each fault is a function of a `Lab` with its oracle inside, so that it can be run on its own."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import ray

from actors.fleet import RolloutFleet
from actors.group import Role, collect
from actors.health import Deadlines, State
from actors.member import Call
from actors.proof import Proof
from actors.supervisor import Blueprint, Size
from actors.watched import shell
from rayllm.errors import FleetExhausted
from tests.actors.fake_rollout import FakeRollout, Sample, expected, proof_of

STALL_S = 4.0
PROMPTS = list(range(8))
SAMPLING = {"num_samples": 2, "max_new_tokens": 12, "step": 3}
WITHIN_S = 60.0


@dataclass
class Lab:
    """A fleet of stand-ins and the folder in which they are told what to do."""

    folder: Path
    start: int = 2
    least: int = 1
    most: int = 0
    max_restarts: int = 20
    cpus: float = 0.1
    lines: list[str] = field(default_factory=list)
    details: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size = Size(self.start, self.least, self.most or self.start, self.max_restarts, 0.0)
        folder = self.folder
        engines = Blueprint(
            Role("rollout", self.start, self.cpus, 0), shell(FakeRollout), lambda number: {"number": number, "folder": folder},
            setup=[Call("set_prompts", (), {"known": True})],
        )  # fmt: skip
        self.fleet = RolloutFleet(engines, size, Deadlines(start_s=60.0, work_s=STALL_S))

    def tell(self, line: str, detail: str) -> None:
        self.lines.append(line)
        self.details[line] = detail

    def sync(self, version: int) -> None:
        self.fleet.sync(FakeRollout.sync, version, proof=proof_of(version))

    def begin(self) -> list[ray.ObjectRef]:
        """Eight pieces of work, a prompt each."""
        self.begin_anew()
        pieces = [[(prompt_id, [1, 2])] for prompt_id in PROMPTS]
        return self.fleet.submit(FakeRollout.generate, pieces, tokens=[1] * len(pieces), temperature=1.0, **SAMPLING)

    def begin_anew(self) -> None:
        """Nobody has generated yet."""
        for path in self.folder.glob("generates-*"):
            path.unlink()

    def finish(self, references: list[ray.ObjectRef]) -> list[Sample]:
        return [sample for samples in collect(references, "rollout") for sample in samples]

    def numbers(self, state: State) -> list[int]:
        return [engine.number for engine in self.fleet.status() if engine.state is state]

    def busy_engine(self) -> int:
        """Number of one that has begun to generate."""
        wait_for(lambda: any(self.folder.glob("generates-*")))
        return min(int(path.name.split("-")[1]) for path in self.folder.glob("generates-*"))

    def pid(self, number: int) -> int:
        return int((self.folder / f"pid-{number}").read_text())

    def told(self, text: str) -> str:
        """The line that contains the text, once it is there."""
        wait_for(lambda: any(text in line for line in self.lines))
        return next(line for line in self.lines if text in line)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def right(version: int) -> list[Sample]:
    """What the eight pieces must come to, whoever sampled them."""
    settings = {name: value for name, value in SAMPLING.items() if name != "temperature"}
    return expected(PROMPTS, version=version, **settings)


@pytest.fixture(scope="module")
def healing(local_ray, tmp_path_factory) -> Iterator[Lab]:
    """One fleet of two, which every fault leaves as it was."""
    yield from running(Lab(tmp_path_factory.mktemp("healing")))


@pytest.fixture
def lab(local_ray, tmp_path) -> Iterator[Callable[..., Lab]]:
    made = []

    def make(**settings) -> Lab:
        entered = running(Lab(tmp_path, **settings))
        made.append(entered)
        return next(entered)

    yield make
    for entered in made:
        next(entered, None)


def running(lab: Lab) -> Iterator[Lab]:
    with lab.fleet.told(lab.tell):
        yield lab
    lab.fleet.stop()


def kill(lab: Lab, number: int) -> None:
    os.kill(lab.pid(number), signal.SIGKILL)


def stop(lab: Lab, number: int) -> None:
    os.kill(lab.pid(number), signal.SIGSTOP)


def hang(lab: Lab, number: int) -> None:
    """It answers, but samples nothing."""
    (lab.folder / f"hangs-{number}").touch()
    assert number in lab.fleet.call(FakeRollout.ping)


def break_down(lab: Lab, number: int) -> None:
    (lab.folder / f"stops-{number}").touch()


FAULTS = {
    "killed": (kill, "its process ended"),
    "stopped": (stop, "no progress for"),
    "answers but does nothing": (hang, "no progress for"),
    "says that it stopped": (break_down, "broken on purpose"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.scorecard("R01", "R17")
@pytest.mark.scorecard("R03", partly=True)
def test_losing_an_engine_changes_nothing_that_is_sampled(healing, fault):
    break_it, reason = FAULTS[fault]
    healing.sync(7)
    wait_for(lambda: len(healing.numbers(State.READY)) == 2)
    newcomer = max(healing.numbers(State.READY)) + 1
    references = healing.begin()
    victim = healing.busy_engine()
    pid = healing.pid(victim)
    break_it(healing, victim)
    assert healing.finish(references) == right(version=7)
    line = healing.told(f"engine {victim} is lost: ")
    assert reason in line and "unfinished pieces of work go to the others" in line
    assert gone(pid)
    if reason.startswith("no progress"):
        assert "hread 0x" in healing.details[line]  # where it stood
    healing.told(f"engine {newcomer} serves: it has the policy's weights, proved")
    assert (healing.folder / f"synced-{newcomer}").read_text() == "7"


@pytest.mark.scorecard("R01", "R05")
def test_a_restarted_engine_serves_only_after_a_proved_sync_of_the_newest_weights(healing):
    healing.sync(7)
    wait_for(lambda: len(healing.numbers(State.READY)) == 2)
    newcomer = max(healing.numbers(State.READY)) + 1
    unproved, lies = healing.folder / f"unproved-{newcomer}", healing.folder / f"lies-{newcomer}"
    unproved.touch()
    victim = min(healing.numbers(State.READY))
    kill(healing, victim)
    wait_for(lambda: healing.numbers(State.SYNCING) == [newcomer])
    wait_for((healing.folder / f"synced-{newcomer}").exists)
    assert healing.finish(healing.begin()) == right(version=7)
    assert [engine.served for engine in healing.fleet.status() if engine.number == newcomer] == [0]
    modules = ray.get(healing.fleet._actor.__ray_call__.remote(lambda fleet: {*sys.modules}))
    assert "tests.actors.fake_rollout" not in modules  # it starts engines that it knows nothing of
    # New weights are about to be written over those that it reads: the writer waits, and what it read does not count.
    readers = healing.fleet.readers()
    assert not ray.wait([readers], timeout=0.5)[0]
    lies.touch()
    unproved.unlink()
    assert len(ray.get(readers)) == 1
    lies.unlink()
    assert healing.numbers(State.SYNCING) == [newcomer]
    healing.sync(8)
    wait_for(lambda: newcomer in healing.numbers(State.READY))
    assert (healing.folder / f"synced-{newcomer}").read_text() == "8"
    assert healing.finish(healing.begin()) == right(version=8)


def begin_joined(healing: Lab) -> list[ray.ObjectRef]:
    """The eight prompts as one piece of work after another in two that are joined."""
    healing.begin_anew()
    work = [[[(prompt_id, [1, 2])] for prompt_id in PROMPTS[start : start + 4]] for start in (0, 4)]
    return healing.fleet.submit_joined(
        FakeRollout.generate, work, tokens=[[1] * 4] * 2, join=lambda parts: sum(parts, []), temperature=1.0, **SAMPLING
    )


@pytest.mark.scorecard("R01")
def test_pieces_of_one_shard_are_sampled_by_all_engines_and_joined_in_order(healing):
    healing.sync(7)
    wait_for(lambda: len(healing.numbers(State.READY)) == 2)
    references = begin_joined(healing)
    assert len(references) == 2
    wait_for(lambda: len(list(healing.folder.glob("generates-*"))) == 2)  # of two engines
    victim = healing.busy_engine()
    kill(healing, victim)
    assert healing.finish(references) == right(version=7)
    healing.told(f"engine {victim} is lost: ")
    wait_for(lambda: len(healing.numbers(State.READY)) == 2)


@pytest.mark.parametrize("begin", [Lab.begin, begin_joined])
def test_what_nobody_wants_any_more_is_given_up(healing, begin):
    healing.sync(7)
    wait_for(lambda: len(healing.numbers(State.READY)) == 2)
    for path in healing.folder.glob("gave-up-*"):
        path.unlink()
    references = begin(healing)
    engine = healing.busy_engine()
    healing.fleet.drop(references)
    wait_for((healing.folder / f"gave-up-{engine}").exists)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(references)
    assert healing.finish(healing.begin()) == right(version=7)


@pytest.mark.scorecard("R09")
def test_a_sync_whose_writer_died_is_forgotten_once_another_one_writes(healing):
    """The engines cannot read what they were told of; who waits for them gets that error, until all begin again."""
    healing.sync(7)
    wait_for(lambda: len(healing.numbers(State.READY)) == 2)
    gone = healing.folder / "writer-is-gone"
    gone.touch()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="rollout: .*no such process wrote weights"):
            healing.sync(8)
    with pytest.raises(RuntimeError, match="no such process wrote weights"):
        healing.finish(healing.begin())
    gone.unlink()
    healing.fleet.begin_again()
    ray.get(healing.fleet.readers())
    healing.sync(5)  # the weights go back
    assert healing.fleet.num_engines == 2
    assert healing.finish(healing.begin()) == right(version=5)


@pytest.mark.scorecard("R05", partly=True)
def test_what_engines_sample_is_handed_out_once_they_have_said_what_the_policy_says(lab, tmp_path):
    two = lab()
    two.sync(7)
    said = tmp_path / "the-policy-said-it"

    @ray.remote(num_cpus=0)
    def slowly() -> list[float]:
        wait_for(said.exists)
        return [-8.0]

    two.fleet.sync(FakeRollout.sync, 8, proof=Proof(8, [slowly.remote()], 0.01))
    references = two.begin()
    assert not ray.wait(references, timeout=2.0)[0]  # a piece takes half a second
    said.touch()
    assert two.finish(references) == right(version=8)
    # One of them takes weights and does not use them.
    (tmp_path / "lies-1").touch()
    two.sync(9)
    reason = r"engine 1 does not serve the policy's weights after the sync of version 9: .*policy \[-9.0\] ..., engine \[0.0\]"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=reason):
            two.finish(two.begin())
    with pytest.raises(RuntimeError, match=reason):
        two.fleet.prove()
    (tmp_path / "lies-1").unlink()
    two.sync(10)
    two.fleet.prove()
    assert two.finish(two.begin()) == right(version=10)


def test_who_waits_until_the_engines_serve_waits_for_a_whole_sync_whatever_comes_of_it(lab):
    """But not for the first one, nor for one after `begin_again`: in these the engines may wait for whoever waits."""
    two = lab()
    ray.get(two.fleet.synced())
    two.sync(7)
    synced = two.fleet.synced()
    two.sync(8)
    ray.get(synced)
    synced = two.fleet.synced()
    assert not ray.wait([synced], timeout=0.5)[0]
    gone = two.folder / "writer-is-gone"
    gone.touch()
    with pytest.raises(RuntimeError, match="no such process wrote weights"):
        two.sync(9)
    ray.get(synced)
    gone.unlink()
    two.fleet.begin_again()
    ray.get(two.fleet.synced())


def test_who_waits_until_the_engines_serve_does_not_begin_beside_their_loading(healing):
    healing.sync(7)
    wait_for(lambda: len(healing.numbers(State.READY)) == 2)
    slow = healing.folder / f"slow-in-sync-{min(healing.numbers(State.READY))}"
    slow.touch()
    synced, loading = healing.fleet.synced(), healing.fleet.begin_sync(FakeRollout.sync, 8, proof=proof_of(8))
    assert not ray.wait([synced], timeout=0.5)[0]
    slow.unlink()
    ray.get(synced)
    healing.fleet.end_sync(loading)
    assert healing.finish(healing.begin()) == right(version=8)


def test_a_sync_does_not_wait_for_an_engine_that_waits_for_the_policy_who_waits_for_the_sync(healing):
    """Suspect when the sync began, for it was stopped, it works again; but it never proved anything yet."""
    healing.sync(7)
    wait_for(lambda: len(healing.numbers(State.READY)) == 2)
    unproved = max(healing.numbers(State.READY)) + 1
    slow_proof = healing.folder / f"unproved-{unproved}"
    slow_proof.touch()
    first, second = healing.numbers(State.READY)
    kill(healing, first)
    wait_for((healing.folder / f"synced-{unproved}").exists)
    kill(healing, second)  # so that the one that serves came later
    wait_for(lambda: healing.numbers(State.READY) == [unproved + 1])
    stop(healing, unproved)
    wait_for(lambda: healing.numbers(State.SUSPECT) == [unproved])
    slow_proof.unlink()
    slow = healing.folder / f"slow-in-sync-{unproved + 1}"
    slow.touch()

    @ray.remote(num_cpus=0)
    def policy(after: None) -> list[float]:
        return [-8.0]

    said = policy.remote(healing.fleet.synced())
    loading = healing.fleet.begin_sync(FakeRollout.sync, 8, proof=Proof(8, [said], 0.01))
    wait_for(lambda: healing.numbers(State.SYNCING) == [unproved + 1])  # else it may still prove the version before
    os.kill(healing.pid(unproved), signal.SIGCONT)
    wait_for(lambda: (healing.folder / f"synced-{unproved}").read_text() == "8")
    wait_for(lambda: healing.numbers(State.SYNCING) == [unproved, unproved + 1])
    slow.unlink()
    assert ray.wait([loading], timeout=WITHIN_S)[0]
    healing.fleet.end_sync(loading)
    wait_for(lambda: len(healing.numbers(State.READY)) == 2)
    assert healing.finish(healing.begin()) == right(version=8)


@pytest.mark.parametrize(("trouble", "reason"), [("hangs", "no progress for"), ("stops", "broken on purpose")])
@pytest.mark.scorecard("R05", "R22")
def test_the_learner_does_not_wait_for_an_engine_that_is_lost_in_a_sync(healing, trouble, reason):
    healing.sync(7)
    wait_for(lambda: len(healing.numbers(State.READY)) == 2)
    victim = min(healing.numbers(State.READY))
    (healing.folder / f"{trouble}-in-sync-{victim}").touch()
    healing.sync(9)
    assert healing.fleet.num_engines == 1
    assert healing.finish(healing.begin()) == right(version=9)
    assert reason in healing.told(f"engine {victim} is lost: ")


@pytest.mark.scorecard("R02")
def test_the_only_engine_is_restarted_and_when_the_budget_is_spent_the_run_ends(lab):
    only = lab(start=1, max_restarts=1)
    only.sync(7)
    references = only.begin()
    kill(only, only.busy_engine())
    assert only.finish(references) == right(version=7)  # by engine 1, which nobody but the fleet has synced
    references = only.begin()
    assert only.busy_engine() == 1
    kill(only, 1)
    with pytest.raises(FleetExhausted, match=r"0 of at least 1 engines are up and the restarts of an hour "
                       r"\(rollout.max_restarts=1\) are used up; the last that was lost: engine 1: its process ended"):  # fmt: skip
        only.finish(references)
    with pytest.raises(FleetExhausted, match="The last checkpoint is intact"):
        only.sync(8)


@pytest.mark.scorecard("R02")
def test_work_that_takes_engine_after_engine_with_it_is_told(lab):
    poisoned = lab(start=3)
    poisoned.sync(7)
    (poisoned.folder / "exits-all").touch()
    work = [[(5, [1])]]
    references = poisoned.fleet.submit(FakeRollout.generate, work, tokens=[1], temperature=1.0, **SAMPLING)
    with pytest.raises(RuntimeError, match=r"rollout: .*engine 0, engine 1, engine 2 were lost, one by one, with the same work: \[\[\(5"):
        poisoned.finish(references)


@pytest.mark.parametrize(
    ("trouble", "message"), [("cannot-start", "an engine could not start: ValueError: no such model"),
                             ("lies-all", "does not serve the policy's weights")]
)  # fmt: skip
@pytest.mark.scorecard("R06")
def test_engines_that_cannot_start_or_lie_end_the_run(lab, tmp_path, trouble, message):
    (tmp_path / trouble).touch()
    with pytest.raises(RuntimeError, match=message):
        lab(start=1).sync(7)


def test_the_fleet_grows_as_there_is_room(lab):
    """Two fit, three are wanted: the second one joins and serves, the third waits for a place and keeps nobody."""
    growing = lab(start=1, most=3, cpus=3.0)
    growing.sync(7)
    assert growing.numbers(State.READY) == [0]
    growing.fleet.grow()
    wait_for(lambda: len(growing.numbers(State.READY)) == 2)
    growing.sync(8)
    assert growing.fleet.num_engines == 2
    assert growing.finish(growing.begin()) == right(version=8)
    by_state = {engine.state: engine for engine in growing.fleet.status() if engine.state is not State.READY}
    assert by_state[State.STARTING].pid is None
    assert sorted(engine.served for engine in growing.fleet.status()) == [0, 4, 4]
