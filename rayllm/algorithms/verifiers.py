"""Checks of a response that need no model. Each gives 1.0 for a pass and 0.0 otherwise.

A response is text, special tokens left out. ``answer`` is the right one, as the prompt's row has it: text or a number,
or a worked answer that ends in ``#### 42`` (GSM8K). What cannot be read in a *response* is a wrong response; a right
answer that cannot be read is a ValueError.
"""

from __future__ import annotations

import functools
import re
from typing import Any

ANSWER_MARK = "####"
"""What stands before the final answer of a worked one, as in GSM8K."""

LONGEST = 4_000
"""Characters from the end of a response in which an expression is looked for: its answer stands last."""

MATH_SECONDS = 2
"""For one expression. Towers of powers and nested fractions take for ever; they are wrong answers."""


def final_answer(text: str) -> str:
    """What follows the last ``####``; without one the whole text. Surrounding blanks are left out."""
    return text.rsplit(ANSWER_MARK, 1)[-1].strip()


def exact(response: str, answer: Any) -> float:
    """The response, or what it puts behind ``####``, is the answer, blanks around both left out."""
    return float(final_answer(response) == final_answer(str(answer)))


def regex(response: str, answer: Any, *, pattern: str) -> float:
    """The last match of ``pattern`` is the answer: its group 1, or all of it where the pattern has no group."""
    matches = list(re.finditer(pattern, response))
    if not matches:
        return 0.0
    found = matches[-1].group(1 if matches[-1].re.groups else 0)
    return float(found is not None and found.strip() == final_answer(str(answer)))


_LETTER = r"\b(?i:\s+is)?[\s*:=]*[(\[]*((?!I\s+[a-z])[A-Z]\b|[a-z](?=[*)\]]|\s*(?:[.,;:!?]|$)))"
_CHOICES = (
    r"\\boxed\{\s*(?:\\text\{)?\s*\(?([A-Za-z])\)?\s*\}",
    rf"(?i:\banswer){_LETTER}",
    rf"(?i:\b(?:option|choice)){_LETTER}",
    r"^\s*[*(\[]*([A-Z])[*)\]]*\s*(?:[.:)]|$)",
    r"\(([A-Z])\)",
)
"""How a letter is named, the surest first."""


def choice(response: str, answer: Any) -> float:
    """The response names the answer's letter: ``\\boxed{B}``, "The answer is (B)", "B. Paris" or a lone "B".

    Of several such places of one kind the last counts; "a dog" and "I see" name none.
    """
    given = re.fullmatch(r"\(?([A-Za-z])\)?\.?", final_answer(str(answer)))
    if given is None:
        raise ValueError(f"expected a letter as the right choice, got {answer!r}")
    text = final_answer(response)
    for pattern in _CHOICES:
        found = re.findall(pattern, text, flags=re.MULTILINE)
        if found:
            return float(found[-1].upper() == given[1].upper())
    return 0.0


def math(response: str, answer: Any) -> float:
    """The response ends in a number or expression that equals the answer, however it is written: 1,000 and 1000, $5,
    5.0 and \\boxed{5} are the same. What follows ``####`` comes first, then boxes, then the last expression.

    math-verify's time limits are signals: they hold in a process's main thread only.

    Raises:
        ValueError: no expression in ``answer``.
    """
    from math_verify import parse, verify

    right = _parsed_answer(final_answer(str(answer)))
    found = parse(final_answer(response)[-LONGEST:], parsing_timeout=MATH_SECONDS)
    return float(bool(found) and verify(right, found, timeout_seconds=MATH_SECONDS))


@functools.lru_cache(maxsize=10_000)
def _parsed_answer(answer: str) -> Any:
    """By math-verify. The many responses to one prompt have one right answer."""
    from math_verify import parse

    found = parse(answer, parsing_timeout=MATH_SECONDS)
    if not found:
        raise ValueError(f"no number or expression in the right answer {answer!r}")
    return found


def matches_format(response: str, *, pattern: str) -> float:
    """The whole response matches ``pattern``, in which . stands for line ends as well."""
    return float(re.fullmatch(pattern, response.strip(), flags=re.DOTALL) is not None)


def has_length(num_tokens: int, *, min_tokens: int = 0, max_tokens: int | None = None) -> float:
    """The response has ``min_tokens`` to ``max_tokens`` tokens, its end of turn counted."""
    return float(num_tokens >= min_tokens and (max_tokens is None or num_tokens <= max_tokens))


def response_code(response: str) -> str:
    """The program in a response: its last fenced block, else all of it."""
    blocks = re.findall(r"```[^\n`]*\n(.*?)(?:```|\Z)", response, flags=re.DOTALL)
    return blocks[-1] if blocks else response
