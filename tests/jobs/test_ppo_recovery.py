"""Policy, critic, reference and reward models that die under `rayllm ppo`: the job itself with its real actors, DeepSpeed
and all, over fake engines. Whatever dies, the run ends as an undisturbed one, to the bit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from actors.fleet import RolloutFleet
from actors.group import Role
from actors.health import Deadlines
from actors.member import Call
from actors.supervisor import Blueprint, Size
from actors.watched import shell
from jobs import ppo, ppo_roles
from jobs.ppo_recovery import Recovery
from rayllm import faults
from rayllm.config.base import load_config
from rayllm.config.ppo import PPOConfig
from rayllm.data.prompts import PromptStream
from rayllm.errors import FleetExhausted
from rayllm.faults import Fault, plan, struck
from tests.actors.fake_engine import FakeEngineActor

CPUS = 0.2
STEPS = 6
STALL_S, SHORT_STALL_S = 120.0, 6.0
SETTINGS = (
    f"num_steps={STEPS}", "prompts_per_step=8", "rollout.max_new_tokens=8", "checkpoint.every_steps=2", "eval.every_steps=2",
    "algorithm.num_minibatches=1", "algorithm.num_epochs=1", "critic.warmup_steps=0", "max_logprob_mismatch=1e6",
    "policy.optimizer.learning_rate=1e-3", "rollout.num_actors=2", "policy.num_actors=2",
    *(f"{role}.cpus_per_actor={CPUS}" for role in ("policy", "critic", "reference", "reward", "rollout")),
)  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_model_dir, tiny_tokenizer) -> list[str]:
    """Models and prompts, as settings."""
    from rayllm.models.heads import ScalarModel
    from rayllm.models.loading import save_model

    folder = tmp_path_factory.mktemp("inputs")
    model = ScalarModel.from_folder(tiny_model_dir, seed=3)
    model.classifier.config.reward_mean, model.classifier.config.reward_std = 0.5, 2.0
    save_model(model.classifier, tiny_tokenizer, folder / "reward-model")
    for name, first in (("prompts", 0), ("held-out", 100)):
        rows = [{"prompt": f"What is number {first + n}?"} for n in range(24)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"model={tiny_model_dir}", f"reward_model={folder / 'reward-model'}", f"prompts={folder / 'prompts.jsonl'}",
            f"eval.prompts={folder / 'held-out.jsonl'}"]  # fmt: skip


def start_fake_engines(config: PPOConfig, prompts: Any, seats: Any) -> RolloutFleet:
    """For `jobs.ppo_roles._start_engines`."""
    arguments = {"model_dir": str(config.model), "engine": {}, "seed": config.seed}
    sampling = {
        "num_samples": config.samples_per_prompt, "temperature": config.rollout.temperature,
        "max_new_tokens": config.rollout.max_new_tokens,
    }  # fmt: skip
    setup = [Call(FakeEngineActor.set_prompts.__name__, (prompts.token_ids,), sampling)]
    count = config.rollout.num_actors
    return RolloutFleet(
        Blueprint(Role("rollout", count, CPUS, 0), shell(FakeEngineActor), lambda number: arguments, setup, seats.options),
        Size(start=count, least=1, most=count, max_restarts=config.rollout.max_restarts, wait_s=0.0),
        Deadlines(start_s=STALL_S, work_s=STALL_S),
    )


class Runs:
    """PPO runs with the same inputs, each in a folder of its own."""

    def __init__(self, inputs: Sequence[str], patch: pytest.MonkeyPatch) -> None:
        self.inputs, self._patch = inputs, patch
        patch.setattr(ppo_roles, "_start_engines", start_fake_engines)

    def __call__(self, folder: Path, *settings: str, faults_: Sequence[Fault] = ()) -> Path:
        """Run to the end with these faults; returns the run folder."""
        planned = None
        if faults_:
            plan(folder / "faults", faults_)
            planned = faults._Planned(folder / "faults")
        self._patch.setattr(faults, "_planned", planned)
        run_dir = folder / "run"
        loaded = load_config(PPOConfig, None, [f"run_dir={run_dir}", *self.inputs, *SETTINGS, *settings])
        with (folder / "screen").open("w") as screen:
            ppo.run(loaded, Console(file=screen))
        return run_dir


@pytest.fixture(scope="module")
def run(local_ray, inputs) -> Iterator[Runs]:
    with pytest.MonkeyPatch.context() as patch:
        yield Runs(inputs, patch)


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("undisturbed"))


def learned(run_dir: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, metrics) in the order in which they stand there, without what is measured in seconds."""
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    indifferent = ("time/", "perf/", "startup/", "rollout/engines")
    return [
        (event["step"], {k: v for k, v in event["metrics"].items() if not k.startswith(indifferent)})
        for event in events
        if "metrics" in event
    ]


def notes(run_dir: Path) -> list[str]:
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [event["text"] for event in events if event.get("kind") == "note"]


def assert_the_same(run_dir: Path, undisturbed: Path) -> None:
    """Metrics without a gap or a duplicate, and weights: equal, not close."""
    expected, found = learned(undisturbed), learned(run_dir)
    assert [step for step, _ in found] == [step for step, _ in expected]
    for (step, one), (_, other) in zip(found, expected, strict=True):
        assert one == other, step
    for name in ("model", "critic"):
        one, other = (load_file(folder / name / "model.safetensors") for folder in (run_dir, undisturbed))
        assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


@pytest.mark.scorecard("R07", "R09", "R10", "R18")
def test_whoever_dies_or_hangs_is_rebuilt_inside_the_run(run, undisturbed, tmp_path, seen):
    """PPO with two ranks of the policy: before anything is learned, while a step is scored, while the engines get new
    weights, in the critic's update, and in a collective."""
    chosen = [
        Fault("reward.scores", "kill"),  # of the held-out responses, at the start
        Fault("reference.logprobs", "kill", passes=3),  # in the second step
        Fault("policy.publish", "kill", passes=5, rank=0),  # after a checkpoint
        Fault("critic.update", "kill", passes=6),  # and another one
        Fault("policy.update", "stop", passes=4, rank=1),
    ]
    run_dir = run(tmp_path, f"recovery.stall_s={SHORT_STALL_S}", faults_=chosen)
    told = "\n".join(notes(run_dir))
    assert [one.rank for one in struck(tmp_path / "faults")] == [None, None, 0, 0, 1], told
    assert_the_same(run_dir, undisturbed)
    assert "reward starts anew; the run goes back to the start" in told
    assert "reference starts anew; step 2 begins again" in told
    assert "policy starts anew; the run goes back to the checkpoint of step 2" in told
    assert "critic starts anew; the run goes back to the checkpoint of step 4" in told
    assert re.search("policy is lost: rank [01] made no progress for", told)
    stacks = (run_dir / "logs/model-stacks.txt").read_text()
    assert "policy rank 0: " in stacks and "policy rank 1: " in stacks and 'policy.py", line' in stacks
    seconds = [float(note.rpartition("after ")[2].removesuffix(" s")) for note in notes(run_dir) if "is back after" in note]
    seen("reward model, reference, critic and policy killed, one of two ranks stopped in a collective, in one run: "
         "metrics and weights equal to the bit", detected=SHORT_STALL_S, recovered=max(seconds))  # fmt: skip


@pytest.mark.long
@pytest.mark.scorecard("R08", "R09", "R60", tier="full")
def test_a_rank_that_dies_takes_its_group_along_and_no_prompt_is_lost(run, tmp_path):
    """GRPO, two ranks, a step ahead: during a save, and while the engines get its weights."""
    chosen = [Fault("learner.save", "kill", rank=1), Fault("policy.publish", "kill", passes=4, rank=0)]
    run_dir = run(tmp_path, "algorithm.advantage=grpo", "samples_per_prompt=2", "max_policy_lag=1", faults_=chosen)
    assert [one.rank for one in struck(tmp_path / "faults")] == [1, 0]
    assert [step for step, _ in learned(run_dir)] == list(range(STEPS + 1))
    state = json.loads((run_dir / f"checkpoints/step-{STEPS:06d}/state.json").read_text())
    stream = PromptStream(24, seed=0)
    for _ in range(STEPS):
        stream.take(8)
    assert state["prompts"] == list(stream.position) and state["drawn"] == STEPS and not state["ahead"]


def test_rebuilds_are_bounded_and_the_end_names_what_was_lost(tmp_path):
    keys = [f"run_dir={tmp_path}", "model=m", "reward_model=r", "prompts=p"]
    told, ended = "policy is lost: it ended", r"policy is lost: it ended: .*{} The last checkpoint is intact"

    def recovery(*settings: str) -> Recovery:
        config = load_config(PPOConfig, None, [*keys, *settings]).config
        return Recovery(SimpleNamespace(config=config, roles=SimpleNamespace(models={})), {})

    twice = recovery("recovery.max_rebuilds=2")
    for _ in range(2):
        twice._check(told, RuntimeError())
    with pytest.raises(FleetExhausted, match=ended.format(r"\(recovery.max_rebuilds=2\) are used up\.")):
        twice._check(told, RuntimeError())
    for fixed in ("rollout.weight_transfer=broadcast", "placement.mode=colocated"):
        with pytest.raises(FleetExhausted, match=ended.format(f"{fixed}.* nobody can be replaced\\.")):
            recovery(fixed)._check(told, RuntimeError())


def test_who_starts_anew_with_other_weights_is_named(tmp_path):
    recovery = Recovery(SimpleNamespace(config=None, roles=SimpleNamespace(models={})), {})
    recovery._digests = {"reference": ["a1", "a1"]}
    recovery._compare("reference", ["a1", "a1"])
    with pytest.raises(RuntimeError, match=r"reference has other weights than at the first start .*a1.* model folder was"):
        recovery._compare("reference", ["a1", "b2"])
