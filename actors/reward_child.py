"""A child process of a reward actor in which code runs that may hang, leak or crash: functions and verifiers.

The actor's side is ``Child``: one call at a time, and a child that is late is killed and started anew. Here are no
threads to be left behind, and a regular expression or C code that never gives the interpreter back hangs nobody else.
The child's side is ``main``; it imports neither torch nor Ray.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from rayllm.config.reward import FunctionSource, VerifierSource
from rayllm.data.samples import Failed, Samples, checked_scores
from rayllm.errors import InputError
from rayllm.named import import_named

BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from actors.reward_child import main; main(int(sys.argv[1]))"
)
START_S = 120
"""Seconds for a child to import its code."""


class Child:
    """The actor's end. ``score`` may be called by one task at a time."""

    def __init__(self, source: FunctionSource | VerifierSource) -> None:
        self.source = source
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection

    async def start(self) -> None:
        """Start the process, if none runs; returns when its code is imported.

        Raises:
            InputError: the code cannot be loaded.
        """
        if self._process is not None and self._process.poll() is None:
            return
        ours, theirs = socket.socketpair()
        arguments = [sys.executable, "-c", BOOT, str(theirs.fileno()), json.dumps(sys.path)]
        self._process = subprocess.Popen(arguments, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        self._connection = Connection(ours.detach())
        problem = await asyncio.wait_for(self._ask(self.source), START_S)
        if problem is not None:
            self.stop()
            raise InputError(problem)

    async def score(self, samples: Samples, *, timeout_s: float) -> list[float | Failed]:
        """The scores, in the order of the responses.

        Raises:
            TimeoutError: not done in time; the child is killed.
            RuntimeError: the code raised, gave something else than scores, or its process ended.
        """
        await self.start()
        try:
            kind, found = await asyncio.wait_for(self._ask(samples), timeout_s)
        except TimeoutError:
            self.stop()
            raise
        except EOFError:
            status = self.stop()
            raise RuntimeError(f"ended its process with the status {status}") from None
        if kind == "problem":
            raise RuntimeError(found)
        return found

    def stop(self) -> int | None:
        """Kill the child; returns its exit status."""
        if self._process is None:
            return None
        self._process.kill()
        status = self._process.wait()
        self._process = None
        return status

    async def _ask(self, message: Any) -> Any:
        # The thread ends with the child: killing it breaks the connection.
        return await asyncio.to_thread(_exchange, self._connection, message)


def _exchange(connection: Connection, message: Any) -> Any:
    try:
        connection.send(message)
        return connection.recv()
    except (BrokenPipeError, ConnectionResetError):
        raise EOFError from None


def main(descriptor: int) -> None:
    """The child's life: load the source's code, then answer until the actor is gone."""
    _die_with_parent()
    connection = Connection(descriptor)
    try:
        scorer = load_scorer(connection.recv())
    except Exception as error:
        connection.send(str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}")
        return
    connection.send(None)
    while True:
        try:
            samples = connection.recv()
        except EOFError:
            return
        connection.send(_answer(scorer, samples))


def _answer(scorer: Callable[[Samples], Any], samples: Samples) -> tuple[str, Any]:
    try:
        found = scorer(samples)
    except Exception as error:
        return "problem", f"raised {type(error).__name__}: {error}"
    try:
        return "scores", checked_scores(found, samples.sample_ids)
    except ValueError as error:
        return "problem", str(error)


def load_scorer(source: FunctionSource | VerifierSource) -> Callable[[Samples], Any]:
    """What scores by this source.

    Raises:
        InputError: it cannot be loaded.
    """
    if isinstance(source, FunctionSource):
        return FunctionScorer(load_reward_function(source.function))
    from actors.reward_verifiers import Verifier  # its packages are large: a function's child does without

    return Verifier(source)


class FunctionScorer:
    """Calls the user's function; one event loop for all calls, so that what an async one keeps open stays of use."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.wants_ids = "sample_ids" in inspect.signature(function).parameters
        self.runner = asyncio.Runner()

    def __call__(self, samples: Samples) -> Any:
        ids = {"sample_ids": list(samples.sample_ids)} if self.wants_ids else {}
        texts = list(samples.prompts), list(samples.responses)
        found = self.function(*texts, list(samples.token_ids), list(samples.rows), **ids)
        return self.runner.run(_result(found)) if inspect.isawaitable(found) else found


async def _result(awaitable: Any) -> Any:
    return await awaitable


def load_reward_function(path: str) -> Callable[..., Any]:
    """The function that ``module:name`` names.

    Raises:
        InputError: it cannot be imported or called.
    """
    found = import_named(path, what="reward.function")
    if not callable(found):
        raise InputError(f"reward.function: {path} is {found!r:.60}, expected a function")
    return found


def _die_with_parent() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() == 1:
        os._exit(1)
