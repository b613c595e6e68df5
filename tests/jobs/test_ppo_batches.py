"""What the steps of a run train on: the order of prompts, how far ahead, who samples. Real Ray, actors without models."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
import ray
import torch

from actors.fleet import RolloutFleet, generate
from actors.group import ActorGroup, Role
from actors.health import Deadlines
from actors.proof import Prover
from actors.rollout import RolloutActor
from actors.supervisor import Blueprint, Size
from actors.watched import shell
from jobs.ppo_batches import Batches
from jobs.ppo_rewards import RewardGroups
from rayllm.config.base import load_config
from rayllm.config.ppo import PPOConfig
from rayllm.data.experience import concat
from rayllm.data.prompts import PromptData, PromptSpan, PromptStream
from rayllm.data.rollout import Rollout, collate

NUM_PROMPTS, STEPS = 20, 9
SLOW = 3
"""The prompt with this id takes long."""


def rollout_of(prompt_id: int, *, step: int) -> Rollout:
    """As long as its prompt's id says."""
    tokens = tuple(range(1, prompt_id + 2))
    return Rollout(
        prompt_id=prompt_id, prompt_token_ids=(5,), token_ids=tokens, logprobs=tuple(-0.5 * token for token in tokens),
        finish_reason="stop", policy_versions=(step,) * len(tokens),
    )  # fmt: skip


class Sampler(Prover):
    """Takes the place of a rollout actor: tells what it was asked, and under which weights."""

    def __init__(self, rank: int) -> None:
        self.rank, self.version = rank, 0

    async def set_version(self, version: int) -> None:
        self.version = version

    async def experience(self, span, *, step, again=0):
        prompt_ids = PromptStream(NUM_PROMPTS, seed=0).ids(span)
        await asyncio.sleep(0.3 if SLOW in prompt_ids else 0.0)
        return {"prompts": prompt_ids, "step": step, "version": self.version, "rank": self.rank, "again": again}

    async def batch(self, span, *, step):
        prompt_ids = PromptStream(NUM_PROMPTS, seed=0).ids(span)
        return collate([rollout_of(prompt_id, step=step) for prompt_id in prompt_ids], pad_token_id=0)

    async def generate(self, prompts, *, num_samples, temperature, max_new_tokens, step):
        await asyncio.sleep(0.5 if (self.rank, step) == (0, 1) else 0.01)
        return [(prompt_id, self.rank) for prompt_id, _ in prompts]


class Scorer:
    async def scores(self, shard):
        return shard["prompts"]


@pytest.fixture(scope="module")
def groups(local_ray):
    engines = Blueprint(Role("rollout", 2, 0.1, 0), shell(Sampler), lambda number: {"rank": number})
    sampler = RolloutFleet(engines, Size(2, 2, 2, 0, 0.0), Deadlines(60.0, 60.0))
    scorer = ActorGroup(Role("reward", 1, 0.1, 0), Scorer, lambda rank: {})
    yield sampler, scorer
    for group in (sampler, scorer):
        group.stop()


@pytest.fixture
def make(groups, tmp_path):
    """Batches over two samplers, from a few settings."""
    sampler, scorer = groups
    sampler.sync(Sampler.set_version, 0)

    def batches(*settings: str) -> Batches:
        keys = [f"run_dir={tmp_path}", "model=m", "reward_model=r", "prompts=p", "prompts_per_step=4",
                f"num_steps={STEPS}", "rollout.num_actors=2"]  # fmt: skip
        config = load_config(PPOConfig, None, [*keys, *settings]).config
        roles = SimpleNamespace(rollout=sampler, reward=RewardGroups(config.reward, {"model": scorer}))
        return Batches(roles, PromptData([{}] * NUM_PROMPTS, [[1]] * NUM_PROMPTS, {}), config)

    return batches


def train(batches: Batches, steps: range) -> list[dict]:
    """Take and "learn" steps; returns what the shards tell, with the step that trained on them."""
    found = []
    for step in steps:
        shards, scores = batches.take(step)
        told = ray.get(shards)
        assert ray.get([one for (one,) in scores]) == [shard["prompts"] for shard in told]
        batches.roles.rollout.sync(Sampler.set_version, step + 1)
        found += [shard | {"trained": step} for shard in told]
    return found


def prompts_of(shards: list[dict]) -> list[int]:
    return [prompt for shard in shards for prompt in shard["prompts"]]


def expected_prompts() -> list[int]:
    stream = PromptStream(NUM_PROMPTS, seed=0)
    return [prompt for _ in range(STEPS) for prompt in stream.ids(stream.take(4))]


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_prompts_come_in_order_and_no_older_than_the_bound(make, lag):
    shards = train(make(f"max_policy_lag={lag}"), range(STEPS))
    assert prompts_of(shards) == expected_prompts()
    assert [shard["step"] for shard in shards] == [shard["trained"] for shard in shards]
    assert max(shard["trained"] - shard["version"] for shard in shards) == lag


@pytest.mark.parametrize("cut_tail", ["false", "true"])
@pytest.mark.scorecard("R60")
def test_every_prompt_is_trained_on_once_whatever_happens(make, cut_tail):
    """Shards with a slow prompt are carried over, a run is cut off and continued: nothing is lost, nothing twice."""
    settings = ("max_policy_lag=2", f"rollout.cut_tail={cut_tail}")
    first = make(*settings)
    shards = train(first, range(4))
    second = make(*settings)
    second.load(first.state())
    shards += train(second, range(4, STEPS))
    assert sorted(prompts_of(shards)) == sorted(expected_prompts())
    assert all(shard["trained"] - shard["version"] <= 2 for shard in shards)
    overtook = any(shard["trained"] < shard["step"] for shard in shards)
    assert overtook == (cut_tail == "true")


@pytest.mark.parametrize("settings", [("max_policy_lag=0",), ("max_policy_lag=2", "rollout.cut_tail=true")])
@pytest.mark.parametrize("score", [False, True])
def test_a_step_that_begins_again_has_the_same_responses(make, settings, score):
    batches = make(*settings)
    shards = train(batches, range(3))
    first, scores = batches.take(3)
    batches.more([2], 3)
    batches.put_back(score=score)
    under_way = [shard.experience for shard in batches._ahead]
    ray.wait(under_way, num_returns=len(under_way))  # others than those of the step could be taken by now
    again, anew = batches.take(3)
    assert again == first and (anew == scores) == (not score)
    assert ray.get([one for (one,) in anew]) == [shard["prompts"] for shard in ray.get(again)]
    batches.put_back(score=score)
    shards += train(batches, range(3, STEPS))
    assert sorted(prompts_of(shards)) == sorted(expected_prompts())


def test_spare_prompts_of_the_next_epoch_are_sampled_with_other_seeds(make):
    """They may be in the step already, and with the same seeds their responses would be the same."""
    batches, steps = make("max_policy_lag=0"), NUM_PROMPTS // 4
    for step in range(steps - 1):
        batches.take(step)
    shards, _ = batches.take(steps - 1)
    (spare,) = ray.get(batches.more([NUM_PROMPTS], steps - 1))
    assert set(spare["prompts"]) > set(prompts_of(ray.get(shards))) and spare["again"] == 1
    batches = make("max_policy_lag=0")
    shards, _ = batches.take(0)
    (spare,) = ray.get(batches.more([3], 0))
    assert {shard["again"] for shard in ray.get(shards)} == {spare["again"]} == {0}


def test_a_shard_of_many_engines_holds_what_they_sampled_in_the_order_of_the_prompts(make):
    """Eight engines are planned, two are there: two shards of four pieces."""
    batches = make("rollout.num_actors=8", "prompts_per_step=12")
    config = batches.config
    assert (config.num_shards, config.pieces_per_shard) == (2, 4)
    spans = PromptStream(NUM_PROMPTS, seed=0).take(12).split(config.num_shards)
    shards = ray.get(batches.roles.rollout.submit_joined(
        Sampler.batch, [span.split(config.pieces_per_shard) for span in spans],
        tokens=[[1] * config.pieces_per_shard] * config.num_shards, join=concat, step=3,
    ))  # fmt: skip
    order = PromptStream(NUM_PROMPTS, seed=0)
    for shard, span in zip(shards, spans, strict=True):
        prompt_ids = order.ids(span)
        assert shard.prompt_ids.tolist() == prompt_ids
        whole = collate([rollout_of(prompt_id, step=3) for prompt_id in prompt_ids], pad_token_id=0)
        assert all(torch.equal(getattr(shard, name), getattr(whole, name)) for name in ("sequences", "rollout_logprobs"))


@pytest.mark.scorecard("R19", partly=True)
def test_work_goes_to_the_actor_with_the_fewest_tokens_before_it(make):
    roles = make().roles
    order = PromptStream(NUM_PROMPTS, seed=0)
    place = order.ids(PromptSpan(0, 0, NUM_PROMPTS)).index(SLOW)
    work = [PromptSpan(0, start % NUM_PROMPTS, 1) for start in (place + 1, place, place + 2, place + 3)]
    tokens = [10, 100, 10, 20]
    found = ray.get(roles.rollout.submit(RolloutActor.experience, work, tokens=tokens, step=0))
    assert [shard["prompts"] for shard in found] == [order.ids(span) for span in work]
    first, longest, *others = [shard["rank"] for shard in found]
    assert {first, *others} == {1 - longest}  # calls of an async actor may begin in another order than they were made


@pytest.mark.scorecard("R19", partly=True)
def test_the_actor_that_is_done_first_gets_the_next_prompts(make):
    prompts = [(index, [1]) for index in range(2_000)]
    done: list[int] = []
    found = generate(
        make().roles.rollout, prompts, num_samples=1, temperature=1.0, max_new_tokens=1, step=1, on_done=done.append
    )
    assert [index for index, _ in found] == list(range(2_000))
    assert sum(rank == 0 for _, rank in found) < 500
    assert done == sorted(done) and done[-1] == 2_000
