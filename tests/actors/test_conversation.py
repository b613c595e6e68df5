"""Conversations with environments on a real vLLM engine: one actor for the whole module."""

import asyncio
import sys
import threading

import pytest
import torch

from actors.conversation import Conversations
from actors.rollout import RolloutActor
from actors.seeds import sample_seed, turn_seed
from actors.weights import pack, read_safetensors
from rayllm.config.environment import EnvironmentConfig
from rayllm.data.prompts import PromptSpan, PromptStream
from rayllm.data.rollout import collate
from rayllm.data.tokenizer import end_of_text_id
from rayllm.environments.base import Turn
from tests.conftest import TINY_SHAPE

MAX_TURNS = 3
SEED = 11
MAX_NEW_TOKENS = 24
BLOCK = 32
TOLERANCE = 1e-4  # mean |difference| of log-probabilities, nats

GATE = threading.Event()
at_gate = 0


class Scripted:
    """Turn t is answered with ``row["script"][t]``: an observation, an Ellipsis when done, or the name of a mishap."""

    def reset(self, row, *, seed):
        self.script = iter(row["script"])
        self.turn = 0
        if row["prompt"] == "hang":
            threading.Event().wait()
        return row["prompt"]

    def step(self, response):
        global at_gate
        assert response.text == response.text.strip() and "<|im_end|>" not in response.text
        answer = next(self.script)
        self.turn += 1
        if isinstance(answer, str) and hasattr(self, answer):
            return getattr(self, answer)()
        if answer == "wait at the gate":
            at_gate += 1
            GATE.wait()
        if answer == "open the gate":
            GATE.set()
        if answer is ...:
            return Turn(reward=10.0, done=True)
        return Turn(observation=answer, reward=self.turn + 0.5)

    async def later(self):
        await asyncio.sleep(0.01)
        return Turn(observation="later", reward=self.turn + 0.5)

    def hang(self):
        threading.Event().wait()

    async def hang_in_the_loop(self):
        await asyncio.Event().wait()

    def fail(self):
        raise KeyError("no such tool")

    def leave(self):
        sys.exit("usage: tool [-h]")

    def be_late(self):
        raise TimeoutError("the tool was late")

    def babble(self):
        return "not a turn"

    def nan(self):
        return Turn(observation="x", reward=float("nan"))


class ProbedActor(RolloutActor):
    """A rollout actor with handles that only tests need."""

    async def use(self, config, tokenizer):
        self._conversations = Conversations(config, self._engine, tokenizer, where="here")

    async def shut_gate(self):
        global at_gate
        GATE.clear()
        at_gate = 0

    async def open_gate_after_update(self, bundle, *, waiting):
        while at_gate < waiting:
            await asyncio.sleep(0.01)
        await self.update_weights(bundle)
        GATE.set()

    async def unfinished(self):
        """Requests in the engine, after all that was queued before."""
        await self.load(self.model_dir)
        return self._engine._llm.get_num_unfinished_requests() + len(self._engine._calls)

    async def watch_cache(self):
        """From now on, note (tokens asked with, of them cached) of every request."""
        self.seen, step = [], self._engine._llm.step

        def watched():
            outputs = step()
            self.seen += [(len(output.prompt_token_ids), output.num_cached_tokens) for output in outputs]
            return outputs

        self._engine._llm.step = watched

    async def cache_seen(self):
        return self.seen

    def __init__(self, model_dir, **settings):
        self.model_dir = model_dir
        super().__init__(model_dir, **settings)


def write_model(folder, tokenizer, seed):
    """A random model that ends about four turns of five within MAX_NEW_TOKENS."""
    from rayllm.models.loading import create_causal_lm, save_model

    model = create_causal_lm("qwen3", tokenizer, {**TINY_SHAPE, "initializer_range": 0.2}, seed=seed)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.eos_token_id] *= 3
    save_model(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer):
    """Two such models."""
    return [write_model(tmp_path_factory.mktemp(f"talkative-{seed}"), tiny_tokenizer, seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def models(folders):
    """The same by transformers, in float32."""
    from rayllm.models.loading import load_causal_lm

    return [load_causal_lm(folder) for folder in folders]


@pytest.fixture(scope="module")
def started(local_ray, folders):
    environment = EnvironmentConfig(name=f"{__name__}:Scripted", max_turns=MAX_TURNS, timeout_s=5)
    options = {"num_cpus": 1, "max_concurrency": 100}
    remote = local_ray.remote(ProbedActor).options(**options)
    handle = remote.remote(str(folders[0]), engine={}, seed=SEED, environment=environment)
    local_ray.get(handle.info.remote())
    yield handle
    local_ray.kill(handle)


@pytest.fixture
def actor(local_ray, started, folders):
    """One that serves the first model as version 0."""
    assert local_ray.get(started.load.remote(str(folders[0]))) == 0
    return started


def converse(ray, actor, rows, **changes):
    prompts = [(100 + number, row) for number, row in enumerate(rows)]
    sampling = {"num_samples": 8, "temperature": 1.0, "max_new_tokens": MAX_NEW_TOKENS, "step": 1, **changes}
    return ray.get(actor.converse.remote(prompts, **sampling))


def script(*answers, prompt="Hi!"):
    return {"prompt": prompt, "script": answers}


ROWS = [
    script("One.", "Two.", "Three."),
    script([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "So?"}], ..., prompt="What is 2 plus 3?"),
    script("later", "later", ..., prompt=[{"role": "user", "content": "Snow?"}]),
]


def logprob_differences(model, rollout, turns, *, temperature):
    """|sampler - transformers| of the sampled tokens of some turns, by one forward pass over the whole sequence."""
    ids = torch.tensor([rollout.prompt_token_ids + rollout.token_ids])
    with torch.no_grad():
        logprobs = (model(ids).logits[0].float() / temperature).log_softmax(-1)
    differences, place = [], 0
    for number, turn in enumerate(rollout.turns):
        for at in range(turn.start, turn.end):
            t = len(rollout.prompt_token_ids) + at
            if number in turns:
                differences.append(abs(logprobs[t - 1, ids[0, t]].item() - rollout.logprobs[place]))
            place += 1
    return torch.tensor(differences)


def test_logprobs_of_every_turn_are_those_of_one_pass_over_the_whole_sequence(local_ray, actor, models):
    for temperature in (1.0, 0.7):
        rollouts = converse(local_ray, actor, ROWS, temperature=temperature)
        assert sum(len(rollout.turns) == 3 for rollout in rollouts) >= 4
        for rollout in rollouts:
            differences = logprob_differences(models[0], rollout, (0, 1, 2), temperature=temperature)
            assert len(differences) == len(rollout.logprobs)
            assert differences.mean() < TOLERANCE


def test_what_stands_between_the_turns_is_the_observation_in_the_templates_frame(local_ray, actor, tiny_tokenizer):
    rollouts = converse(local_ray, actor, ROWS)
    assert [r.prompt_id for r in rollouts] == [number for number in (100, 101, 102) for _ in range(8)]
    said = {
        100: ["user\nOne.", "user\nTwo."],
        101: ["system\nBe brief.<|im_end|>\n<|im_start|>user\nSo?"],
        102: ["user\nlater", "user\nlater"],
    }
    for rollout in rollouts:
        assert rollout.turns[0].start == 0 and rollout.turns[-1].end == len(rollout.token_ids)
        for turn, following, observation in zip(
            rollout.turns, rollout.turns[1:], said[rollout.prompt_id], strict=False
        ):
            between = tiny_tokenizer.decode(rollout.token_ids[turn.end : following.start])
            assert between == f"\n<|im_start|>{observation}<|im_end|>\n<|im_start|>assistant\n"
            assert rollout.token_ids[turn.end - 1] == tiny_tokenizer.eos_token_id
    assert tiny_tokenizer.decode(rollouts[0].prompt_token_ids) == "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"


def test_masks_and_rewards_of_the_batch_against_a_walk_token_by_token(local_ray, actor):
    sampling = {"num_samples": 8, "temperature": 1.0, "max_new_tokens": MAX_NEW_TOKENS}
    local_ray.get(actor.set_prompts.remote(ROWS, **sampling))
    span = PromptSpan(epoch=0, start=0, count=len(ROWS))
    batch = local_ray.get(actor.experience.remote(span, step=4))
    ids = PromptStream(len(ROWS), seed=SEED).ids(span)
    rollouts = local_ray.get(actor.converse.remote([(i, ROWS[i]) for i in ids], step=4, **sampling))
    assert batch.prompt_ids.tolist() == [i for i in ids for _ in range(8)]
    for row, rollout in enumerate(rollouts):
        logprobs = iter(rollout.logprobs)
        last_tokens = {turn.end - 1: turn.reward for turn in rollout.turns}
        for t in range(batch.sequences.shape[1]):
            at = t - len(rollout.prompt_token_ids)
            sampled = any(turn.start <= at < turn.end for turn in rollout.turns)
            assert batch.action_mask[row, t] == sampled
            assert batch.turn_rewards[row, t] == last_tokens.get(at, 0)
            assert batch.rollout_logprobs[row, t] == pytest.approx(next(logprobs) if sampled else 0)
            if sampled:
                assert batch.sequences[row, t] == rollout.token_ids[at]
    assert (batch.turn_rewards != 0).sum(1).max() == 3
    of_first = batch.turn_rewards[batch.prompt_ids == 0]
    assert of_first[of_first != 0].unique().tolist() == [1.5, 2.5, 3.5]


def test_why_a_conversation_ends(local_ray, actor, tiny_tokenizer):
    rows = [ROWS[0], script(..., prompt="Hello")]
    rollouts = converse(local_ray, actor, rows, num_samples=24)
    end_of_turn, end_of_text = tiny_tokenizer.eos_token_id, end_of_text_id(tiny_tokenizer)
    for rollout in rollouts:
        last, last_token = rollout.turns[-1], rollout.token_ids[-1]
        done = rollout.prompt_id == 101
        # The environment's reward for the last turn counts, whatever ended it.
        assert [turn.reward for turn in rollout.turns] == ([10] if done else [1.5, 2.5, 3.5][: len(rollout.turns)])
        if last_token not in (end_of_turn, end_of_text):
            assert rollout.finish_reason == "length" and last.end - last.start == MAX_NEW_TOKENS
        elif last_token == end_of_text or done:  # nothing can follow an end of text
            assert rollout.finish_reason == "stop"
        else:
            assert rollout.finish_reason == "max_turns" and len(rollout.turns) == MAX_TURNS
        assert rollout.stopped == (rollout.finish_reason != "length")
    assert {r.finish_reason for r in rollouts} == {"length", "stop", "max_turns"}


def test_a_turn_begins_only_where_all_its_tokens_have_room(local_ray, actor):
    (first, *_) = (r for r in converse(local_ray, actor, [ROWS[0]]) if len(r.turns) > 1)
    end = len(first.prompt_token_ids) + first.turns[0].end
    for extra, num_turns in ((0, 2), (1, 1)):
        observation = [5] * (512 - end - MAX_NEW_TOKENS + extra)
        rollouts = converse(local_ray, actor, [script(observation, ...)])
        (same,) = (r for r in rollouts if r.token_ids[: first.turns[0].end] == first.token_ids[: first.turns[0].end])
        assert len(same.turns) == num_turns
        if num_turns == 1:
            assert same.finish_reason == "max_model_len" and same.stopped
            assert len(same.token_ids) == same.turns[0].end  # nothing behind the policy's last token
        else:
            assert same.token_ids[same.turns[0].end : same.turns[1].start] == tuple(observation)


def test_a_run_can_be_replayed(local_ray, actor):
    rollouts = converse(local_ray, actor, ROWS)
    assert converse(local_ray, actor, ROWS) == rollouts
    alone = [(101, ROWS[1])]
    sampling = {"num_samples": 8, "temperature": 1.0, "max_new_tokens": MAX_NEW_TOKENS}
    assert local_ray.get(actor.converse.remote(alone, step=1, **sampling)) == rollouts[8:16]
    assert len({rollout.token_ids for rollout in rollouts[:8]}) == 8
    assert converse(local_ray, actor, ROWS, step=2) != rollouts


def test_a_conversation_waits_for_nobody(local_ray, actor):
    # The first goes on only after the second's second turn, of the same call: a barrier would hold both for ever.
    local_ray.get(actor.shut_gate.remote())
    rows = [script("wait at the gate", ...), script("go on", "open the gate", ...)]
    rollouts = converse(local_ray, actor, rows, num_samples=12)
    assert {10.0} <= {rollout.turns[-1].reward for rollout in rollouts[:12]}


def test_turns_after_an_update_are_of_the_new_weights(local_ray, actor, models, folders):
    local_ray.get(actor.shut_gate.remote())
    bundle = pack(read_safetensors(folders[1]), version=1)
    update = actor.open_gate_after_update.remote(bundle, waiting=8)
    rollouts = converse(local_ray, actor, [script("wait at the gate", ...)])
    local_ray.get(update)
    continued = [rollout for rollout in rollouts if len(rollout.turns) == 2]
    assert continued
    for rollout in continued:
        assert set(rollout.policy_versions) == {0, 1} and sorted(rollout.policy_versions) == list(rollout.policy_versions)
        for model, turn in zip(models, (0, 1), strict=True):
            assert logprob_differences(model, rollout, (turn,), temperature=1.0).mean() < TOLERANCE


def test_a_continuation_finds_what_was_said_in_the_prefix_cache(local_ray, actor):
    local_ray.get(actor.watch_cache.remote())
    (rollout,) = converse(local_ray, actor, [script([5] * 100, [6] * 100, ..., prompt=[7] * 70)], num_samples=1, step=3)
    seen = local_ray.get(actor.cache_seen.remote())
    assert len(seen) == len(rollout.turns) > 1
    for turn, (asked, cached) in zip(rollout.turns, seen[1:], strict=False):
        said = len(rollout.prompt_token_ids) + turn.end
        assert asked == said + 100
        assert cached >= (said - 1) // BLOCK * BLOCK


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (script("fail"), r"prompt 101, turn 0: KeyError\('no such tool'\)"),
        (script("fine", "fail"), r"prompt 101, turn 1: KeyError\('no such tool'\)"),
        (script(), r"prompt 101, turn 0: RuntimeError\('coroutine raised StopIteration'\)"),
        (script("leave"), r"prompt 101, turn 0: SystemExit\('usage: tool \[-h\]'\)"),
        (script("be_late"), r"prompt 101, turn 0: TimeoutError\('the tool was late'\)"),
        (script("babble"), r"prompt 101, turn 0: TypeError\(.step returned 'not a turn', must return a Turn"),
        (script("nan"), "prompt 101, turn 0: ValueError.*reward is nan"),
        (script(""), "prompt 101, turn 0: ValueError.*observation is empty"),
        (script([{"role": "oracle", "content": "x"}]), "prompt 101, turn 0: ValueError.*unknown role 'oracle'"),
        (script([5, 10**6]), "prompt 101, turn 0: ValueError.*the observation has token 1000000, outside"),
        (script(prompt=[5, -1]), "prompt 101, reset: ValueError.*the prompt has token -1, outside"),
        (script(prompt=[5] * 500), "prompt 101, reset: ValueError.*the prompt does not fit: 500 tokens"),
        (script(prompt=" "), "prompt 101, reset: ValueError.*empty"),
        ({"prompt": "Hi!"}, r"prompt 101, reset: KeyError\('script'\)"),
    ],
)
def test_an_environment_that_fails_is_named_and_the_actor_serves_on(local_ray, actor, row, message):
    with pytest.raises(RuntimeError, match=f"environment {__name__}:Scripted: {message}"):
        converse(local_ray, actor, [ROWS[0], row], num_samples=4)
    assert local_ray.get(actor.unfinished.remote()) == 0


def test_an_environment_that_hangs_is_cut_off(local_ray, actor):
    rows = {"turn 0": script("hang"), "turn 0 ": script("hang_in_the_loop"), "reset": script(prompt="hang")}
    sampling = {"num_samples": 4, "temperature": 1.0, "max_new_tokens": MAX_NEW_TOKENS, "step": 1}
    hanging = {where: actor.converse.remote([(7, row)], **sampling) for where, row in rows.items()}
    assert len(converse(local_ray, actor, ROWS)) == 24
    for where, call in hanging.items():
        with pytest.raises(RuntimeError, match=rf"prompt 7, {where.strip()}: TimeoutError\('no answer within environment.timeout_s=5'"):
            local_ray.get(call)
    assert local_ray.get(actor.unfinished.remote()) == 0


def test_settings_out_of_range_are_refused(local_ray, actor):
    for name, value in {"num_samples": 0, "max_new_tokens": 0, "temperature": -1.0}.items():
        with pytest.raises(ValueError, match=f"{name}={value}"):
            converse(local_ray, actor, ROWS, **{name: value})
    assert converse(local_ray, actor, []) == []


@pytest.mark.parametrize("name", ["calculator", "guess_number"])
def test_shipped_environments_play(local_ray, actor, tiny_tokenizer, name):
    from rayllm.environments.loading import load_environment, make_prompts

    local_ray.get(actor.use.remote(EnvironmentConfig(name=name), tiny_tokenizer))
    rollouts = converse(local_ray, actor, make_prompts(load_environment(name), 4, seed=0))
    assert len(rollouts) == 32
    batch = collate(rollouts, pad_token_id=tiny_tokenizer.pad_token_id)
    assert batch.turn_rewards.shape == batch.sequences.shape
    if name == "guess_number":
        assert max(len(rollout.turns) for rollout in rollouts) > 2
        assert all(turn.reward in (-0.05, 0.95) for rollout in rollouts for turn in rollout.turns)


def test_seeds_of_turns_are_stable_and_differ():
    seed = sample_seed(1, 2, 3, 4, 5)
    assert len({seed, turn_seed(seed, 0), turn_seed(seed, 1), turn_seed(seed + 1, 0)}) == 4
    assert 0 <= turn_seed(seed, 0) < 2**63
