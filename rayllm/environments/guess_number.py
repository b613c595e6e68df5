"""Guess the number: every wrong guess is answered with "higher" or "lower"."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

from rayllm.data.chat import Message, prompt_messages
from rayllm.data.files import Row
from rayllm.environments.base import Response, Turn

MAX_DIGITS = 18
"""Of a number that is read as a guess; Python refuses to read very long ones."""


class GuessNumber:
    """A secret number, to be found in few turns.

    Every turn costs ``turn_cost``; the turn that names the number earns 1 besides and ends the game. A turn must name
    exactly one number. A turn that was cut finds nothing.

    Args:
        low, high: the secret lies between them, both included.
        turn_cost: reward taken off for each turn, not negative.

    Rows hold ``prompt`` and ``secret``.
    """

    def __init__(self, *, low: int = 1, high: int = 20, turn_cost: float = 0.05) -> None:
        if not 0 <= low < high:
            raise ValueError(f"low={low} and high={high} must be two numbers from 0 on, the smaller first")
        if turn_cost < 0:
            raise ValueError(f"turn_cost is {turn_cost}, must not be negative")
        self._low, self._high = low, high
        self._turn_cost = turn_cost
        self._secret = low

    def prompts(self, num: int, *, seed: int) -> list[Row]:
        rng = random.Random(f"guess-number-{seed}")
        text = f"Guess my number. It is between {self._low} and {self._high}."
        message = {"role": "user", "content": text}
        return [{"prompt": [message], "secret": rng.randint(self._low, self._high)} for _ in range(num)]

    def reset(self, row: Mapping[str, Any], *, seed: int) -> list[Message]:
        self._secret = int(row["secret"])
        return prompt_messages(row["prompt"])

    def step(self, response: Response) -> Turn:
        guess = _read_guess(response.text) if response.stopped else None
        if guess == self._secret:
            return Turn(reward=1.0 - self._turn_cost, done=True)
        if guess is None:
            return Turn(observation="Please say one number.", reward=-self._turn_cost)
        comparison = "higher" if self._secret > guess else "lower"
        return Turn(observation=f"My number is {comparison} than {guess}.", reward=-self._turn_cost)


def _read_guess(text: str) -> int | None:
    """The one number in the text; None when there is none, or several to choose from."""
    numbers = set(re.findall(r"-?\d+", text, flags=re.ASCII))
    if len(numbers) != 1:
        return None
    (number,) = numbers
    return int(number) if len(number) <= MAX_DIGITS else None
