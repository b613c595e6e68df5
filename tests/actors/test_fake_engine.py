"""The fake engine is one: the real engine's surface, the real rollout actor over it, and what it does when it is ill."""

from __future__ import annotations

import asyncio
import inspect
import time

import pytest
import ray
import torch

from actors.proof import Proof
from actors.rollout import RolloutActor
from actors.vllm_async import AsyncEngine
from actors.vllm_engine import VllmEngine
from actors.vllm_stepped import SteppedEngine
from actors.weights import pack, read_safetensors
from rayllm import faults
from rayllm.data.prompts import PromptSpan
from rayllm.faults import Fault, plan, struck
from tests.actors.fake_engine import FakeEngine, FakeEngineActor

SAMPLING = {"num_samples": 2, "temperature": 1.0, "max_new_tokens": 6, "step": 1}


def public(cls: type) -> dict[str, inspect.Signature]:
    """Methods that are called from outside, and their parameters."""
    return {
        name: inspect.signature(member).replace(return_annotation=inspect.Signature.empty)
        for name, member in inspect.getmembers(cls, inspect.isfunction)
        if not name.startswith("_")
    }


def test_the_fake_has_the_surface_of_the_engines(tiny_model_dir):
    assert public(FakeEngine) == public(VllmEngine)
    for engine in (AsyncEngine, SteppedEngine):
        assert public(FakeEngine).keys() <= public(engine).keys()
    fake = FakeEngine(str(tiny_model_dir), stop_token_ids=[], overrides={})
    for name in ("version", "max_model_len", "vocab_size", "import_seconds", "init_seconds"):
        assert hasattr(fake, name)


@pytest.fixture
def make(local_ray, tiny_model_dir, tmp_path):
    """Rollout actors over fake engines in processes of their own, with faults if some are given."""
    made = []

    def actor(*chosen: Fault, timeout_s: float | None = None):
        environment = {"env_vars": plan(tmp_path / "faults", chosen)} if chosen else {}
        options = {"num_cpus": 0.1, "max_concurrency": 20, "runtime_env": environment}
        handle = ray.remote(FakeEngineActor).options(**options).remote(
            str(tiny_model_dir), engine={}, seed=3, timeout_s=timeout_s
        )
        made.append(handle)
        return handle

    yield actor
    for handle in made:
        ray.kill(handle)


PROMPTS = [(7, [5, 6, 7]), (8, [9])]


def here(model) -> FakeEngineActor:
    """The same actor in this process."""
    return FakeEngineActor(str(model), engine={}, seed=3)


def test_the_real_actor_samples_over_it_the_same_for_the_same_seed(tiny_model_dir):
    one, two = here(tiny_model_dir), here(tiny_model_dir)
    found = [asyncio.run(actor.generate(PROMPTS, **SAMPLING)) for actor in (one, two)]
    assert found[0] == found[1] and [r.prompt_id for r in found[0]] == [7, 7, 8, 8]
    assert asyncio.run(one.generate(PROMPTS, **{**SAMPLING, "step": 2})) != found[0]

    async def experience():
        await one.set_prompts([[1, 2], [3]], num_samples=2, temperature=1.0, max_new_tokens=6)
        return await one.experience(PromptSpan(0, 0, 2), step=0)

    assert len(asyncio.run(experience())) == 4


def test_it_takes_weights_and_proves_them_or_not(tiny_model_dir, other_tiny_model_dir):
    bundle, probe = pack(read_safetensors(other_tiny_model_dir), version=4), [1] * 20

    async def synced(mood: str):
        actor, model = here(tiny_model_dir), here(tiny_model_dir)
        await actor.feel(mood)
        await model.update_weights(bundle)

        assert await actor.sync(bundle, probe=probe) == 4
        rollouts, served = await actor.answer("generate", PROMPTS, SAMPLING)
        await Proof(4, [model._engine.prompt_logprobs(probe)], 1e-4).check(served, "it")
        return rollouts.open()

    assert {v for rollout in asyncio.run(synced("well")) for v in rollout.policy_versions} == {4}
    with pytest.raises(RuntimeError, match="does not serve the policy's weights after the sync of version 4"):
        asyncio.run(synced("stale"))


def test_a_proof_that_comes_late_is_not_held_against_newer_weights(tiny_model_dir, other_tiny_model_dir):
    """The probe waits behind other requests until the next sync has replaced the weights."""
    probe = [1] * 20
    bundles = [pack(read_safetensors(model), version=n) for n, model in ((1, tiny_model_dir), (2, other_tiny_model_dir))]

    async def scenario() -> None:
        actor, model = here(tiny_model_dir), here(tiny_model_dir)
        await actor.feel("hangs")
        for bundle in bundles:
            await actor.sync(bundle, probe=probe)
        await model.update_weights(bundles[-1])
        served = asyncio.create_task(actor.served())
        await asyncio.sleep(0.2)
        await actor.feel("well")
        found = await served
        assert found is not None and found.version == 2
        await Proof(2, [model._engine.prompt_logprobs(probe)], 1e-4).check(found, "it")

    asyncio.run(scenario())


@pytest.mark.scorecard("R17", partly=True)
def test_an_engine_that_hangs_ends_at_the_deadline_and_its_actor_still_answers(make, seen):
    actor = make(timeout_s=1.0)
    ray.get(actor.feel.remote("hangs"))
    began = time.monotonic()
    call = actor.generate.remote(PROMPTS, **SAMPLING)
    assert ray.get(actor.version.remote()) == 0  # which is why an answer proves nothing
    with pytest.raises(TimeoutError, match=r"4 responses were not done within rollout.timeout_s=1 seconds"):
        ray.get(call)
    detected = time.monotonic() - began
    ray.get(actor.feel.remote("well"))
    assert len(ray.get(actor.generate.remote(PROMPTS, **SAMPLING))) == 4
    seen("the call ended at its deadline, by name", detected=detected)


def test_faults_strike_in_the_actor_and_name_their_victim(make, tmp_path):
    actor = make(Fault("rollout.generate", "raise", passes=2), Fault("rollout.generate", "kill", passes=3))
    pid = ray.get(actor.info.remote())["pid"]
    assert len(ray.get(actor.generate.remote(PROMPTS, **SAMPLING))) == 4
    with pytest.raises(RuntimeError, match="a fault on purpose at rollout.generate"):
        ray.get(actor.generate.remote(PROMPTS, **SAMPLING))
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(actor.generate.remote(PROMPTS, **SAMPLING))
    assert [(fell.pid, fell.fault.action) for fell in struck(tmp_path / "faults")] == [(pid, "raise"), (pid, "kill")]
    assert faults.carried() == {}


@pytest.mark.scorecard("R53")
def test_weights_with_nan_are_not_handed_out_and_the_last_good_ones_serve_on(tiny_model_dir, seen):
    weights, actor = dict(read_safetensors(tiny_model_dir)), here(tiny_model_dir)
    assert asyncio.run(actor.update_weights(pack(weights.items(), version=1))) == 1
    name = sorted(weights)[1]
    for spoiled in (float("nan"), float("inf")):
        weights[name] = weights[name].clone()
        weights[name].view(-1)[17] = spoiled
        for dtype in (None, torch.bfloat16):
            with pytest.raises(RuntimeError, match=f"weights of version 2 are not handed out: {name} holds NaN or infinity"):
                pack(weights.items(), version=2, dtype=dtype)
    assert asyncio.run(actor.version()) == 1
    assert len(asyncio.run(actor.generate(PROMPTS, **SAMPLING))) == 4
    seen("refused by the name of the tensor before anything was sent; version 1 serves on")


@pytest.mark.scorecard("R41")
def test_one_prompt_that_does_not_fit_harms_no_call_beside_it(tiny_model_dir):
    actor = here(tiny_model_dir)

    async def together(wrong, message):
        good = [asyncio.create_task(actor.generate(PROMPTS, **SAMPLING)) for _ in range(2)]
        with pytest.raises(ValueError, match=f"prompt 9 {message}"):
            await actor.generate([*PROMPTS, (9, wrong)], **SAMPLING)
        return [len(found) for found in await asyncio.gather(*good)]

    for wrong, message in (([1] * 510, "does not fit: 510 tokens"), ([], "is empty"), ([10**6], "has token 1000000")):
        assert asyncio.run(together(wrong, message)) == [4, 4]


def test_the_actor_is_the_real_one():
    overridden = {name for name in vars(FakeEngineActor) if not name.startswith("__")}
    assert overridden == {"make_engine", "feel"}
    assert issubclass(FakeEngineActor, RolloutActor)
