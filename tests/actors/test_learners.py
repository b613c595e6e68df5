"""Policy and critic on real Ray and DeepSpeed (gloo): ratios, ranks, micro-batches, ZeRO stages, checkpoints."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from actors.critic import CriticActor
from actors.group import ActorGroup, Role, collect
from actors.policy import PolicyActor
from actors.reference import ReferenceActor
from actors.reward import RewardActor
from actors.reward_source import SourceActor
from actors.weights import merged, read_safetensors, safetensors_shapes, unpack
from rayllm.config.base import load_config
from rayllm.config.ppo import PPOConfig
from rayllm.data.experience import Experience
from rayllm.data.rollout import Rollout, collate
from rayllm.data.scores import Scores, sample_ids_of
from rayllm.models.loading import load_causal_lm

ROWS, KL_COEF = 12, 0.1
MIX = {"mine": (0.0, 1.0, 1.0)}


@pytest.fixture(scope="module")
def reward_model_dir(tmp_path_factory, tiny_model_dir, tiny_tokenizer):
    from rayllm.models.heads import ScalarModel
    from rayllm.models.loading import save_model

    path = tmp_path_factory.mktemp("reward-model")
    model = ScalarModel.from_folder(tiny_model_dir, seed=3)
    model.classifier.config.reward_mean, model.classifier.config.reward_std = 0.5, 2.0
    save_model(model.classifier, tiny_tokenizer, path)
    return path


def make_config(tmp_path, model, reward_model, *overrides) -> PPOConfig:
    keys = [
        f"run_dir={tmp_path}", f"model={model}", f"reward_model={reward_model}", "prompts=unused",
        f"prompts_per_step={ROWS}", "num_steps=4", "critic.warmup_steps=0", "algorithm.num_epochs=1",
        "algorithm.num_minibatches=1", "policy.optimizer.learning_rate=1e-3", "rollout.temperature=0.7",
    ]  # fmt: skip
    return load_config(PPOConfig, None, [*keys, *overrides]).config


def shards(num_shards: int, *, seed: int = 0, rows: int = ROWS, backwards: bool = False, padding: int = 0):
    """Random rollouts of several lengths; one was cut. ``rows`` of them, perhaps in another order or padded more."""
    rng = np.random.default_rng(seed)
    rollouts = []
    for row in range(ROWS):
        length = int(rng.integers(1, 9))
        rollouts.append(
            Rollout(
                prompt_id=row,
                prompt_token_ids=tuple(rng.integers(3, 300, size=int(rng.integers(2, 7))).tolist()),
                token_ids=tuple(rng.integers(3, 300, size=length).tolist()),
                logprobs=(-1.0,) * length,
                finish_reason="length" if row == 5 else "stop",
                policy_versions=(0,) * length,
            )
        )
    rollouts = rollouts[:rows][:: -1 if backwards else 1]
    size = -(-rows // num_shards)
    parts = [collate(rollouts[i : i + size], pad_token_id=0) for i in range(0, rows, size)]
    return [part._map(lambda t: pad(t, (0, padding)) if t.dim() == 2 else t) for part in parts]


def by_model(part: Experience, values: torch.Tensor) -> Scores:
    """As the only source gave them."""
    return Scores("mine", sample_ids_of(part.prompt_ids), values)


class Critic(CriticActor):
    def weights(self):
        return self.engine.state_dict()


class Learners:
    """Policy and critic of one configuration as actors, with the frozen models beside them."""

    def __init__(self, config: PPOConfig):
        self.config = config
        self.policy, self.critic = (
            ActorGroup(
                Role(name, section.num_actors, 0.5, 0),
                cls,
                lambda rank, section=section: {"rank": rank, "world_size": section.num_actors, "config": config},
            )
            for name, section, cls in (("policy", config.policy, PolicyActor), ("critic", config.critic, Critic))
        )
        self.reference = ReferenceActor(
            model=str(config.model),
            temperature=config.rollout.temperature,
            micro_batch_size=config.reference.micro_batch_size,
        )
        self.reward = RewardActor(model=str(config.reward_model), micro_batch_size=5)
        for group, method in ((self.policy, PolicyActor.setup), (self.critic, CriticActor.setup)):
            collect(group.submit(method, group.submit(PolicyActor.address, rank=0)[0]), "setup")

    def score(self, parts):
        logprobs = self.policy.map(PolicyActor.logprobs, parts)
        ref = [self.reference.logprobs(part) for part in parts]
        scores = [by_model(part, self.reward.rewards(part)) for part in parts]
        given = (logprobs, ref, self.critic.map(CriticActor.values, parts), scores)
        return self.policy.map(PolicyActor.experience, parts, *given, mix=MIX, kl_coef=KL_COEF)

    def step(self, step: int = 0, **rollouts):
        parts = shards(self.config.num_shards, seed=step, **rollouts)
        experience = self.score(parts)
        policy = self.policy.submit(PolicyActor.update, *experience, step=step, kl_coef=KL_COEF)
        critic = self.critic.submit(CriticActor.update, *experience, step=step)
        return collect(policy, "policy")[0] | collect(critic, "critic")[0]

    def weights(self):
        bundle = self.policy.call(PolicyActor.publish_weights, 1)[0].fetch()
        tensors = merged(bundle, self.config.model) if bundle.scaling else unpack(bundle)
        policy = {name: tensor.clone() for name, tensor in tensors}
        return policy | self.critic.call(Critic.weights)[0]

    def stop(self):
        for group in (self.policy, self.critic):
            group.stop()


def run_one_step(tmp_path, model, reward_model, *overrides, **rollouts):
    learners = Learners(make_config(tmp_path, model, reward_model, *overrides))
    try:
        return learners.step(rows=ROWS - 1, **rollouts), learners.weights()  # two ranks: unequal numbers of rows
    finally:
        learners.stop()


@pytest.fixture(scope="module")
def one_rank(local_ray, tmp_path_factory, tiny_model_dir, reward_model_dir):
    return run_one_step(tmp_path_factory.mktemp("one"), tiny_model_dir, reward_model_dir)


def test_first_inner_step_has_ratio_one(one_rank):
    metrics, _ = one_rank
    assert metrics["policy/clipfrac"] == 0.0
    assert abs(metrics["policy/approx_kl"]) < 1e-8
    assert abs(metrics["objective/kl"]) < 1e-8  # policy and reference are the same weights
    # Advantages are whitened and the ratio is 1, so the loss is minus their mean: zero.
    assert abs(metrics["loss/policy"]) < 1e-5


def test_the_only_update_of_a_step_gives_the_old_logprobs_itself(
    local_ray, tmp_path, tiny_model_dir, reward_model_dir
):
    def update(with_pass_before: bool):
        learners = Learners(make_config(tmp_path, tiny_model_dir, reward_model_dir, "algorithm.off_policy=token"))
        parts = shards(2)
        logprobs = collect(learners.policy.map(PolicyActor.logprobs, parts), "policy")
        # A sampler that is a little off: the importance weights are not 1.
        parts = [
            part.replace(rollout_logprobs=(0.99 * logprob) * part.action_mask)
            for part, logprob in zip(parts, logprobs, strict=True)
        ]
        zeros = [torch.zeros_like(logprob) for logprob in logprobs]
        scores = [by_model(part, torch.arange(len(part), dtype=torch.float32)) for part in parts]
        before = logprobs if with_pass_before else [None, None]
        given = (before, zeros, zeros, scores)
        experience = learners.policy.map(PolicyActor.experience, parts, *given, mix=MIX, kl_coef=0.0)
        (metrics,) = collect(learners.policy.submit(PolicyActor.update, *experience, step=0, kl_coef=0.0), "policy")
        weights = learners.weights()
        learners.stop()
        return metrics, weights

    (metrics, weights), (other_metrics, other_weights) = update(True), update(False)
    assert metrics.keys() == other_metrics.keys() and metrics["rollout/logprob_mismatch"] > 1e-3
    for name, value in metrics.items():
        assert other_metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    for name, weight in weights.items():
        assert (other_weights[name] - weight).norm() < 1e-6 * weight.norm(), name


def assert_same_update(one, other):
    """The same gradient norms, and the same weights within 1e-5 of their size."""
    (metrics, weights), (other_metrics, other_weights) = one, other
    for name in ("policy/grad_norm", "critic/grad_norm", "loss/value"):
        assert other_metrics[name] == pytest.approx(metrics[name], rel=1e-5), name
    for name in ("objective/rewards", "objective/entropy", "value/explained_variance", "loss/policy"):
        assert other_metrics[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name
    assert weights.keys() == other_weights.keys()
    for name, weight in weights.items():
        assert (other_weights[name] - weight).norm() < 1e-5 * weight.norm(), name


@pytest.mark.parametrize(
    ("overrides", "rollouts"),
    [
        (("policy.num_actors=2", "critic.num_actors=2", "critic.learner.zero_stage=1"), {"padding": 7}),
        (
            ("policy.num_actors=2", "policy.learner.zero_stage=3", "policy.micro_batch_tokens=20",
             "critic.num_actors=2", "critic.learner.zero_stage=0", "critic.micro_batch_size=1"),
            {"backwards": True},
        ),
        (
            ("policy.micro_batch_size=2", "policy.learner.zero_stage=0", "critic.micro_batch_tokens=30",
             "critic.learner.zero_stage=3"),
            {"backwards": True, "padding": 3},
        ),
    ],
    ids=["two ranks, padding", "two ranks, ZeRO 3 and 0, token budget, order", "ZeRO 0 and 3, token budget, order"],
)  # fmt: skip
def test_ranks_micro_batches_zero_stage_order_and_padding_change_nothing(
    one_rank, tmp_path, tiny_model_dir, reward_model_dir, overrides, rollouts
):
    other = run_one_step(tmp_path, tiny_model_dir, reward_model_dir, *overrides, **rollouts)
    assert_same_update(one_rank, other)


def test_a_part_of_the_shards_is_refused(tmp_path, tiny_model_dir, reward_model_dir):
    config = make_config(tmp_path, tiny_model_dir, reward_model_dir)
    with pytest.raises(RuntimeError, match="expected all 2 shards of the step on every rank, got 1"):
        PolicyActor(rank=0, world_size=1, config=config).joined(shards(1))


@pytest.mark.scorecard("R56", partly=True)
def test_a_checkpoint_continues_exactly(local_ray, tmp_path, tiny_model_dir, reward_model_dir):
    config = make_config(tmp_path, tiny_model_dir, reward_model_dir)
    first = Learners(config)
    first.step(0)
    for group, actor in ((first.policy, PolicyActor), (first.critic, CriticActor)):
        group.call(actor.save, str(tmp_path / group.role.name))
    expected_metrics, expected = first.step(1), first.weights()
    first.stop()
    second = Learners(config)
    for group, actor in ((second.policy, PolicyActor), (second.critic, CriticActor)):
        group.call(actor.load, str(tmp_path / group.role.name))
    metrics, weights = second.step(1), second.weights()
    with pytest.raises(RuntimeError, match="no complete checkpoint in"):
        second.policy.call(PolicyActor.load, str(tmp_path / "nothing"))
    second.stop()
    assert metrics == pytest.approx(expected_metrics, rel=1e-6, abs=1e-9)
    for name in weights:
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=1e-7)


def test_with_adapters_the_policy_is_its_own_reference(local_ray, tmp_path, tiny_model_dir, reward_model_dir):
    overrides = ["policy.learner.lora.rank=4", "critic.learner.lora.rank=4", "policy.num_actors=2",
                 "policy.learner.zero_stage=3", "policy.micro_batch_tokens=30"]  # fmt: skip
    learners = Learners(make_config(tmp_path, tiny_model_dir, reward_model_dir, *overrides))
    parts = shards(2)
    before = collect(learners.policy.map(PolicyActor.logprobs, parts), "policy")
    metrics = learners.step()
    after = collect(learners.policy.map(PolicyActor.logprobs, parts), "policy")
    reference = collect(learners.policy.map(PolicyActor.ref_logprobs, parts), "policy")
    weights = learners.weights()
    learners.policy.call(PolicyActor.export, str(tmp_path / "model"))
    learners.stop()
    assert metrics["policy/grad_norm"] > 0 and metrics["critic/grad_norm"] > 0
    for part, start, now, ref in zip(parts, before, after, reference, strict=True):
        assert torch.equal(ref, start)
        mask = part.action_mask
        torch.testing.assert_close(ref[mask], learners.reference.logprobs(part)[mask], rtol=0, atol=1e-4)
        assert not torch.equal(now[mask], ref[mask])
    exported = ReferenceActor(model=str(tmp_path / "model"), temperature=0.7, micro_batch_size=5)
    torch.testing.assert_close(exported.logprobs(part)[mask], now[mask], rtol=0, atol=1e-4)
    for name, tensor in read_safetensors(tmp_path / "model"):  # what is published are the adapters alone
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-6)
    names = safetensors_shapes(tiny_model_dir).keys()
    assert safetensors_shapes(tmp_path / "model").keys() == names
    assert {name for name in weights if not name.startswith("classifier.")} == names
    assert (tmp_path / "model/adapter/adapter_config.json").is_file()


def test_scores_of_one_actor_are_those_of_the_plain_model(tiny_model_dir, reward_model_dir):
    # The actor classes are plain classes: no Ray needed.
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    (batch,) = shards(1)
    reference = ReferenceActor(model=str(tiny_model_dir), temperature=0.7, micro_batch_size=5)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    got = reference.logprobs(batch)
    rm = RewardActor(model=str(reward_model_dir), micro_batch_size=5)
    classifier = AutoModelForSequenceClassification.from_pretrained(reward_model_dir).eval()
    rewards = rm.rewards(batch)
    for row in range(ROWS):
        length = int(batch.attention_mask[row].sum())
        ids = batch.sequences[row : row + 1, :length]
        with torch.no_grad():
            logprobs = (model(ids).logits[0, :-1] / 0.7).log_softmax(-1)
            score = classifier(input_ids=ids).logits.squeeze()
        expected = logprobs.gather(1, ids[0, 1:, None]).squeeze(1)
        torch.testing.assert_close(got[row, 1:length], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rewards[row], (score - 0.5) / 2.0, rtol=1e-4, atol=1e-5)


def test_a_rank_whose_responses_were_all_dropped_goes_on_with_the_others(local_ray, tmp_path, tiny_model_dir, reward_model_dir):
    """The step's one update computes the old log-probabilities itself: that rank has none."""
    keys = ("policy.num_actors=2", "critic.num_actors=2")
    learners = Learners(make_config(tmp_path, tiny_model_dir, reward_model_dir, *keys))
    try:
        parts = shards(2)
        values = [torch.ones(len(parts[0])), torch.full((len(parts[1]),), torch.nan)]
        none, zeros = [None] * 2, [torch.zeros(part.sequences.shape) for part in parts]
        scores = [by_model(part, given) for part, given in zip(parts, values, strict=True)]
        experience = learners.policy.map(PolicyActor.experience, parts, none, zeros, zeros, scores, mix=MIX, kl_coef=0.1)
        updated = learners.policy.submit(PolicyActor.update, *experience, step=0, kl_coef=0.1)
        metrics = collect(updated, "policy")[0]
        assert metrics["policy/grad_norm"] > 0 and metrics["objective/rewards"] == 1
    finally:
        learners.stop()


@pytest.mark.parametrize(
    ("overrides", "reward"),
    [
        ((), lambda score, length, stopped: score - (not stopped)),
        (("shaping.length_penalty=0.1",), lambda score, length, stopped: score - (not stopped) - 0.1 * length),
        (("shaping.clip=1.5",), lambda score, length, stopped: max(-1.5, min(1.5, score - (not stopped)))),
    ],
    ids=["end", "length", "clip"],
)
def test_the_greedy_response_is_shaped_as_the_sampled_one(tmp_path, tiny_model_dir, reward_model_dir, overrides, reward):
    """By its own length and end (ReMax): with equal scores it pays to end one's turn when the greedy response does."""
    keys = ("algorithm.advantage=remax", "algorithm.kl_coef=0", *overrides)
    policy = PolicyActor(rank=0, world_size=1, config=make_config(tmp_path, tiny_model_dir, reward_model_dir, *keys))
    (sampled,), (greedy,) = shards(1), shards(1, seed=9)
    greedy = greedy.replace(stopped=torch.arange(ROWS) % 3 > 0)
    scores, greedy_scores = torch.linspace(-4, 4, ROWS), torch.linspace(5, -2, ROWS)
    scored = by_model(sampled, scores), greedy, by_model(greedy, greedy_scores)
    found = policy.experience(sampled, None, None, None, *scored, mix=MIX, kl_coef=0.0)
    for row in range(ROWS):
        own, other = (
            reward(float(score[row]), int(part.action_mask[row].sum()), bool(part.stopped[row]))
            for part, score in ((sampled, scores), (greedy, greedy_scores))
        )
        limit = 1.5 if overrides == ("shaping.clip=1.5",) else 3.0
        expected = max(-limit, min(limit, own)) - max(-limit, min(limit, other))
        advantages = found.advantages[row][found.action_mask[row]]
        assert advantages.tolist() == pytest.approx([expected] * len(advantages), abs=1e-5)


def test_the_score_is_on_the_last_token_and_a_cut_response_is_penalised(tmp_path, tiny_model_dir, reward_model_dir):
    experience = experience_of(tmp_path, tiny_model_dir, reward_model_dir, "algorithm.gae_lambda=1.0")
    # gamma = lambda = 1, no values, no KL: every action's return is the score, 2.5, or 2.5 - 1 where it was cut.
    expected = torch.where(experience.stopped, 2.5, 1.5)[:, None] * experience.action_mask
    torch.testing.assert_close(experience.returns, expected)


def experience_of(tmp_path, model, reward_model, *overrides):
    """What the policy makes of scores of 2.5, with zeros for log-probabilities and values."""
    policy = PolicyActor(rank=0, world_size=1, config=make_config(tmp_path, model, reward_model, *overrides))
    (batch,) = shards(1)
    zeros = torch.zeros(batch.sequences.shape)
    scores = by_model(batch, torch.full((ROWS,), 2.5))
    return policy.experience(batch, zeros, zeros, zeros, scores, mix=MIX, kl_coef=0.1)


@pytest.mark.parametrize(
    ("advantage", "normalize"),
    [*itertools.product(["gae", "grpo", "reinforce_pp"], ["none", "group"]), ("remax", "none")],
)
@pytest.mark.scorecard("R50")
def test_a_dropped_response_is_as_if_it_had_not_been_sampled(
    tmp_path, tiny_model_dir, reward_model_dir, advantage, normalize
):
    keys = ("samples_per_prompt=4", f"algorithm.advantage={advantage}", f"shaping.normalize={normalize}")
    policy = PolicyActor(rank=0, world_size=1, config=make_config(tmp_path, tiny_model_dir, reward_model_dir, *keys))
    (batch,) = shards(1)
    batch = batch.replace(prompt_ids=torch.arange(ROWS) // 4)
    generator = torch.Generator().manual_seed(0)
    logprobs, ref, values = (torch.randn(batch.sequences.shape, generator=generator) for _ in range(3))
    rewards, baselines = torch.randn(2, ROWS, generator=generator)
    rewards[1] = rewards[ROWS - 1] = torch.nan
    kept = rewards.isfinite()

    def made(rows):
        shard, given = batch[rows], [tensor[rows] for tensor in (logprobs, ref, values)]
        scored = [by_model(shard, rewards[rows])]
        scored += [shard, by_model(shard, baselines[rows])] if advantage == "remax" else []
        return policy.experience(shard, *given, *scored, mix=MIX, kl_coef=0.1)

    all_rows, others = made(torch.ones(ROWS, dtype=torch.bool)), made(kept)
    assert not all_rows.action_mask[~kept].any() and all_rows.rewards.isfinite().all()
    for name in ("advantages", "returns", "action_mask", "rewards"):
        torch.testing.assert_close(getattr(all_rows, name)[kept], getattr(others, name))
    assert not all_rows.advantages[~kept].any()
    sums, expected = policy._rollout_sums(all_rows), policy._rollout_sums(others)
    assert sums.keys() == expected.keys()
    for name, pair in sums.items():
        assert pair == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize(
    ("overrides", "reward"),
    [
        (("shaping.length_penalty=0.1",), lambda length: 2.5 - 0.1 * length),
        # Of 8 tokens at most the last 4 cost: linearly, 1 at the limit.
        (("shaping.overlong_buffer=4", "rollout.max_new_tokens=8"), lambda length: 2.5 - max(0, length - 4) / 4),
        (("shaping.clip=1.5",), lambda length: 1.5),
    ],
    ids=["length", "overlong", "clip"],
)
def test_what_shaping_makes_of_a_score(tmp_path, tiny_model_dir, reward_model_dir, overrides, reward):
    keys = ("algorithm.gae_lambda=1.0", "shaping.missing_eos_penalty=0", *overrides)
    experience = experience_of(tmp_path, tiny_model_dir, reward_model_dir, *keys)
    for row in range(ROWS):
        mask = experience.action_mask[row]
        expected = torch.full((int(mask.sum()),), float(reward(int(mask.sum()))))
        torch.testing.assert_close(experience.returns[row][mask], expected)


def scored(prompt_ids, rewards):
    """A shard of two-token rows that carry their reward's place, and a source's scores of it."""
    rollouts = [
        Rollout(
            prompt_id=prompt, prompt_token_ids=(5,), token_ids=(10 + index,), logprobs=(-1.0,), finish_reason="stop",
            policy_versions=(0,),
        )
        for index, prompt in enumerate(prompt_ids)
    ]  # fmt: skip
    shard = collate(rollouts, pad_token_id=0)
    return shard, Scores("a", sample_ids_of(shard.prompt_ids), torch.tensor(rewards))


def test_prompts_without_signal_are_replaced_by_those_with():
    shard, scores = scored([1, 1, 2, 2, 3, 3], [0.0, 1.0, 5.0, 5.0, 7.0, 7.0])
    spare, spare_scores = scored([8, 8, 9, 9], [4.0, 4.0, 2.0, 3.0])
    assert SourceActor.count_without_signal(shard, scores) == 2
    filled = SourceActor.replace_without_signal(shard, spare, scores, spare_scores)
    new_scores = SourceActor.replaced_scores(0, shard, spare, scores, spare_scores)
    # 1 has signal, 9 too; nothing better than 2 is left for the third place.
    assert filled.prompt_ids.tolist() == [1, 1, 9, 9, 2, 2]
    assert new_scores.values.tolist() == [0.0, 1.0, 2.0, 3.0, 5.0, 5.0]
    assert new_scores.sample_ids == ("1/0", "1/1", "9/0", "9/1", "2/0", "2/1")
    assert filled.sequences[:, 1].tolist() == [10, 11, 12, 13, 12, 13]


def test_the_reference_moves_towards_the_policy(local_ray, tiny_model_dir, other_tiny_model_dir):
    from actors.publishing import Publisher

    reference = ReferenceActor(model=str(tiny_model_dir), temperature=0.7, micro_batch_size=5)
    before = {name: tensor.clone() for name, tensor in reference.model.named_parameters()}
    other = dict(read_safetensors(other_tiny_model_dir))
    publisher = Publisher()
    reference.move(publisher.publish(other.items(), version=1), ema=0.75)
    for name, tensor in reference.model.named_parameters():
        torch.testing.assert_close(tensor, 0.75 * before[name] + 0.25 * other[name])


@pytest.mark.parametrize(
    "overrides",
    [
        ("algorithm.advantage=grpo", "algorithm.aggregation=sequence_mean", "algorithm.kl_in=loss",
         "algorithm.kl_estimator=k3"),
        ("algorithm.advantage=rloo", "algorithm.aggregation=constant"),
        ("algorithm.advantage=reinforce_pp", "algorithm.policy_loss=cispo", "algorithm.entropy_coef=0.01"),
        ("algorithm.advantage=reinforce_baseline", "algorithm.policy_loss=gspo", "algorithm.off_policy=mask"),
    ],
    ids=["grpo", "rloo", "reinforce_pp cispo", "reinforce_baseline gspo"],
)  # fmt: skip
def test_losses_do_not_depend_on_the_split(tmp_path, tiny_model_dir, reward_model_dir, overrides):
    """The loss and its gradient of a batch are the sum of those of its parts, with padding or without."""
    keys = ("samples_per_prompt=2", f"prompts_per_step={ROWS // 2}", "algorithm.num_minibatches=1", *overrides)
    policy = PolicyActor(rank=0, world_size=1, config=make_config(tmp_path, tiny_model_dir, reward_model_dir, *keys))
    policy.engine = PlainEngine(load_causal_lm(tiny_model_dir))
    (batch,) = shards(1)
    batch = batch.replace(prompt_ids=batch.prompt_ids // 2)
    generator = torch.Generator().manual_seed(0)
    logprobs = policy.logprobs(batch)
    ref = logprobs + 0.1 * torch.randn(logprobs.shape, generator=generator)
    scores = by_model(batch, torch.randn(ROWS, generator=generator))
    experience = policy.experience(batch, logprobs - 0.05, ref, None, scores, mix=MIX, kl_coef=0.1)

    def gradients(parts):
        policy.engine.module.zero_grad()
        sums = {}
        total = 0.0
        for part in parts:
            loss = policy._loss(part, normalizer=policy._normalizer(parts), kl_coef=0.1, sums=sums, scored=[])
            loss.backward()
            total += loss.item()
        return total, [p.grad.clone() for p in policy.engine.module.parameters()], policy.mean_over_ranks(sums)

    whole = gradients([experience])
    split = gradients([experience[i : i + 1].trimmed() for i in range(ROWS)])
    assert split[0] == pytest.approx(whole[0], rel=1e-4, abs=1e-6)
    assert split[2] == pytest.approx(whole[2], rel=1e-4, abs=1e-6)
    for one, other in zip(whole[1], split[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


class PlainEngine:
    """The model without DeepSpeed."""

    def __init__(self, module):
        self.module, self.device = module, torch.device("cpu")

    def __call__(self, **inputs):
        return self.module(**inputs)

    def train(self, mode=True):
        self.module.train(mode)

    def sum_over_ranks(self, value):
        return value

    def sum_tensor(self, values):
        return values


def test_a_dead_actor_and_a_failing_call_are_named(local_ray):
    class Fragile:
        def fail(self):
            raise KeyError("spanner")

        def die(self):
            import os

            os._exit(1)

    group = ActorGroup(Role("tester", 2, 0.5, 0), Fragile, lambda rank: {})
    with pytest.raises(RuntimeError, match="tester: KeyError: 'spanner'"):
        group.call(Fragile.fail)
    with pytest.raises(RuntimeError, match="tester: an actor died"):
        group.call(Fragile.die)
    group.stop()


@pytest.mark.parametrize("num_rows", [1, 2, 5, 19])
def test_rows_in_pieces_come_back_in_order_and_fill_every_rank(local_ray, num_rows):
    class Adder:
        def __init__(self):
            self.calls = []

        def add(self, left, right, *, scale):
            self.calls.append(left)
            return scale * (left + right)

        def seen(self):
            return self.calls

    group = ActorGroup(Role("adder", 2, 0.1, 0), Adder, lambda rank: {})
    lefts, rights = list(range(num_rows)), [10 * row for row in range(num_rows)]
    rights[-1] = local_ray.put(rights[-1])  # references are waited for, as in `map`
    try:
        sums = collect(group.map(Adder.add, lefts, rights, scale=3), "adder")
        assert sums == [3 * 11 * row for row in range(num_rows)]
        assert group.call(Adder.seen) == [list(range(rank, num_rows, 2)) for rank in range(2)]
    finally:
        group.stop()


def test_tensors_of_an_actor_arrive_as_they_left_and_can_be_written(local_ray):
    class Holder:
        def __init__(self):
            grid = torch.arange(6).reshape(2, 3)
            self.tensors = [grid.to(dtype) for dtype in (torch.int64, torch.float32, torch.bfloat16, torch.bool)]
            self.tensors += [self.tensors[1].T, torch.tensor(2.5), torch.zeros(0, 4), torch.ones(200_000)]
            self.tensors += [torch.ones(2, requires_grad=True)]

        def give(self):
            return self.tensors

        def as_file(self):
            from ray import cloudpickle

            return b"torch.storage" in cloudpickle.dumps(self.tensors[0])

    group = ActorGroup(Role("holder", 1, 0.1, 0), Holder, lambda rank: {})
    try:
        (found,) = group.call(Holder.give)
        for sent, got in zip(Holder().tensors, found, strict=True):
            torch.testing.assert_close(got, sent.detach(), rtol=0, atol=0)
            got += got  # also what lay in Ray's store, which is read-only
        assert group.call(Holder.as_file) == [False]
    finally:
        group.stop()


def test_cpu_workers_compute_on_one_thread_without_the_shared_memory_op(local_ray):
    class Probe:
        def look(self):
            import os

            import deepspeed
            import torch

            from actors.environment import device_of
            from rayllm.models.engine import init_distributed

            device_of()
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29613")
            init_distributed("gloo")
            return os.environ["OMP_NUM_THREADS"], torch.get_num_threads(), deepspeed.ops.__compatible_ops__

    group = ActorGroup(Role("probe", 1, 2, 0), Probe, lambda rank: {})
    threads, used, ops = group.call(Probe.look)[0]
    group.stop()
    # With two threads on two busy cores a worker was six times slower; the op would be compiled for a minute here.
    assert (threads, used) == ("1", 1)
    assert ops["deepspeed_shm_comm"] is False
