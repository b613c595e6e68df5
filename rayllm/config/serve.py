"""Config of the `serve` job."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from rayllm.config.base import Config

_OWN_KEYS = {
    "model": "model",
    "served_model_name": "served_model_name",
    "max_model_len": "max_model_len",
    "host": "host",
    "port": "port",
    "api_key": "api_key_file",
}
"""vLLM argument -> the key of this config that sets it."""


class ServeConfig(Config):
    model: Path
    """Folder of the model to serve, in Hugging Face format (safetensors)."""

    served_model_name: str | None = Field(None, min_length=1)
    """Name that clients give as "model". Default: the stage in its lineage, else its folder's name."""

    host: str = "127.0.0.1"
    """Address to listen on. 127.0.0.1: this machine only; 0.0.0.0: every network (needs api_key_file)."""

    port: int = Field(8000, ge=1, le=65535)
    """TCP port to listen on."""

    num_replicas: int = Field(1, ge=1)
    """Copies of the model, each with its own engine; requests go to the less busy ones."""

    max_concurrent_requests: int = Field(64, ge=1)
    """Requests that one replica works on at a time; more wait in a queue."""

    max_queued_requests: int = Field(256, ge=1)
    """Requests that wait at most, over all replicas; more get HTTP 503 with Retry-After."""

    cpus_per_replica: int = Field(1, ge=1)
    """CPUs that Ray reserves for each replica; without a GPU also the threads that it computes with."""

    gpus_per_replica: int = Field(0, ge=0)
    """GPUs of each replica; 0 serves on CPU, 2 or more splits the model over them (tensor parallel)."""

    max_model_len: int | None = Field(None, ge=1)
    """Longest prompt plus answer, in tokens. Default: what the model was made for."""

    start_timeout_s: float = Field(1800, gt=0)
    """Seconds that the replicas may take to load and answer before the job gives up."""

    engine: dict[str, Any] = {}
    """More engine and server arguments by vLLM's own names, such as {kv_cache_memory_bytes: 2147483648}."""

    api_key_file: Path | None = None
    """Text file with the key that clients must send as bearer token. Default: no key is asked for."""

    @model_validator(mode="after")
    def _check(self) -> ServeConfig:
        if self.api_key_file is None and not is_loopback(self.host):
            raise ValueError(
                f"host={self.host} can be reached from other machines and api_key_file is not set; "
                "set api_key_file to a file with a key, or host=127.0.0.1"
            )
        for name in self.engine:
            if name in _OWN_KEYS:
                raise ValueError(f"engine.{name}: set {_OWN_KEYS[name]} instead")
        return self


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
