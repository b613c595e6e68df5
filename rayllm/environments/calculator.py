"""Sums that are too big for a small model's head, with a calculator at hand."""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Mapping
from typing import Any

from rayllm.data.chat import Message, prompt_messages
from rayllm.data.files import Row
from rayllm.environments.arithmetic import evaluate, format_number
from rayllm.environments.base import Response, Turn

OPERATIONS = {"plus": operator.add, "minus": operator.sub, "times": operator.mul}
HINT = "You can ask a calculator: <calc>3+4</calc>"

_CALL = re.compile(r"<calc>(.*?)</calc>", flags=re.DOTALL)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?", flags=re.ASCII)


class Calculator:
    """A question as the toy world asks it ("What is 37 plus 58?"), and a calculator to ask before answering.

    A turn with ``<calc>...</calc>`` is a call: the next turn begins with its value. Any other turn is the answer: 1 if
    its last number is right, else 0. A turn that was cut earns 0.

    Args:
        max_number: the largest number in a generated question, at least 1.

    Rows hold ``prompt`` and ``answer``.
    """

    def __init__(self, *, max_number: int = 99) -> None:
        if max_number < 1:
            raise ValueError(f"max_number is {max_number}, must be at least 1")
        self._max_number = max_number
        self._answer = ""

    def prompts(self, num: int, *, seed: int) -> list[Row]:
        rng = random.Random(f"calculator-{seed}")
        return [self._draw_row(rng) for _ in range(num)]

    def _draw_row(self, rng: random.Random) -> Row:
        small, large = sorted(rng.randint(1, self._max_number) for _ in range(2))  # no answer below zero
        word = rng.choice(tuple(OPERATIONS))
        question = f"What is {large} {word} {small}?"
        answer = OPERATIONS[word](large, small)
        return {"prompt": [{"role": "user", "content": question}], "answer": str(answer)}

    def reset(self, row: Mapping[str, Any], *, seed: int) -> list[Message]:
        self._answer = str(row["answer"])
        *earlier, question = prompt_messages(row["prompt"])
        return [*earlier, {**question, "content": f"{question['content']} {HINT}"}]

    def step(self, response: Response) -> Turn:
        if not response.stopped:
            return Turn(done=True)
        calls = _CALL.findall(response.text)
        if calls:
            return Turn(observation=" ".join(_value_of(call) for call in calls))
        numbers = _NUMBER.findall(response.text)
        return Turn(reward=float(numbers[-1:] == [self._answer]), done=True)


def _value_of(call: str) -> str:
    try:
        return f"The calculator says {format_number(evaluate(call))}."
    except ValueError:  # not repeated to the policy: an observation should not hold text that the policy chose
        return "The calculator can not read that."
