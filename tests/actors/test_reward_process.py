"""A process reward model: its loss, and what a source of its kind gives to single steps. No Ray: plain classes."""

from __future__ import annotations

import asyncio
import math

import pytest
import torch

from actors.reward_source import SourceActor
from jobs.process_reward_model import ProcessRewardModelTask
from rayllm.algorithms.rewards import per_token_rewards
from rayllm.config.base import load_config
from rayllm.config.ppo import PPOConfig
from rayllm.config.process_reward_model import ProcessRewardModelConfig
from rayllm.config.reward import ProcessSource
from rayllm.data.rollout import Rollout, collate
from rayllm.data.scores import Scores, mixed, sample_ids_of, with_step_rewards
from rayllm.data.steps import LabelledSteps
from rayllm.errors import InputError
from rayllm.models.heads import ScalarModel
from rayllm.models.loading import save_model


class OneRank:
    """What the task asks of an engine."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def __init__(self, module):
        self.module = module

    def __call__(self, **inputs):
        return self.module(**inputs)

    def sum_tensor(self, tensor):
        return tensor


@pytest.fixture
def task(tmp_path, tiny_model_dir, tiny_tokenizer):
    def row(text, labels):
        ids = [tiny_tokenizer.encode(part) for part in text]
        ends = [sum(map(len, ids[: i + 1])) - 1 for i in range(len(ids))]
        return LabelledSteps(torch.tensor([i for part in ids for i in part]).numpy(), ends, labels)

    rows = [row(["Snow\n", "Paris is\n", "x"], [True, False, True]), row(["What?"], [False]), row(["a\n", "bc"], [True] * 2)]
    keys = [f"run_dir={tmp_path}", f"model={tiny_model_dir}", "steps=s", "heldout_steps=h", "batch_size=3"]
    config = load_config(ProcessRewardModelConfig, None, [*keys, "micro_batch_size=2"]).config
    return ProcessRewardModelTask(config, rows, rows, int(tiny_tokenizer.pad_token_id), 10)


def naive_loss(task, module):
    losses = []
    for row in task.train:
        for end, label in zip(row.ends, row.labels, strict=True):
            ids = torch.as_tensor(row.token_ids[: end + 1])[None]  # the step's end sees nothing behind it
            p = module(input_ids=ids, attention_mask=torch.ones_like(ids).bool())[0, -1].double().sigmoid()
            losses.append(-torch.log(p if label else 1 - p))
    return float(torch.stack(losses).mean())


def test_the_loss_is_the_mean_cross_entropy_of_the_steps_however_it_is_split(task):
    engine = OneRank(task.build())
    expected = naive_loss(task, engine.module)
    one_rank = [float(task.loss(engine, part).detach()) for part in task.micro_batches(0, 0, 1)]
    two_ranks = [float(task.loss(engine, part).detach()) for rank in (0, 1) for part in task.micro_batches(0, rank, 2)]
    assert len(one_rank) == 2 and sum(one_rank) == pytest.approx(expected, rel=1e-5)
    assert sum(two_ranks) == pytest.approx(expected, rel=1e-5)
    found = task.evaluate(engine)
    assert found["eval/loss"] == pytest.approx(expected, rel=1e-5) and found["eval/right_steps"] == pytest.approx(4 / 6)


def test_it_learns_which_steps_are_right(task):
    engine = OneRank(task.build())
    optimizer = torch.optim.Adam(engine.module.parameters(), lr=3e-3)
    for step in range(30):
        optimizer.zero_grad()
        for part in task.micro_batches(step, 0, 1):
            task.loss(engine, part).backward()
        optimizer.step()
    assert task.evaluate(engine)["eval/accuracy"] == 1.0


@pytest.fixture
def folder(task, tmp_path, tiny_tokenizer):
    module = task.build()
    with torch.no_grad():
        module.classifier.score.weight.mul_(20)  # chances that differ
    task.save(module, module.state_dict(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def shard(tiny_tokenizer):
    texts = ["Snow\nis white", "Paris", "a\nb\nc\n"]
    rollouts = []
    for index, text in enumerate(texts):
        ids = tiny_tokenizer.encode(text) + [tiny_tokenizer.eos_token_id]
        rollouts.append(
            Rollout(
                prompt_id=index, prompt_token_ids=tuple(tiny_tokenizer.encode("What?")), token_ids=tuple(ids),
                logprobs=(0.0,) * len(ids), finish_reason="stop", policy_versions=(0,) * len(ids),
            )
        )  # fmt: skip
    return collate(rollouts, pad_token_id=tiny_tokenizer.pad_token_id)


def test_a_step_earns_at_its_end_what_the_model_says_there(folder, shard, tiny_model_dir, tiny_tokenizer):
    actor = SourceActor(name="steps", source=ProcessSource(model=folder), tokenizer=str(tiny_model_dir), rows=[])
    found = asyncio.run(actor.scores(shard))
    model = ScalarModel.from_folder(folder).eval()
    assert (found.token_values != 0).sum(1).tolist() == [2, 1, 3]
    for row in range(len(shard)):
        for place in found.token_values[row].nonzero()[:, 0].tolist():
            ids = shard.sequences[row, : place + 1][None]
            with torch.no_grad():
                score = float(model(input_ids=ids, attention_mask=torch.ones_like(ids).bool())[0, -1])
            assert float(found.token_values[row, place]) == pytest.approx(math.tanh(score / 2), abs=1e-4)
            piece = tiny_tokenizer.decode(shard.sequences[row, place])
            assert "\n" in piece or piece == tiny_tokenizer.eos_token
    torch.testing.assert_close(found.values, found.token_values.sum(1))


def test_the_loop_gets_token_rewards_where_the_steps_end(shard):
    mask = shard.action_mask
    ids = sample_ids_of(shard.prompt_ids)
    steps = torch.zeros(shard.sequences.shape)
    first = mask.int().argmax(1)
    steps[torch.arange(3), first + 1] = torch.tensor([1.0, -1.0, 0.5])
    order = torch.tensor([2, 0, 1])  # another order than the shard's: joined by id
    by_step = Scores(
        "steps", tuple(ids[i] for i in order), steps.sum(1)[order], token_values=steps[order]
    )  # fmt: skip
    whole = Scores("whole", ids, torch.tensor([10.0, 20.0, 30.0]))
    mix = {"steps": (0.0, 1.0, 2.0), "whole": (0.0, 1.0, 1.0)}
    rewards = mixed(shard, [whole, by_step], mix)
    assert rewards.tolist() == [12.0, 18.0, 31.0]
    changed = with_step_rewards(shard, [whole, by_step], mix)
    # As the policy splits them: what is in no step stands at the end.
    zeros = torch.zeros(mask.shape)
    tokens = per_token_rewards(
        rewards - changed.turn_rewards.sum(1), zeros, zeros, mask, kl_coef=0.0, turn_rewards=changed.turn_rewards
    )
    torch.testing.assert_close(tokens.sum(1), rewards)
    last = mask.sum(1) + first - 1
    at_end = torch.tensor([10.0, 20.0, 30.0]) + 2 * steps[torch.arange(3), last]
    torch.testing.assert_close(tokens[torch.arange(3), last], at_end)
    torch.testing.assert_close(changed.turn_rewards, 2 * steps)


def test_another_models_folder_is_refused(tmp_path, tiny_model_dir, tiny_tokenizer):
    model = ScalarModel.from_folder(tiny_model_dir, seed=0)
    save_model(model.classifier, tiny_tokenizer, tmp_path)
    with pytest.raises(InputError, match="has no step_separator in its config.json: it is no process reward model"):
        SourceActor(name="s", source=ProcessSource(model=tmp_path), tokenizer=str(tiny_model_dir), rows=[])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("algorithm.advantage=grpo", "algorithm.advantage=grpo knows one score a response; .* use gae or reinforce_pp"),
        ("algorithm.advantage=remax", "algorithm.advantage=remax knows one score a response"),
        ("shaping.resample_rounds=1", "shaping.resample_rounds=1 compares whole responses"),
        ("reward.sources.steps.normalize=running", "normalize=running would move the scale of a response's single steps"),
    ],
)
def test_what_knows_whole_responses_only_is_refused(setting, message):
    keys = ["run_dir=r", "model=m", "prompts=p", "reward_model=w", "samples_per_prompt=2"]
    steps = ["reward.sources.steps.kind=process", "reward.sources.steps.model=s"]
    with pytest.raises(InputError, match=message):
        load_config(PPOConfig, None, [*keys, *steps, setting])
