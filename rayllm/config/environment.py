"""Section of the jobs that sample conversations."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from rayllm.config.base import Config


class EnvironmentConfig(Config):
    name: str | None = None
    """Environment that answers the policy's turns: calculator, guess_number, or module:Class of your own. null samples
    one response per prompt, without an environment."""

    options: dict[str, Any] = {}
    """Keyword arguments of the environment's class."""

    max_turns: int = Field(8, ge=1)
    """Turns of the policy after which a conversation ends, done or not."""

    timeout_s: float = Field(60.0, gt=0)
    """Seconds that the environment may take for one answer; a later one stops the run."""
