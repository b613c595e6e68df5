"""The arithmetic that `rayllm ppo --explain` prints, against numbers worked out by hand."""

from __future__ import annotations

from jobs.ppo_explain import lines
from rayllm.config.base import load_config
from rayllm.config.ppo import PPOConfig
from tests.jobs.conftest import rayllm

KEYS = ["run_dir=r", "model=m", "reward_model=rm", "prompts=p"]


def numbers(*overrides: str) -> dict[str, str]:
    return {what: number for what, number, _ in lines(load_config(PPOConfig, None, [*KEYS, *overrides]).config)}


def test_by_hand():
    # 24 prompts x 4 = 96 responses; 2 ranks of 48; 5 minibatches of 9 or 10; micro-batches of 4: ceil(10 / 4) = 3.
    found = numbers(
        "prompts_per_step=24", "samples_per_prompt=4", "algorithm.num_epochs=3", "algorithm.num_minibatches=5",
        "policy.num_actors=2", "critic.num_actors=2", "policy.micro_batch_size=4", "num_steps=10",
        "rollout.max_new_tokens=50", "critic.warmup_steps=2",
    )  # fmt: skip
    assert found["responses a step"] == "96" and found["response tokens a step"] == "at most 4,800"
    assert found["shards"] == "2" and found["optimizer steps a step"] == "15"
    assert found["policy: responses a rank"] == "48" and found["policy: minibatch a rank"] == "9 to 10"
    assert found["policy: micro-batches"] == "3"
    assert found["optimizer steps in all"] == "120" and found["responses in all"] == "960"  # (10 - 2) x 15


def test_without_a_critic_nothing_is_said_of_it():
    found = numbers("algorithm.advantage=grpo", "samples_per_prompt=8")
    assert not [what for what in found if "critic" in what]
    assert found["optimizer steps in all"] == str(40 * 6)


def test_the_command_prints_it_and_refuses_what_does_not_divide():
    done = rayllm("ppo", *KEYS, "--explain", "prompts_per_step=96")
    assert done.returncode == 0 and "responses a step" in done.stdout
    refused = rayllm("ppo", *KEYS, "--explain", "prompts_per_step=97")
    assert refused.returncode == 2 and "nearest that does: prompts_per_step=96" in " ".join(refused.stdout.split())
