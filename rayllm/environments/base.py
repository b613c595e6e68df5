"""What a policy converses with: a tool, a game, a simulated user.

One object plays one conversation. ``reset`` gives the prompt, then ``step`` answers every turn of the policy until it
says ``done``. Both may be plain methods (each call runs in a thread of its own) or coroutines (they run in the rollout
actor's event loop and must not block it; better where hundreds of conversations wait for a network at once). Calls to
one object never overlap. A call has a deadline, and one that raises or is late stops the run: a conversation that went
missing would bias what is learned. An environment that wants to live with a tool's failure catches it and says so in
its observation.

The constructor takes the options and keeps them; work belongs into ``reset``.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from rayllm.data.chat import Message
from rayllm.data.files import Row

Speech = str | list[Message] | list[int]
"""What an environment says: text (one user turn), messages, or token ids.

Text and messages are put into the chat template's frame and encoded once. Token ids stand in the conversation as they
are: an observation of this kind holds everything from behind the policy's end-of-turn token to the start of its next
turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """One turn of the policy."""

    text: str
    """Decoded, special tokens and surrounding blanks left out."""

    token_ids: tuple[int, ...]
    """As sampled, end-of-turn token included."""

    stopped: bool
    """The policy ended its turn; False: cut at max_new_tokens. A conversation ends with a turn that was cut, whatever
    the environment answers; the reward counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """An environment's answer to one turn of the policy.

    Raises:
        ValueError: the reward is not a finite number, or there is nothing to go on with.
    """

    observation: Speech = ""
    """What the policy reads next; not used when ``done``."""

    reward: float = 0.0
    """Of this turn alone."""

    done: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.reward):
            raise ValueError(f"Turn.reward is {self.reward}, must be a finite number")
        if not self.done and not self.observation:
            raise ValueError("Turn.observation is empty although Turn.done is False")


@runtime_checkable
class Environment(Protocol):
    """One conversation's other side."""

    def reset(self, row: Mapping[str, Any], *, seed: int) -> Speech | Awaitable[Speech]:
        """Begin; returns the prompt.

        Args:
            row: all columns of the prompt's row, ``prompt`` among them.
            seed: of the environment's own randomness; differs between the samples of a prompt. What the samples of
                a prompt are compared on (the question, the secret) belongs into the row.
        """

    def step(self, response: Response) -> Turn | Awaitable[Turn]:
        """Answer the policy's turn."""


@runtime_checkable
class MakesPrompts(Protocol):
    """An environment that needs no prompt file."""

    def prompts(self, num: int, *, seed: int) -> list[Row]:
        """Rows for ``reset``, independent draws: they may repeat, under another seed too."""
