"""Rollout actors on real vLLM engines: two for the whole module, started together."""

import asyncio
import dataclasses
import os
import socket
import subprocess
import sys
import time

import psutil
import pytest
import ray
import torch

from actors import weight_group
from actors.environment import this_node
from actors.proof import Proof
from actors.publishing import Publisher, Seat, Sent
from actors.rollout import RolloutActor, sample_seed
from actors.vllm_async import AsyncEngine
from actors.vllm_engine import EXIT_GRACE_S
from actors.vllm_stepped import SteppedEngine
from actors.weights import pack, read_safetensors, unpack
from rayllm.data.prompts import PromptSpan, PromptStream
from rayllm.data.tokenizer import stop_token_ids

SEED = 11
BLOCK = 32
TOLERANCE = 1e-4  # mean |difference| of log-probabilities, nats


class ProbedActor(RolloutActor):
    """A rollout actor with handles that only tests need."""

    def __init__(self, model_dir, **settings):
        self.model_dir = model_dir
        super().__init__(model_dir, **settings)

    async def break_engine(self) -> None:
        def fail():
            raise OSError("broken on purpose")

        self._engine._llm.step = fail

    async def generate_and_update(self, prompts, bundle, keep_cache=False, **sampling):
        task = await self._start(prompts, **sampling)
        await self.update_weights(bundle, keep_cache=keep_cache)
        return await task

    async def generate_in_time(self, timeout_s, prompts, **sampling):
        self._timeout_s = timeout_s
        try:
            return await self.generate(prompts, **sampling)
        finally:
            self._timeout_s = None

    async def unfinished_after_cancel(self, prompts, **sampling) -> int:
        task = await self._start(prompts, **sampling)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await self.load(self.model_dir)  # runs in the stepping thread, after the cancellation
        return self._engine._llm.get_num_unfinished_requests() + len(self._engine._calls)

    async def _start(self, prompts, **sampling):
        """A call that has sampled some tokens by now."""
        task = asyncio.create_task(self.generate(prompts, **sampling))
        while not self._engine._calls:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        return task


class ActorOnAsyncLLM(RolloutActor):
    """As it is on a GPU: with vLLM's engine in a process of its own."""

    def __init__(self, model_dir, **settings):
        super().__init__(model_dir, **settings)
        self._engine = AsyncEngine(
            model_dir, stop_token_ids=[], overrides={"distributed_executor_backend": "uni"}
        )

    async def generate_and_update(self, prompts, bundle, **sampling):
        task = asyncio.create_task(self.generate(prompts, **sampling))
        await asyncio.sleep(0.5)
        await self.update_weights(bundle)
        return await task


@pytest.fixture(scope="module")
def actors(local_ray, tiny_model_dir):
    options = {"num_cpus": 1, "max_concurrency": 100, "max_restarts": -1}
    handles = [
        local_ray.remote(ProbedActor).options(**options).remote(str(tiny_model_dir), engine={}, seed=SEED)
        for _ in range(2)
    ]
    local_ray.get([handle.info.remote() for handle in handles])
    yield handles
    for handle in handles:
        local_ray.kill(handle)


@pytest.fixture
def actor(local_ray, actors, tiny_model_dir):
    """One that serves the first model as version 0."""
    assert local_ray.get(actors[0].load.remote(str(tiny_model_dir))) == 0
    return actors[0]


@pytest.fixture
def mortal(local_ray, actors, tiny_model_dir):
    """One that may die: it comes back for the next test."""
    while True:
        try:
            local_ray.get(actors[1].load.remote(str(tiny_model_dir)))
            return actors[1]
        except local_ray.exceptions.RayActorError:
            time.sleep(0.2)


@pytest.fixture(scope="module")
def tireless(local_ray, actors, tiny_model_dir):
    """One whose responses end by their length only."""
    remote = local_ray.remote(RolloutActor).options(num_cpus=1)
    handle = remote.remote(str(tiny_model_dir), engine={}, seed=SEED, ignore_stop=True)
    yield handle
    local_ray.kill(handle)


@pytest.fixture(scope="module")
def models(tiny_model_dir, other_tiny_model_dir):
    """The two models by transformers, in float32."""
    from rayllm.models.loading import load_causal_lm

    return [load_causal_lm(tiny_model_dir), load_causal_lm(other_tiny_model_dir)]


@pytest.fixture(scope="module")
def bundles(tiny_model_dir, other_tiny_model_dir):
    """The weights of the two models, as version 1 (the second) and 2 (the first)."""
    return [
        pack(read_safetensors(tiny_model_dir), version=2),
        pack(read_safetensors(other_tiny_model_dir), version=1),
    ]


@pytest.fixture(scope="module")
def stops(tiny_tokenizer):
    return stop_token_ids(tiny_tokenizer)


@pytest.fixture(scope="module")
def prompts(models):
    return make_prompts(models[0].config.vocab_size, [5, 17, 33, 48])


def make_prompts(vocab_size, lengths):
    generator = torch.Generator().manual_seed(0)
    return [
        (100 + row, torch.randint(vocab_size, (length,), generator=generator).tolist())
        for row, length in enumerate(lengths)
    ]


def check_refuses_while_it_sleeps(local_ray, actor, prompts):
    awake = generate(local_ray, actor, prompts)
    local_ray.get(actor.sleep.remote(keep_weights=True))
    with pytest.raises(RuntimeError, match="the rollout engine sleeps; new weights, or `wake`, come before new work"):
        generate(local_ray, actor, prompts)
    local_ray.get(actor.wake.remote())
    assert generate(local_ray, actor, prompts) == awake


def generate(ray, actor, prompts, **changes):
    sampling = {"num_samples": 2, "temperature": 1.0, "max_new_tokens": 24, "step": 1, **changes}
    return ray.get(actor.generate.remote(prompts, **sampling))


def logprob_differences(model, rollouts, *, temperature):
    """|sampler - transformers| of every response token."""
    differences = []
    for rollout in rollouts:
        start = len(rollout.prompt_token_ids)
        ids = torch.tensor([rollout.prompt_token_ids + rollout.token_ids])
        with torch.no_grad():
            logprobs = (model(ids).logits[0, :-1].float() / temperature).log_softmax(-1)
        expected = logprobs.gather(1, ids[0, 1:, None])[start - 1 :, 0]
        differences.append((expected - torch.tensor(rollout.logprobs)).abs())
    return torch.cat(differences)


def greedy_tokens(model, prompts, stops, max_new_tokens=24):
    responses = []
    for _, ids in prompts:
        output = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=stops,
            pad_token_id=stops[0],
        )
        responses.append(tuple(output[0, len(ids) :].tolist()))
    return responses


def tokens_by_sample(rollouts):
    found = {}
    for rollout in rollouts:
        found.setdefault(rollout.prompt_id, []).append(rollout.token_ids)
    return found


def wait_until_gone(pid, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return
        except psutil.NoSuchProcess:
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} still runs {timeout_s} s after its death")


class PublishingActor:
    """A learner that publishes ready bundles: for this node, or as if its readers lived on another."""

    def __init__(self):
        self.publisher = Publisher()

    def publish(self, bundle, stored):
        published = self.publisher.publish(unpack(bundle), version=bundle.version, nodes=[this_node()])
        if stored:
            reference = ray.put(published.place.read(published.end).copy())
            published = dataclasses.replace(published, node="another", stored=(reference,))
        return published


def test_logprobs_and_greedy_tokens_follow_ten_updates(local_ray, actor, models, bundles, prompts, stops):
    publisher = local_ray.remote(PublishingActor).options(num_cpus=0).remote()
    greedy = [greedy_tokens(model, prompts, stops) for model in models]
    assert greedy[0] != greedy[1]
    for update in range(11):
        serving = update % 2
        if update:
            bundle = dataclasses.replace(bundles[serving], version=update)
            published = local_ray.get(publisher.publish.remote(bundle, stored=update > 5))
            assert local_ray.get(actor.update_weights.remote(published)) == update
        for temperature in (1.0, 0.7):
            rollouts = generate(local_ray, actor, prompts, temperature=temperature, step=update)
            difference = logprob_differences(models[serving], rollouts, temperature=temperature)
            assert difference.mean() < TOLERANCE, (update, temperature)
            assert {v for r in rollouts for v in r.policy_versions} == {update}
        rollouts = generate(local_ray, actor, prompts, temperature=0, num_samples=1)
        assert [r.token_ids for r in rollouts] == greedy[serving], update
        # A greedy token's log-probability is that of temperature 1.
        assert logprob_differences(models[serving], rollouts, temperature=1.0).mean() < TOLERANCE
    assert local_ray.get(actor.version.remote()) == 10


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_are_drawn_from_the_models_distribution(local_ray, actor, models, prompts, temperature):
    """Chi-square test of the first token's frequencies; the seeds are fixed, so it cannot fail by chance."""
    num_samples, least_expected = 3000, 5
    _, ids = prompts[1]
    with torch.no_grad():
        expected = num_samples * (models[0](torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1)
    rollouts = generate(
        local_ray, actor, [prompts[1]], num_samples=num_samples, max_new_tokens=1, temperature=temperature
    )
    found = torch.tensor([r.token_ids[0] for r in rollouts]).bincount(minlength=len(expected))
    frequent = expected >= least_expected  # the others count as one
    expected = torch.cat([expected[frequent], expected[~frequent].sum()[None]])
    found = torch.cat([found[frequent], found[~frequent].sum()[None]])
    statistic = ((found - expected) ** 2 / expected).sum()
    degrees = len(expected) - 1
    p_value = torch.special.gammaincc(torch.tensor(degrees / 2), statistic / 2)
    assert degrees > 20 and 0.001 < p_value < 0.999, (statistic, degrees, p_value)


def test_load_from_disk_and_a_plain_bundle_serve_the_same(
    local_ray, actor, bundles, prompts, other_tiny_model_dir
):
    assert local_ray.get(actor.load.remote(str(other_tiny_model_dir), version=7)) == 7
    from_disk = generate(local_ray, actor, prompts)
    assert local_ray.get(actor.update_weights.remote(bundles[1])) == 1
    from_bundle = generate(local_ray, actor, prompts)
    assert {v for r in from_disk for v in r.policy_versions} == {7}
    assert {v for r in from_bundle for v in r.policy_versions} == {1}
    assert [(r.token_ids, r.logprobs) for r in from_disk] == [(r.token_ids, r.logprobs) for r in from_bundle]


def test_tokens_do_not_depend_on_order_batch_or_actor(local_ray, actor, mortal, prompts):
    rollouts = generate(local_ray, actor, prompts, num_samples=3)
    assert [r.prompt_id for r in rollouts] == [p for p, _ in prompts for _ in range(3)]
    assert [r.prompt_token_ids for r in rollouts] == [tuple(ids) for _, ids in prompts for _ in range(3)]
    expected = tokens_by_sample(rollouts)
    assert all(len(set(samples)) == 3 for samples in expected.values())
    assert tokens_by_sample(generate(local_ray, actor, prompts, num_samples=3)) == expected
    assert tokens_by_sample(generate(local_ray, actor, prompts[::-1], num_samples=3)) == expected
    assert tokens_by_sample(generate(local_ray, mortal, prompts, num_samples=3)) == expected
    calls = [
        actor.generate.remote([p], num_samples=3, temperature=1.0, max_new_tokens=24, step=1) for p in prompts
    ]
    assert tokens_by_sample([r for call in local_ray.get(calls) for r in call]) == expected
    assert tokens_by_sample(generate(local_ray, actor, prompts, num_samples=3, step=2)) != expected


@pytest.mark.scorecard("R43", tier="full")
def test_a_prompt_id_that_stands_twice_is_sampled_twice(local_ray, actor, prompts):
    first, second = generate(local_ray, actor, [prompts[0], prompts[0]], num_samples=1)
    assert first.token_ids != second.token_ids
    assert first == generate(local_ray, actor, [prompts[0]], num_samples=1)[0]


def test_more_prompt_tokens_than_a_batch_takes_are_sampled_all_the_same(local_ray, actor):
    # On CPU vLLM's engine dies when it cuts a seeded prompt at the batch's token budget.
    prompts = [(i, [5 + (i + j) % 200 for j in range(300)]) for i in range(40)]
    rollouts = local_ray.get(
        actor.generate.remote(prompts, num_samples=2, temperature=1.0, max_new_tokens=3, step=0)
    )
    assert [r.prompt_id for r in rollouts] == [i for i in range(40) for _ in range(2)]


def test_kept_prompts_come_back_as_a_batch(local_ray, actor, prompts):
    token_ids = [ids for _, ids in prompts]
    settings = {"num_samples": 2, "temperature": 0.7, "max_new_tokens": 6}
    local_ray.get(actor.set_prompts.remote(token_ids, **settings))
    span = PromptSpan(epoch=1, start=1, count=2)
    batch = local_ray.get(actor.experience.remote(span, step=3))
    first, second = PromptStream(len(prompts), seed=SEED).ids(span)
    kept = [(first, token_ids[first]), (second, token_ids[second])]
    expected = local_ray.get(actor.generate.remote(kept, step=3, **settings))
    assert batch.prompt_ids.tolist() == [first, first, second, second]
    for row, rollout in enumerate(expected):  # the tokens sampled are the tokens trained
        sampled = batch.sequences[row][batch.action_mask[row]].tolist()
        assert sampled == list(rollout.token_ids)
        assert batch.rollout_logprobs[row][batch.action_mask[row]].tolist() == pytest.approx(rollout.logprobs)


def test_no_prompts_give_no_rollouts(local_ray, actor):
    assert generate(local_ray, actor, []) == []


def wrong_bundles(bundle):
    from actors.weights import unpack

    tensors = dict(unpack(bundle))
    norm, projection = "model.norm.weight", "model.layers.1.self_attn.k_proj.weight"
    damaged = bundle.buffer.copy()
    damaged[1234] ^= 64
    return {
        f"missing .'{projection}'": pack([i for i in tensors.items() if i[0] != projection], version=9),
        "unknown .'model.extra.weight'": pack(
            {**tensors, "model.extra.weight": torch.ones(2)}.items(), version=9
        ),
        f"{norm} has shape": pack({**tensors, norm: tensors[norm][:-1]}.items(), version=9),
        f"{projection} has shape": pack({**tensors, projection: tensors[projection].t()}.items(), version=9),
        "damaged": dataclasses.replace(bundle, buffer=damaged, version=9),
    }


def test_a_wrong_update_is_refused_by_name_and_the_old_weights_serve_on(
    local_ray, actor, models, bundles, prompts, stops
):
    expected = greedy_tokens(models[0], prompts, stops)
    for message, bundle in wrong_bundles(bundles[1]).items():
        with pytest.raises(RuntimeError, match=message):
            local_ray.get(actor.update_weights.remote(bundle))
        assert local_ray.get(actor.version.remote()) == 0
        rollouts = generate(local_ray, actor, prompts, temperature=0, num_samples=1)
        assert [r.token_ids for r in rollouts] == expected, message


def test_the_tied_head_may_come_along(local_ray, actor, models, bundles, prompts):
    weights = {**models[1].state_dict()}
    assert "lm_head.weight" in weights
    local_ray.get(actor.update_weights.remote(pack(weights.items(), version=5)))
    rollouts = generate(local_ray, actor, prompts)
    assert logprob_differences(models[1], rollouts, temperature=1.0).mean() < TOLERANCE


def test_an_update_drops_the_prefix_cache(local_ray, actor, models, bundles):
    prompts = make_prompts(models[0].config.vocab_size, [3 * BLOCK + 4])
    for _ in range(2):
        old = generate(local_ray, actor, prompts)
    assert logprob_differences(models[0], old, temperature=1.0).mean() < TOLERANCE
    local_ray.get(actor.update_weights.remote(bundles[1]))
    new = generate(local_ray, actor, prompts)
    assert logprob_differences(models[1], new, temperature=1.0).mean() < TOLERANCE


def test_responses_under_way_go_on_with_the_new_weights(local_ray, actor, models, bundles, prompts):
    sampling = {"num_samples": 2, "temperature": 1.0, "max_new_tokens": 400, "step": 1}
    rollouts = local_ray.get(actor.generate_and_update.remote(prompts, bundles[1], **sampling))
    changed = 0
    for rollout in rollouts:
        under_old, under_new = (
            logprob_differences(model, [rollout], temperature=1.0) < 1e-3 for model in models
        )
        # The tokens before some place are of the old weights, all that follow are of the new ones.
        place = next((t for t, old in enumerate(under_old.tolist()) if not old), len(under_old))
        assert under_new[place:].all()
        assert rollout.policy_versions == (0,) * place + (1,) * (len(under_old) - place)
        changed += 0 < place < len(under_old)
    assert changed


def test_a_kept_cache_serves_only_what_was_under_way(local_ray, actor, models, bundles, prompts):
    sampling = {"num_samples": 2, "temperature": 1.0, "max_new_tokens": 400, "step": 1}
    rollouts = local_ray.get(
        actor.generate_and_update.remote(prompts, bundles[1], keep_cache=True, **sampling)
    )
    mixed = [rollout for rollout in rollouts if set(rollout.policy_versions) == {0, 1}]
    assert mixed
    for rollout in mixed:
        place = rollout.policy_versions.index(1)
        assert (logprob_differences(models[0], [rollout], temperature=1.0)[:place] < 1e-3).all()
        # Keys and values of the old weights under the new ones: of neither model.
        assert logprob_differences(models[1], [rollout], temperature=1.0)[place:].mean() > 1e-2
    fresh = generate(local_ray, actor, prompts)
    assert {version for rollout in fresh for version in rollout.policy_versions} == {1}
    assert logprob_differences(models[1], fresh, temperature=1.0).mean() < TOLERANCE


def text_logprobs(model, text):
    with torch.no_grad():
        logprobs = model(torch.tensor([text])).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(text)[1:, None])[:, 0].tolist()


class SendingActor:
    """A learner that sends ready bundles through a group, in many small buckets."""

    def join(self, seat):
        weight_group.BUCKET_BYTES = 1 << 16
        self.group = weight_group.WeightGroup(seat, torch.device("cpu"))

    def send(self, bundle):
        self.group.send(unpack(bundle), dtype=None)


@pytest.fixture
def sender(local_ray):
    sender = local_ray.remote(SendingActor).options(num_cpus=0).remote()
    yield sender
    local_ray.kill(sender)


def meet(local_ray, sender, actor, kind):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        seat = Seat("127.0.0.1", free.getsockname()[1], 0, 2, kind)
    local_ray.get([sender.join.remote(seat), actor.join.remote(seat.moved(1))])


@pytest.mark.parametrize("kind", ["broadcast", "ipc"])
def test_weights_come_through_a_group_bucket_by_bucket(local_ray, actor, sender, models, bundles, prompts, kind):
    """Over gloo and shared memory: what NCCL and CUDA IPC do between GPUs."""
    meet(local_ray, sender, actor, kind)
    for version, serving in ((4, 1), (5, 0)):
        sent = sender.send.remote(bundles[serving])
        assert local_ray.get(actor.update_weights.remote(Sent(version))) == version
        local_ray.get(sent)
        rollouts = generate(local_ray, actor, prompts)
        assert logprob_differences(models[serving], rollouts, temperature=1.0).mean() < TOLERANCE
        assert {v for r in rollouts for v in r.policy_versions} == {version}


@pytest.mark.scorecard("R05", tier="full", partly=True)
def test_after_a_sync_an_answer_tells_which_weights_serve(local_ray, actor, models, bundles, prompts):
    ((_, text),) = make_prompts(models[0].config.vocab_size, [2 * BLOCK + 16])
    sampling = {"num_samples": 2, "temperature": 1.0, "max_new_tokens": 24, "step": 1}
    for serving in (1, 1, 0):
        bundle, policy, other = bundles[serving], models[serving], models[1 - serving]
        assert local_ray.get(actor.sync.remote(bundle, probe=text)) == bundle.version
        rollouts, served = local_ray.get(actor.answer.remote("generate", prompts, sampling))
        assert {version for rollout in rollouts.open() for version in rollout.policy_versions} == {bundle.version}
        assert served.version == bundle.version and local_ray.get(actor.served.remote()) == served
        asyncio.run(proof_of(policy, text, bundle.version).check(served, "it"))
        reason = rf"it does not serve the policy's weights after the sync of version {bundle.version}: its .* nats a token, 0"
        with pytest.raises(RuntimeError, match=reason):
            asyncio.run(proof_of(other, text, bundle.version).check(served, "it"))


def proof_of(model, text, version: int) -> Proof:
    async def expected() -> list[float]:
        return text_logprobs(model, text)

    return Proof(version, [expected()], TOLERANCE)


def test_the_stop_token_is_kept_with_its_logprob(local_ray, actor, models, bundles, prompts, stops):
    local_ray.get(actor.update_weights.remote(bundles[1]))
    rollouts = generate(local_ray, actor, prompts, num_samples=16, max_new_tokens=40)
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        assert len(rollout.logprobs) == len(rollout.token_ids)
        assert not set(rollout.token_ids[:-1]) & set(stops)
        assert rollout.stopped == (rollout.token_ids[-1] in stops)
        assert rollout.stopped or len(rollout.token_ids) == 40
        assert set(rollout.policy_versions) == {1}
    assert logprob_differences(models[1], rollouts, temperature=1.0).max() < TOLERANCE


def test_with_ignore_stop_nothing_but_the_length_ends_a_response(local_ray, actor, tireless, models, prompts, stops):
    settings = {"num_samples": 16, "max_new_tokens": 40}
    stopping = generate(local_ray, actor, prompts, **settings)
    rollouts = generate(local_ray, tireless, prompts, **settings)
    assert {(r.finish_reason, len(r.token_ids)) for r in rollouts} == {("length", 40)}
    assert any(set(r.token_ids[:-1]) & set(stops) for r in rollouts)
    for short, long in zip(stopping, rollouts, strict=True):  # the same samples, going on
        assert long.token_ids[: len(short.token_ids)] == short.token_ids
    assert logprob_differences(models[0], rollouts, temperature=1.0).max() < TOLERANCE


@pytest.mark.scorecard("R41", tier="full")
def test_what_does_not_fit_is_refused_before_anything_is_sampled(local_ray, actor, prompts):
    expected = generate(local_ray, actor, prompts)
    for bad, message in {
        (7, (1,) * 490): "prompt 7 does not fit: 490 tokens . max_new_tokens=24 > max_model_len=512",
        (8, ()): "prompt 8 is empty",
        (9, (1, 10**6)): "prompt 9 has token 1000000, outside the vocabulary",
        (9, (1, -1)): "prompt 9 has token -1, outside the vocabulary",
    }.items():
        with pytest.raises(ValueError, match=message):
            generate(local_ray, actor, [*prompts, bad])
    for name, value in {"num_samples": 0, "max_new_tokens": 0, "temperature": -1.0}.items():
        with pytest.raises(ValueError, match=f"{name}={value}"):
            generate(local_ray, actor, prompts, **{name: value})
    with pytest.raises(ValueError, match="temperature=0.001 must be 0"):
        generate(local_ray, actor, prompts, temperature=0.001)
    (edge,) = generate(local_ray, actor, [(1, [1] * 488)], num_samples=1)
    assert edge.stopped or len(edge.token_ids) == 24
    assert generate(local_ray, actor, prompts) == expected


def test_the_engine_for_gpus_samples_and_updates_the_same(
    local_ray, tiny_model_dir, actor, sender, models, bundles, prompts
):
    """AsyncLLM on CPU: what it samples, a sync with its proof, an update under way, and one through a group."""
    other = local_ray.remote(ActorOnAsyncLLM).options(num_cpus=1, max_concurrency=100)
    other = other.remote(str(tiny_model_dir), engine={}, seed=SEED)
    try:
        sampling = {"num_samples": 2, "temperature": 0.7, "max_new_tokens": 300, "step": 1}
        rollouts = local_ray.get(other.generate_and_update.remote(prompts, bundles[1], **sampling))
        assert {version for rollout in rollouts for version in rollout.policy_versions} == {0, 1}
        for rollout in rollouts:
            place = sum(version == 0 for version in rollout.policy_versions)
            for model, part in ((models[0], slice(0, place)), (models[1], slice(place, None))):
                assert (logprob_differences(model, [rollout], temperature=0.7)[part] < 1e-3).all()
        ((_, text),) = make_prompts(models[0].config.vocab_size, [2 * BLOCK + 16])
        assert local_ray.get(other.sync.remote(bundles[0], probe=text)) == 2
        asyncio.run(proof_of(models[0], text, 2).check(local_ray.get(other.served.remote()), "it"))
        meet(local_ray, sender, other, "broadcast")
        sent = sender.send.remote(bundles[1])
        assert local_ray.get(other.update_weights.remote(Sent(7))) == 7
        local_ray.get(sent)
        rollouts = generate(local_ray, other, prompts)
        assert logprob_differences(models[1], rollouts, temperature=1.0).mean() < TOLERANCE
        with pytest.raises(RuntimeError, match="weight update refused: missing"):
            local_ray.get(other.update_weights.remote(pack([], version=3)))
        assert {v for r in generate(local_ray, other, prompts) for v in r.policy_versions} == {7}
        check_refuses_while_it_sleeps(local_ray, other, prompts)
        local_ray.get(other.sleep.remote())
        assert local_ray.get(other.update_weights.remote(bundles[0])) == 2
        rollouts = generate(local_ray, other, prompts)
        assert logprob_differences(models[0], rollouts, temperature=1.0).mean() < TOLERANCE
        local_ray.get(other.shutdown.remote())
    finally:
        local_ray.kill(other)


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.long
@pytest.mark.scorecard("R03", tier="full")
def test_when_vllms_process_is_killed_its_actor_tells_at_once_and_ends(local_ray, tiny_model_dir, prompts, seen, stopped):
    """Its actor answers all the while. One that is stopped shows in nothing but its progress (`actors/health.py`)."""
    remote = local_ray.remote(ActorOnAsyncLLM).options(num_cpus=1, max_concurrency=100)
    actor = remote.remote(str(tiny_model_dir), engine={}, seed=SEED)
    try:
        pid = local_ray.get(actor.info.remote())["pid"]
        family = psutil.Process(pid).children(recursive=True)
        (core,) = [child for child in family if "EngineCore" in child.name() + " ".join(child.cmdline())]
        running = actor.generate.remote(prompts, num_samples=2, temperature=1.0, max_new_tokens=400, step=1)
        time.sleep(0.2)
        if stopped:
            core.suspend()
            assert not local_ray.wait([running], timeout=5)[0] and local_ray.get(actor.info.remote())["pid"] == pid
        began = time.monotonic()
        core.kill()
        with pytest.raises(RuntimeError, match="the rollout engine stopped"):
            local_ray.get(running)
        seconds = time.monotonic() - began
        for member in (pid, *(child.pid for child in family)):
            wait_until_gone(member)
    finally:
        local_ray.kill(actor)
    assert seconds < 15
    seen("AsyncLLM's call failed at once, its actor's process and children ended", detected=seconds)


def test_an_engine_that_sleeps_refuses_work_until_it_has_weights(local_ray, actor, models, bundles, prompts):
    """On CPU vLLM frees nothing; what it serves, when, is what it is on a GPU."""
    check_refuses_while_it_sleeps(local_ray, actor, prompts)
    for _ in range(2):  # as the RL loop does: no weights are kept, new ones wake it
        local_ray.get(actor.sleep.remote())
        with pytest.raises(RuntimeError, match="sleeps without its weights: only new ones wake it"):
            local_ray.get(actor.wake.remote())
        ((_, text),) = make_prompts(models[0].config.vocab_size, [2 * BLOCK + 16])
        assert local_ray.get(actor.sync.remote(bundles[1], probe=text)) == 1
        rollouts = generate(local_ray, actor, prompts)
        assert logprob_differences(models[1], rollouts, temperature=1.0).mean() < TOLERANCE
    running = actor.generate.remote(prompts, num_samples=2, temperature=1.0, max_new_tokens=400, step=1)
    time.sleep(0.2)
    with pytest.raises(RuntimeError, match="cannot sleep: 1 calls are under way"):
        local_ray.get(actor.sleep.remote())
    assert {rollout.finish_reason for rollout in local_ray.get(running)} <= {"stop", "length"}


def test_info_tells_process_threads_and_memory(local_ray, actor):
    info = local_ray.get(actor.info.remote())
    assert info["pid"] != os.getpid()
    assert info["omp_num_threads"] == 1
    assert info["max_model_len"] == 512
    assert info["rss_bytes"] > 1 << 20
    assert info["import_seconds"] > 0 and info["init_seconds"] > 0


def test_a_cancelled_call_leaves_nothing_in_the_engine(local_ray, mortal, prompts):
    sampling = {"num_samples": 2, "temperature": 1.0, "max_new_tokens": 400, "step": 1}
    assert local_ray.get(mortal.unfinished_after_cancel.remote(prompts, **sampling)) == 0
    assert len(generate(local_ray, mortal, prompts)) == 8


@pytest.mark.scorecard("R17", tier="full", partly=True)
def test_what_is_not_done_in_time_is_given_up_and_the_actor_serves_on(local_ray, actor, prompts):
    sampling = {"num_samples": 2, "temperature": 1.0, "max_new_tokens": 400, "step": 1}
    with pytest.raises(TimeoutError, match=r"8 responses were not done within rollout.timeout_s=0.05 seconds"):
        local_ray.get(actor.generate_in_time.remote(0.05, prompts, **sampling))
    assert len(generate(local_ray, actor, prompts)) == 8


def test_a_broken_engine_tells_every_caller_and_ends_its_process(local_ray, mortal, prompts):
    pid = local_ray.get(mortal.info.remote())["pid"]
    sampling = {"num_samples": 2, "temperature": 1.0, "max_new_tokens": 400, "step": 1}
    running = [mortal.generate.remote(prompts, **sampling) for _ in range(2)]
    time.sleep(0.2)
    started = time.monotonic()
    local_ray.get(mortal.break_engine.remote())
    for call in running:
        with pytest.raises(RuntimeError, match="broken on purpose"):
            local_ray.get(call)
    assert time.monotonic() - started < EXIT_GRACE_S
    wait_until_gone(pid)


def test_no_process_outlives_a_killed_actor(local_ray, mortal):
    pid = local_ray.get(mortal.info.remote())["pid"]
    family = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    local_ray.kill(mortal, no_restart=False)
    for member in family:
        wait_until_gone(member)


def test_what_the_engine_relies_on_cannot_be_overridden(tiny_model_dir):
    with pytest.raises(ValueError, match="engine.logprobs_mode cannot be set"):
        SteppedEngine(str(tiny_model_dir), stop_token_ids=[0], overrides={"logprobs_mode": "raw_logprobs"})


def test_sample_seeds_are_stable_and_differ_in_every_part():
    seeds = {sample_seed(*parts) for parts in [(1, 2, 3, 4, 5), (0, 2, 3, 4, 5), (1, 0, 3, 4, 5)]}
    seeds |= {sample_seed(*parts) for parts in [(1, 2, 0, 4, 5), (1, 2, 3, 0, 5), (1, 2, 3, 4, 0)]}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(1, 2, 3, 4, 5) == 8694132255577246657


def test_importing_the_role_imports_no_backend():
    code = "import sys, actors.rollout; print(sorted({'vllm', 'ray', 'deepspeed'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
