"""The value of an arithmetic expression, by recursive descent: what a policy writes is never executed."""

from __future__ import annotations

import re
import string
from fractions import Fraction

MAX_LENGTH = 100
"""Characters of an expression; bounds the size of numbers and the depth of parentheses."""


def evaluate(expression: str) -> Fraction:
    """The exact value of an expression of numbers, ``+ - * /`` and parentheses.

    Raises:
        ValueError: not such an expression, longer than ``MAX_LENGTH``, or a division by zero.
    """
    if len(expression) > MAX_LENGTH:
        raise ValueError(f"the expression has {len(expression)} characters, at most {MAX_LENGTH} are read")
    symbols = re.findall(r"\d+(?:\.\d+)?|\S", expression, flags=re.ASCII)
    parser = _Parser(symbols)
    value = parser.sum()
    if parser.next is not None:
        raise ValueError(f"expected an operator, got {parser.next!r}")
    return value


def format_number(value: Fraction) -> str:
    """Whole numbers in full, others as decimals of six digits."""
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.6g}"


class _Parser:
    """sum = product (+- product)*; product = factor (*/ factor)*; factor = [-] (number or parenthesis)"""

    def __init__(self, symbols: list[str]) -> None:
        self._symbols = symbols
        self._place = 0

    @property
    def next(self) -> str | None:
        return self._symbols[self._place] if self._place < len(self._symbols) else None

    def _take(self) -> str | None:
        symbol = self.next
        self._place += 1
        return symbol

    def sum(self) -> Fraction:
        value = self._product()
        while self.next in ("+", "-"):
            value = value + self._product() if self._take() == "+" else value - self._product()
        return value

    def _product(self) -> Fraction:
        value = self._factor()
        while self.next in ("*", "/"):
            if self._take() == "*":
                value *= self._factor()
                continue
            divisor = self._factor()
            if divisor == 0:
                raise ValueError("division by zero")
            value /= divisor
        return value

    def _factor(self) -> Fraction:
        symbol = self._take()
        if symbol == "-":
            return -self._factor()
        if symbol == "(":
            value = self.sum()
            if self._take() != ")":
                raise ValueError("a parenthesis is not closed")
            return value
        if symbol is None or symbol[0] not in string.digits:
            raise ValueError(f"expected a number, got {symbol!r}")
        return Fraction(symbol)
