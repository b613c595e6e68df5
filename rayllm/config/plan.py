"""Config of the `plan` job."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rayllm.config.base import Config


class ClusterConfig(Config):
    """The machines. With --address they are those of a live cluster, and only what is set here goes over them."""

    nodes: int = Field(1, ge=1)
    """Machines with GPUs, all alike (without GPUs: machines)."""

    gpus_per_node: int = Field(8, ge=0)
    """GPUs of each; 0 computes on CPU."""

    gpu: str = "h100"
    """Kind of GPU: l4, a10g, rtx-4090, a100-40gb, l40s, a100-80gb, h100, h200, b200."""

    gpu_memory_gib: float | None = Field(None, gt=0)
    """Memory of a GPU; null: of its kind."""

    gpu_tflops: float | None = Field(None, gt=0)
    """Its dense bfloat16 operations in 10^12 a second; null: of its kind."""

    gpu_bandwidth_gb_s: float | None = Field(None, gt=0)
    """Of its memory, in 10^9 bytes a second; null: of its kind."""

    link_gb_s: float | None = Field(None, gt=0)
    """Between two GPUs of a node, each way; null: of its kind."""

    network_gbit_s: float = Field(400, gt=0)
    """Between two nodes, each way, in 10^9 bits a second: all cards of a node together."""

    cpus_per_node: float = Field(96, gt=0)
    """CPUs of each."""

    memory_gib: float = Field(1024, gt=0)
    """Host memory of each."""

    cpu_gflops: float = Field(65, gt=0)
    """float32 operations of one core, in 10^9 a second; 65 was measured on a core of an AMD EPYC (Zen 4) server."""

    cpu_bandwidth_gb_s: float = Field(10, gt=0)
    """Memory bandwidth of one core, in 10^9 bytes a second."""

    price_per_gpu_hour: float | None = Field(None, gt=0)
    """Of one GPU, or without GPUs of one node, in any currency; null: no cost is shown."""


class WorkloadConfig(Config):
    """What the config of a run leaves to its data."""

    prompt_tokens: int = Field(256, ge=1)
    """Tokens of a usual prompt (ppo)."""

    longest_prompt_tokens: int | None = Field(None, ge=1)
    """Of the longest, which the memory must hold; null: as prompt_tokens."""

    response_tokens: int | None = Field(None, ge=1)
    """Tokens of a usual response (ppo); null: rollout.max_new_tokens, the most it can be."""

    row_tokens: int | None = Field(None, ge=1)
    """Tokens of a usual row (sft, reward-model); null: max_length."""

    responses_per_prompt: int = Field(4, ge=2)
    """Ranked responses to one prompt (reward-model)."""

    @model_validator(mode="after")
    def _ordered(self) -> WorkloadConfig:
        longest = self.longest_prompt_tokens
        if longest is not None and longest < self.prompt_tokens:
            raise ValueError(
                f"workload.longest_prompt_tokens={longest} is less than workload.prompt_tokens={self.prompt_tokens}; "
                "raise it or lower the other"
            )
        return self


class PlanConfig(Config):
    job: Literal["ppo", "sft", "pretrain", "reward-model"] = "ppo"
    """What is to be run."""

    config: tuple[Path, ...] = ()
    """The run's own YAML files, as `--config` of that job takes them: later ones go over earlier ones."""

    settings: dict[str, Any] = {}
    """Settings of that job over its files, such as settings.policy.num_actors=8. Paths to data may be left out. A model
    is a folder, hf://ORG/NAME, or a known name such as qwen2.5-7b."""

    cluster: ClusterConfig = ClusterConfig()
    workload: WorkloadConfig = WorkloadConfig()

    advice: bool = True
    """Look for the nearest changes where something does not fit, and for the split of the GPUs that balances the
    phases."""

    @field_validator("config", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | Path) else value

    @field_validator("config", mode="after")
    @classmethod
    def _absolute_paths(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        return tuple(path.expanduser().absolute() for path in value)
