"""How it is proved which weights a rollout engine serves, before anybody gets what it sampled.

After a sync an engine works out how probable a text is under the weights that it now has, while it samples already;
the policy does the same. The engine says it with every answer, and the fleet, through which all answers pass, compares.
So no engine waits for the policy, and the policy's figures travel once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from actors.carried import Carried


class Served(NamedTuple):
    """What an engine says of the weights of its last sync."""

    version: int
    logprobs: list[float]
    """Nats of every token of the text after the first."""


class Answer(NamedTuple):
    """What an engine was asked for."""

    value: Carried[Any]
    served: Served | None
    """None: its weights came without a text."""


@dataclass(frozen=True)
class Proof:
    """What an engine must say after a sync.

    Args:
        version: of the weights.
        expected: a list with the reference of the log-probability of every token of the text after the first, in nats,
            at temperature 1, under the policy.
        tolerance: nats a token.
    """

    version: int
    expected: list[Awaitable[list[float]]]
    tolerance: float

    def begun(self) -> Proof:
        """Its figures on their way here, once for all who will ask."""
        expected = asyncio.ensure_future(self.expected[0])
        expected.add_done_callback(lambda done: done.cancelled() or done.exception())  # also if nobody asks
        return replace(self, expected=[expected])

    async def check(self, served: Served, name: str) -> None:
        """Raise RuntimeError unless the engine of this name serves the policy's weights."""
        policy, engine = await asyncio.shield(self.expected[0]), served.logprobs
        apart = sum(abs(p - e) for p, e in zip(policy, engine, strict=True)) / len(policy)
        if not apart <= self.tolerance:
            raise RuntimeError(
                f"{name} does not serve the policy's weights after the sync of version {self.version}: its "
                f"log-probabilities of the same text differ by {apart:.3g} nats a token, {self.tolerance:g} is "
                f"possible; policy {_first(policy)} ..., engine {_first(engine)} ..."
            )


def _first(logprobs: list[float]) -> list[float]:
    return [round(logprob, 3) for logprob in logprobs[:4]]


class Prover:
    """What a fleet asks of an engine's actor beside its own methods."""

    async def answer(self, method: str, work: Any, arguments: Mapping[str, Any]) -> Answer:
        """What one of its methods returns, with what it serves by then."""
        value = await getattr(self, method)(work, **arguments)
        return Answer(Carried(value), await self.served())

    async def served(self) -> Served | None:
        """What the weights that it serves make of the text that came with them."""
        return None
