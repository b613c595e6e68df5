"""The RL loop of `jobs/ppo.py` as it is, over fake engines and models: the real driver, dispatcher, rollout actors,
syncs, rewards and log, and steps of milliseconds. Policy, critic, reference and reward model answer at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from actors.fleet import RolloutFleet, probe_tokens
from actors.group import ActorGroup, Role
from actors.health import Deadlines
from actors.member import Call
from actors.publishing import Published
from actors.supervisor import Blueprint, Size
from actors.watched import shell
from actors.weights import read_safetensors
from bench.fakes import FakeModelActor, FakeSourceActor
from jobs.ppo import train
from jobs.ppo_batches import Batches
from jobs.ppo_rewards import RewardGroups
from jobs.ppo_roles import Roles
from jobs.ppo_watch import Controls, Watch
from rayllm.config.base import load_config
from rayllm.config.ppo import PPOConfig
from rayllm.data.prompts import PromptData
from rayllm.models.folders import vocabulary_size
from rayllm.report.run import Run
from rayllm.report.terminal import Progress
from tests.actors.fake_engine import FakeEngineActor

CPUS = 0.05
NUM_PROMPTS = 64


class FakeLearnerActor(FakeModelActor):
    """Publishes the model's own weights, a little further at every version, and says what a fake engine would."""

    def __init__(self, *, model: str) -> None:
        super().__init__()
        self.weights, self.vocab_size = dict(read_safetensors(model)), vocabulary_size(Path(model))

    def publish_weights(self, version: int, *, dtype: str, nodes: list[str]) -> Published:
        self.weights = {name: tensor + 1e-3 for name, tensor in self.weights.items()}
        return self.publisher.publish(self.weights.items(), version=version, nodes=nodes)

    def text_logprobs(self, token_ids: list[int], after: None = None) -> list[float]:
        digest = sum(float(tensor.abs().mean()) for tensor in self.weights.values())
        return [-math.log(self.vocab_size) + digest] * (len(token_ids) - 1)

    def values(self, shard: Any) -> torch.Tensor:
        return torch.zeros(shard.sequences.shape)


@dataclass
class FakeRun:
    """A run that is ready to train."""

    config: PPOConfig
    roles: Roles
    batches: Batches
    controls: Controls
    watch: Watch
    job: Run

    def train(self) -> None:
        train(self.roles, self.batches, self.controls, self.config, self.watch)


@contextmanager
def fake_run(folder: Path, model: Path, *settings: str) -> Iterator[FakeRun]:
    """A PPO run in ``folder``; needs a Ray session. ``settings`` are the job's own."""
    (folder / "input").mkdir(parents=True, exist_ok=True)
    (folder / "input/prompts").write_text("stands for the prompts: nothing reads it")
    keys = [
        f"run_dir={folder / 'run'}", f"model={model}", f"reward_model={model}", f"prompts={folder / 'input/prompts'}",
        "prompts_per_step=8", "rollout.max_new_tokens=8", "algorithm.num_minibatches=1", "checkpoint.every_steps=1000000",
        "eval.every_steps=1000000", *settings,
    ]  # fmt: skip
    loaded = load_config(PPOConfig, None, keys)
    config = loaded.config
    arguments = {"model_dir": str(model), "engine": {}, "seed": config.seed, "timeout_s": config.rollout.timeout_s}
    prompts = PromptData([{}] * NUM_PROMPTS, [[n % 200, n] for n in range(NUM_PROMPTS)], {})
    sampling = {
        "num_samples": config.samples_per_prompt, "temperature": config.rollout.temperature,
        "max_new_tokens": config.rollout.max_new_tokens,
    }  # fmt: skip
    setup = [Call(FakeEngineActor.set_prompts.__name__, (prompts.token_ids,), sampling)]
    role, count = Role("rollout", config.rollout.num_actors, CPUS, 0), config.rollout.num_actors
    rollout = RolloutFleet(
        Blueprint(role, shell(FakeEngineActor), lambda number: arguments, setup),
        Size(start=count, least=1, most=count, max_restarts=config.rollout.max_restarts, wait_s=0.0),
        Deadlines(start_s=config.rollout.stall_s, work_s=config.rollout.stall_s),
    )
    others = {
        name: ActorGroup(Role(name, 1, CPUS, 0), FakeLearnerActor, lambda rank: {"model": str(model)})
        for name in ("policy", "critic", "reference")
    }
    scorer = ActorGroup(Role("reward", 1, CPUS, 0), FakeSourceActor, lambda rank: {})
    reward = RewardGroups(config.reward, {"model": scorer})
    try:
        probe = probe_tokens(vocabulary_size(model), 512)
        roles = Roles(config=config, rollout=rollout, reward=reward, probe=probe, **others)
        roles.sync_weights(version=0)
        batches, controls = Batches(roles, prompts, config), Controls(config)
        with Run("ppo", loaded) as job, (folder / "screen").open("w") as screen:
            progress = Progress(Console(file=screen), "ppo", config.num_steps)
            watch = Watch(job, config, roles, batches, controls, progress, None, None)
            yield FakeRun(config, roles, batches, controls, watch, job)
    finally:
        for group in (rollout, *others.values(), *reward.groups.values()):
            group.stop()
