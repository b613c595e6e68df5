"""What is not a number is told where it is from; edge cases of a batch learn nothing and break nothing."""

from __future__ import annotations

import math

import pytest
import torch

from actors.policy import PolicyActor
from jobs.ppo import check_mismatch
from jobs.ppo_watch import PATIENCE, Watch
from rayllm.algorithms.kinds import ADVANTAGE_KINDS
from rayllm.config.base import load_config
from rayllm.config.ppo import PPOConfig
from rayllm.data.rollout import Rollout, collate
from rayllm.data.scores import Scores, sample_ids_of
from rayllm.models.engine import TooManySkipped

PAD, END = 0, 2
MIX = {"gold": (0.0, 1.0, 1.0)}


def policy_of(tmp_path, model, *overrides) -> PolicyActor:
    keys = [
        f"run_dir={tmp_path}", f"model={model}", "prompts=unused", "reward.source=gold", "prompts_per_step=4",
        "samples_per_prompt=2", "algorithm.num_minibatches=1", *overrides,
    ]  # fmt: skip
    return PolicyActor(rank=0, world_size=1, config=load_config(PPOConfig, None, keys).config)


def batch(*responses: tuple[int, tuple[int, ...], str]):
    """(prompt id, token ids, finish reason) each."""
    rollouts = [
        Rollout(
            prompt_id=prompt_id, prompt_token_ids=(5, 6), token_ids=ids, logprobs=(-1.0,) * len(ids),
            finish_reason=reason, policy_versions=(0,) * len(ids),
        )
        for prompt_id, ids, reason in responses
    ]  # fmt: skip
    return collate(rollouts, pad_token_id=PAD)


EDGES = {
    "the end as first token": [(0, (END,), "stop"), (0, (END,), "stop"), (1, (7, END), "stop"), (1, (END,), "stop")],
    "all cut": [(0, (7, 8, 9), "length"), (0, (8, 9, 7), "length"), (1, (9,), "length"), (1, (7,), "length")],
    "nothing sampled": [(0, (), "stop"), (0, (7, END), "stop"), (1, (), "length"), (1, (), "length")],
}


@pytest.mark.scorecard("R49")
@pytest.mark.parametrize("advantage", ADVANTAGE_KINDS)
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("rewards", ["equal", "apart"])
def test_edge_cases_give_numbers_and_equal_rewards_teach_nothing(tmp_path, tiny_model_dir, advantage, edge, rewards):
    policy = policy_of(
        tmp_path, tiny_model_dir, f"algorithm.advantage={advantage}", "algorithm.kl_coef=0",
        "shaping.missing_eos_penalty=0", "algorithm.gae_lambda=1.0",
    )  # fmt: skip
    shard = batch(*EDGES[edge])
    given = torch.ones(4) if rewards == "equal" else torch.tensor([0.0, 1.0, 2.0, 3.0])
    zeros = torch.zeros(shard.sequences.shape)
    kind = ADVANTAGE_KINDS[advantage]
    ids = sample_ids_of(shard.prompt_ids)
    scores = Scores("gold", ids, given)
    scored = [scores, shard, scores] if kind.needs_greedy_baseline else [scores]
    values = zeros if kind.needs_critic else None
    found = policy.experience(shard, zeros, None, values, *scored, mix=MIX, kl_coef=0.0)
    assert found.advantages.isfinite().all() and found.returns.isfinite().all()
    assert not found.advantages[~found.action_mask].any()
    if rewards == "equal" and (kind.needs_groups or kind.needs_greedy_baseline):
        assert not found.advantages.any()
    assert len(found) == 4


@pytest.mark.scorecard("R52")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("place", "name"),
    [("logprobs", "the policy's log-probabilities"), ("ref", "the reference's log-probabilities"),
     ("values", "the critic's values"), ("sampler", "the sampler's log-probabilities")],
)  # fmt: skip
def test_what_is_no_number_is_named_by_its_source_and_prompts(tmp_path, tiny_model_dir, place, name, bad):
    policy = policy_of(tmp_path, tiny_model_dir)
    shard = batch((4, (7, 8), "stop"), (4, (7,), "stop"), (9, (7, 8, 9), "stop"), (11, (7,), "stop"))
    tensors = {key: torch.zeros(shard.sequences.shape) for key in ("logprobs", "ref", "values", "sampler")}
    tensors[place][2, 3] = bad
    tensors[place][1, 4] = bad  # behind the end of a response: no action, and none of our business
    shard = shard.replace(rollout_logprobs=tensors["sampler"])
    with pytest.raises(RuntimeError, match=rf"{name} are not finite for 1 of 4 responses, of the prompts \[9\]: nothing was"):
        scores = Scores("gold", sample_ids_of(shard.prompt_ids), torch.zeros(4))
        policy.experience(
            shard, tensors["logprobs"], tensors["ref"], tensors["values"], scores, mix=MIX, kl_coef=0.1
        )


@pytest.mark.scorecard("R51")
def test_too_many_skipped_steps_end_with_the_prompts_of_the_last(tmp_path, tiny_model_dir):
    class Skipping:
        def update(self, parts, loss, *, learning_rate):
            raise TooManySkipped("the loss is nan on rank 0: 4 optimizer steps in a row were skipped")

    policy = policy_of(tmp_path, tiny_model_dir)
    policy.engine = Skipping()
    parts = [batch((4, (7,), "stop"), (9, (7,), "stop")), batch((4, (8,), "stop"))]
    with pytest.raises(RuntimeError, match=r"4 optimizer steps in a row.*; prompts of this rank in the last one: \[4, 9\]"):
        policy.optimize(parts, lambda part: part, batch=parts, learning_rate=0.1)


@pytest.mark.scorecard("R55")
@pytest.mark.parametrize("mismatch", [0.02, math.nan, math.inf])
def test_a_sampler_that_disagrees_stops_the_run_at_its_first_step(mismatch):
    check_mismatch({"rollout/logprob_mismatch": 0.01}, 0.01)
    check_mismatch({}, 0.01)  # every token is of older weights
    with pytest.raises(RuntimeError, match="sampler and learner disagree by .* nats a token"):
        check_mismatch({"rollout/logprob_mismatch": mismatch}, 0.01)


class Told:
    """Takes the place of run, progress and console: keeps what is said."""

    def __init__(self):
        self.said = []
        self.console = self

    def note(self, text):
        self.said.append(text)

    def print(self, text, **_):
        self.said.append(text)


@pytest.mark.scorecard("R54")
@pytest.mark.parametrize("on_alarm", ["note", "stop"])
def test_alarms_are_told_and_end_the_run_if_asked_to(tmp_path, tiny_model_dir, on_alarm):
    watch = Watch.__new__(Watch)
    watch.config = policy_of(tmp_path, tiny_model_dir, f"on_alarm={on_alarm}").config
    watch.job = watch.progress = told = Told()
    watch._alarming = 0
    for step in range(PATIENCE - 1):
        watch._heed(step, ["entropy: 0"])
    watch._heed(5, [])  # one good step, and the count begins anew
    for step in range(PATIENCE - 1):
        watch._heed(step, ["entropy: 0"])
    assert len(told.said) == 2 * 2 * (PATIENCE - 1)
    if on_alarm == "note":
        watch._heed(9, ["entropy: 0"])
        return
    with pytest.raises(RuntimeError, match="on_alarm=stop: 3 steps in a row: entropy: 0"):
        watch._heed(9, ["entropy: 0"])
