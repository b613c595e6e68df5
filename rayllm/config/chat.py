"""Config of the `chat` job."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from rayllm.config.base import Config


class ChatConfig(Config):
    url: str = "http://127.0.0.1:8000/v1"
    """Base address of an OpenAI-compatible server, as `rayllm serve` prints it."""

    model: str | None = None
    """Name of the model to talk to. Default: the first that the server lists."""

    temperature: float = Field(0.0, ge=0)
    """Sampling temperature; 0 always takes the most likely token, 1 samples as in RLHF training."""

    max_tokens: int | None = Field(None, ge=1)
    """Longest answer, in tokens. Default: as many as fit into the model's context."""

    system: str | None = None
    """System message to begin with. Default: none."""

    prompt: str | None = None
    """Ask this one thing, print the answer and exit. Default: talk."""

    api_key_file: Path | None = None
    """Text file with the server's key. Default: no key is sent."""

    timeout_s: float = Field(600, gt=0)
    """Seconds to wait for the next piece of an answer."""

    @field_validator("url")
    @classmethod
    def _url(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ValueError(f"got {value!r}; expected an address such as http://127.0.0.1:8000/v1")
        return value.rstrip("/")
