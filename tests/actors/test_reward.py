"""Sources of rewards: what they get, what they may give, and what happens when they fail. No Ray: plain classes."""

from __future__ import annotations

import asyncio
import os
import time

import pytest
import torch

from actors.reward_child import load_reward_function
from actors.reward_source import SourceActor
from jobs.ppo_rewards import RewardScales, check_failures, step_metrics
from rayllm.config.reward import EnvironmentSource, FunctionSource, RewardConfig, VerifierSource
from rayllm.data.rollout import Rollout, SampledTurn, collate
from rayllm.data.scores import mixed, sample_ids_of
from rayllm.errors import InputError, RewardError
from rayllm.sandbox import check_sandbox
from tests.actors import reward_functions as functions

ROWS = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]


BAD = {
    "raises": r"raised KeyError: 'no such key' \(response 0/1; 3 of 3 failed\)",
    "nan_for_the_second": r"returned nan, expected a finite number \(response 0/0; 1 of 3 failed\)",
    "one_too_few": "returned 2 values, expected a sequence of 3 finite numbers, one a response",
    "words": "returned 'good' among its values, expected a sequence of 3 finite numbers",
    "sleeps": r"did not answer within timeout_s=1 and was cut off",
    "sleeps_async": r"did not answer within timeout_s=1 and was cut off",
    "never_gives_the_interpreter_back": r"did not answer within timeout_s=1 and was cut off",
    "exits": "ended its process with the status 3",
}
"""Function -> what is said of it."""


@pytest.fixture
def make(tiny_model_dir):
    made = []

    def actor(source, rows=ROWS) -> SourceActor:
        if isinstance(source, str):
            source = function(source)
        made.append(SourceActor(name="mine", source=source, tokenizer=str(tiny_model_dir), rows=rows))
        return made[-1]

    yield actor
    for one in made:
        if hasattr(one.scorer, "stop"):
            one.scorer.stop()


def function(name: str, **settings) -> FunctionSource:
    return FunctionSource(function=f"{functions.__name__}:{name}", **settings)


def scores(actor: SourceActor, shard, rows=None):
    return asyncio.run(actor.scores(shard, rows))


@pytest.fixture(scope="module")
def shard(tiny_tokenizer):
    """Three responses of unequal length, to prompts 1, 0 and 0; the first ends its turn."""
    say = tiny_tokenizer.encode
    end = tiny_tokenizer.eos_token_id
    given = [(1, "What colour?", [*say(" white"), end]), (0, "France", say("Paris is")), (0, "France", say(" Paris"))]
    rollouts = [
        Rollout(
            prompt_id=prompt_id,
            prompt_token_ids=tuple(say(prompt)),
            token_ids=tuple(response),
            logprobs=(0.0,) * len(response),
            finish_reason="stop",
            policy_versions=(0,) * len(response),
        )
        for prompt_id, prompt, response in given
    ]
    return collate(rollouts, pad_token_id=tiny_tokenizer.pad_token_id)


def test_a_function_gets_text_tokens_and_rows_of_every_response(make, shard):
    found = scores(make("first_tokens"), shard)
    firsts = [row[mask][0].item() for row, mask in zip(shard.sequences, shard.action_mask, strict=True)]
    assert found.values.tolist() == firsts and found.values.dtype == torch.float32
    assert (found.source, found.sample_ids, found.num_failures) == ("mine", ("1/0", "0/0", "0/1"), 0)


def test_an_async_function_keeps_its_loop_and_its_process(make, shard):
    actor = make("loops_seen")
    assert [scores(actor, shard).values.tolist() for _ in range(2)] == [[1.0] * 3] * 2
    actor = make("process_id")
    first, second = (scores(actor, shard).values[0].item() for _ in range(2))
    assert first == second != os.getpid()


def test_answers_by_sample_id_may_come_in_any_order(make, shard):
    assert scores(make("by_id"), shard).values.tolist() == [2.0, 1.0, 1.0]


def test_held_out_responses_are_scored_with_their_own_rows(make, shard):
    assert scores(make("by_id"), shard, [{"answer": "7"}, {"answer": "9"}]).values.tolist() == [9.0, 7.0, 7.0]


def test_what_the_turns_earned_comes_on_top(make, tiny_tokenizer):
    turns = tuple(SampledTurn(start=a, end=b, reward=0.5) for a, b in [(0, 2), (3, 4)])
    rollout = Rollout(
        prompt_id=0, prompt_token_ids=(5,), token_ids=(6, 7, 8, 9), logprobs=(0.0,) * 3, finish_reason="stop",
        policy_versions=(0,) * 3, turns=turns,
    )  # fmt: skip
    shard = collate([rollout], pad_token_id=tiny_tokenizer.pad_token_id)
    found = [scores(make(source), shard) for source in ("process_id", EnvironmentSource())]
    pid = found[0].values.item()
    assert mixed(shard, [found[0]], {"mine": (pid - 3, 1.0, 2.0)}).tolist() == [7.0]
    assert mixed(shard, [found[1]], {"mine": (0.0, 1.0, 1.0)}).tolist() == [1.0]


@pytest.mark.parametrize("name", BAD)
@pytest.mark.scorecard("R11", "R20", "R50")
def test_a_bad_function_stops_the_run_with_its_name_and_what_it_did(make, shard, name):
    actor = make(function(name, timeout_s=1))
    with pytest.raises(RewardError, match=rf"reward source mine \(function=.*:{name}\) {BAD[name]}.*; on_failure=stop"):
        scores(actor, shard)


@pytest.mark.parametrize("name", ["raises", "sleeps", "never_gives_the_interpreter_back", "exits"])
@pytest.mark.parametrize(("policy", "value"), [("drop", torch.nan), ("zero", 0.0)])
@pytest.mark.scorecard("R11", "R20")
def test_a_failed_call_is_dropped_or_zero_and_told(make, shard, name, policy, value):
    actor = make(function(name, timeout_s=1, on_failure=policy))
    found = scores(actor, shard)
    torch.testing.assert_close(found.values, torch.full((3,), value), equal_nan=True)
    assert found.num_failures == 3 and BAD[name].split(r" \(")[0] in found.problem


@pytest.mark.scorecard("R50")
def test_one_bad_value_is_dropped_alone(make, shard):
    found = scores(make(function("nan_for_the_second", on_failure="drop")), shard)
    torch.testing.assert_close(found.values, torch.tensor([1.0, torch.nan, 3.0]), equal_nan=True)
    assert found.num_failures == 1 and scores(make(function("nan_for_the_second", on_failure="zero")), shard).values[1] == 0


@pytest.mark.scorecard("R11")
def test_retry_asks_again_and_then_stops(make, shard, tmp_path):
    rows = [{"path": str(tmp_path / "once")}] * 2
    assert scores(make(function("fails_once", on_failure="retry"), rows), shard).values.tolist() == [7.0] * 3
    with pytest.raises(RewardError, match="raised KeyError: .* after 1 retries; on_failure=retry"):
        scores(make(function("raises", on_failure="retry", retries=1)), shard)


@pytest.mark.scorecard("R20")
def test_a_source_that_hangs_does_not_hold_up_the_others(make, shard):
    """Nor itself: the call after it goes to a new process."""
    hangs, works = make(function("sleeps", timeout_s=2, on_failure="drop")), make("by_id")

    async def both():
        await works.setup()
        slow = asyncio.create_task(hangs.scores(shard))
        others = [await works.scores(shard) for _ in range(5)]
        assert not slow.done()
        return others, await slow, await hangs.scores(shard)

    others, first, second = asyncio.run(both())
    assert all(found.values.tolist() == [2.0, 1.0, 1.0] for found in others)
    assert first.num_failures == second.num_failures == 3


@pytest.mark.scorecard("R11")
def test_a_child_ends_with_its_actor(tmp_path):
    import subprocess
    import sys

    from tests.conftest import ROOT

    code = (
        "import asyncio, sys; from actors.reward_child import Child; from rayllm.config.reward import FunctionSource\n"
        f"child = Child(FunctionSource(function='{functions.__name__}:sleeps')); asyncio.run(child.start())\n"
        "print(child._process.pid, flush=True); import os; os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    pid = int(done.stdout)
    for _ in range(100):
        state = _state(pid)
        if state in (None, "Z"):
            return
        time.sleep(0.1)
    pytest.fail(f"the child lives on: {state}")


def _state(pid: int) -> str | None:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0]
    except OSError:
        return None


def test_verifiers_read_the_rows_column(make, shard):
    rows = [{"right": "Paris", "answer": 1}, {"right": "black", "answer": 1}]
    source = VerifierSource(verifier="exact", column="right")
    assert scores(make(source, rows), shard).values.tolist() == [0.0, 0.0, 1.0]
    longest = VerifierSource(verifier="length", max_tokens=int(shard.action_mask.sum(1).max()) - 1)
    counts = shard.action_mask.sum(1)
    assert scores(make(longest), shard).values.tolist() == (counts < counts.max()).float().tolist()


@pytest.mark.scorecard("S16", "S17")
def test_programs_that_mean_harm_get_nothing_and_the_others_their_reward(make, tiny_tokenizer):
    try:
        check_sandbox()
    except InputError as error:
        pytest.skip(str(error))
    texts = [
        "import time\ntime.sleep(1000)", "import socket\nsocket.create_connection(('127.0.0.1', 22))",
        "import os\nwhile True: os.fork()", "f = open('/tmp/x', 'wb')\nwhile True: f.write(b'x' * 10**6)",
        "x = []\nwhile True: x.append(bytearray(10**6))", "print('success')\nraise SystemExit(0)",
        "Here it is:\n```python\ndef one():\n    return 1\n```",
    ]  # fmt: skip
    rollouts = [
        Rollout(
            prompt_id=0, prompt_token_ids=(5,), token_ids=tuple(ids), logprobs=(0.0,) * len(ids), finish_reason="stop",
            policy_versions=(0,) * len(ids),
        )
        for ids in map(tiny_tokenizer.encode, texts)
    ]  # fmt: skip
    source = VerifierSource(verifier="code", column="tests", cpu_s=1, memory_mb=256)
    found = scores(make(source, [{"tests": ["assert one() == 1"]}]), collate(rollouts, pad_token_id=0))
    assert found.values.tolist() == [0.0] * 6 + [1.0] and found.num_failures == 0


def test_a_verifier_fails_on_a_right_answer_that_it_cannot_read(make, shard):
    source = VerifierSource(verifier="math", on_failure="stop")
    with pytest.raises(RewardError, match="verifier=math.* raised ValueError: no number or expression in the right answer"):
        scores(make(source, [{"answer": "one"}] * 2), shard)


def test_running_moments_follow_a_source_and_survive_a_checkpoint(make, shard):
    config = RewardConfig(sources={
        "a": {"kind": "function", "function": "m:f", "normalize": "running"},
        "b": {"kind": "verifier", "verifier": "length", "weight": 0.5},
    })  # fmt: skip
    found = [scores(make("by_id"), shard)]
    (part,) = SourceActor.stats(*found)
    part.sources["a"] = part.sources["b"] = part.sources.pop("mine")
    scales = RewardScales(config)
    assert scales.needs_all and scales.mix() == {"a": (0.0, 1.0, 1.0), "b": (0.0, 1.0, 0.5)}
    scales.add([part, part])
    other = RewardScales(config)
    other.load(scales.state())
    mean, std, weight = other.mix()["a"]
    assert (mean, weight) == (pytest.approx(4 / 3), 1.0) and std == pytest.approx((2 / 9) ** 0.5)
    assert other.mix()["b"] == (0.0, 1.0, 0.5) and other.mix(running=False)["a"] == (0.0, 1.0, 1.0)


@pytest.mark.scorecard("R50")
def test_every_source_is_logged_by_itself_and_a_step_without_responses_stops(make, shard):
    sources = make(function("raises", on_failure="drop")), make("by_id")
    dropped, fine = SourceActor.stats(*(scores(source, shard) for source in sources))
    metrics = step_metrics([fine, dropped])
    assert metrics == {
        "reward/mine/mean": pytest.approx(4 / 3), "reward/mine/std": pytest.approx((2 / 9) ** 0.5),
        "reward/mine/failures": 3.0,
    }  # fmt: skip
    any_number = {"mine": function("raises", on_failure="drop")}
    check_failures([fine, dropped], any_number)
    few = {"mine": function("raises", on_failure="drop", max_failed=0.4)}
    with pytest.raises(RewardError, match=r"mine failed on 3 of the step's 6 responses, more than max_failed=0.4 of them: .*KeyError"):
        check_failures([fine, dropped], few)
    with pytest.raises(RewardError, match="no response of the step is left to learn from: reward source mine .*KeyError"):
        check_failures([dropped, dropped], any_number)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("reward", "got 'reward', expected module:name"),
        ("no.such.module:f", "cannot import no.such.module"),
        (f"{functions.__name__}:no_such", f"module {functions.__name__} has no no_such"),
        (f"{functions.__name__}:loops", "expected a function"),
    ],
)
def test_what_cannot_be_loaded_is_named(make, path, message):
    with pytest.raises(InputError, match=f"reward.function: .*{message}"):
        load_reward_function(path)
    with pytest.raises(InputError, match=f"reward.function: .*{message}"):
        asyncio.run(make(FunctionSource(function=path)).setup())


def test_sample_ids_are_those_of_the_shard(shard):
    assert sample_ids_of(shard.prompt_ids) == ("1/0", "0/0", "0/1")
