"""Rewards by a Python function: what it gets, and what it may return."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from actors.reward import FunctionRewardActor, checked_rewards, load_reward_function
from rayllm.data.rollout import Rollout, SampledTurn, collate
from rayllm.errors import InputError

ROWS = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]
seen: list[tuple] = []
loops: set[asyncio.AbstractEventLoop] = set()


def first_tokens(prompts, responses, token_ids, rows):
    seen.append((prompts, responses, token_ids, rows))
    return [ids[0] for ids in token_ids]


async def answers(prompts, responses, token_ids, rows):
    await asyncio.sleep(0)
    loops.add(asyncio.get_running_loop())
    return np.array([float(row["answer"]) for row in rows])


def broken(prompts, responses, token_ids, rows):
    return {}["no such key"]


@pytest.fixture(scope="module")
def make(tiny_model_dir):
    def made(name: str) -> FunctionRewardActor:
        return FunctionRewardActor(function=f"{__name__}:{name}", tokenizer=str(tiny_model_dir), rows=ROWS)

    return made


@pytest.fixture(scope="module")
def shard(tiny_tokenizer):
    """Two responses of unequal length, to prompts 1 and 0; the first ends its turn."""
    say = tiny_tokenizer.encode
    end = tiny_tokenizer.eos_token_id
    rollouts = [
        Rollout(
            prompt_id=prompt_id,
            prompt_token_ids=tuple(say(prompt)),
            token_ids=tuple(response),
            logprobs=(0.0,) * len(response),
            finish_reason="stop",
            policy_versions=(0,) * len(response),
        )
        for prompt_id, prompt, response in [(1, "What colour?", [*say(" white"), end]), (0, "France", say("Paris is"))]
    ]
    return collate(rollouts, pad_token_id=tiny_tokenizer.pad_token_id)


def test_a_function_gets_text_tokens_and_rows_of_every_response(make, shard, tiny_tokenizer):
    seen.clear()
    rewards = make("first_tokens").rewards(shard)
    ((prompts, responses, token_ids, rows),) = seen
    assert prompts == ["What colour?", "France"] and responses == ["white", "Paris is"]
    assert token_ids[0][-1] == tiny_tokenizer.eos_token_id and token_ids[1] == tiny_tokenizer.encode("Paris is")
    assert rows == [ROWS[1], ROWS[0]]
    assert rewards.tolist() == [ids[0] for ids in token_ids] and rewards.dtype == torch.float32


def test_an_async_function_keeps_its_loop_from_call_to_call(make, shard):
    loops.clear()
    actor = make("answers")
    assert actor.rewards(shard).tolist() == actor.rewards(shard).tolist() == [2.0, 1.0]
    assert len(loops) == 1


def test_held_out_responses_are_scored_with_their_own_rows(make, shard):
    rows = [{"answer": "7"}, {"answer": "9"}]
    assert make("answers").held_out_rewards(shard, rows).tolist() == [9.0, 7.0]


def test_what_the_turns_earned_comes_on_top_and_observations_are_not_the_policys(make, tiny_tokenizer):
    turns = tuple(SampledTurn(start=a, end=b, reward=0.5) for a, b in [(0, 2), (3, 4)])
    rollout = Rollout(
        prompt_id=0, prompt_token_ids=(5,), token_ids=(6, 7, 8, 9), logprobs=(0.0,) * 3, finish_reason="stop",
        policy_versions=(0,) * 3, turns=turns,
    )  # fmt: skip
    seen.clear()
    rewards = make("first_tokens").rewards(collate([rollout], pad_token_id=tiny_tokenizer.pad_token_id))
    assert seen[0][2] == [[6, 7, 9]] and rewards.tolist() == [7.0]


def test_a_function_that_raises_is_named(make, shard):
    with pytest.raises(RuntimeError, match=r"reward.function=.*:broken raised KeyError: 'no such key'"):
        make("broken").rewards(shard)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([1.0, 2.0], r"returned the shape \(2,\), expected a sequence of 3 finite numbers, one a response"),
        (1.0, r"returned the shape \(\), expected"),
        ([[1.0]] * 3, r"returned the shape \(3, 1\), expected"),
        ([1.0, float("nan"), 2.0], r"returned nan for response 1, expected"),
        ([1e300, 0.0, 2.0], r"returned inf for response 0, expected"),
        (None, r"returned None, expected"),
        ("123", r"returned '123', expected"),
        ([1.0, None, 2.0], r"returned \[1.0, None, 2.0\], expected"),
    ],
)
def test_what_is_not_one_finite_number_a_response_is_refused(found, message):
    with pytest.raises(RuntimeError, match=f"reward.function=m:f {message}"):
        checked_rewards(found, count=3, name="m:f")


@pytest.mark.parametrize("found", [[1, True, 2.5], np.array([1, 1, 2.5]), torch.tensor([1.0, 1.0, 2.5])])
def test_sequences_of_numbers_of_any_kind_are_taken(found):
    assert checked_rewards(found, count=3, name="m:f").tolist() == [1.0, 1.0, 2.5]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("reward", "got 'reward', expected module:name"),
        ("no.such.module:f", "cannot import no.such.module"),
        (f"{__name__}:no_such", f"module {__name__} has no no_such"),
        (f"{__name__}:ROWS", "expected a function"),
    ],
)
def test_what_cannot_be_loaded_is_named(path, message):
    with pytest.raises(InputError, match=f"reward.function: .*{message}"):
        load_reward_function(path)
