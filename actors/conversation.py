"""Conversations between the policy and an environment, as token ids from start to end.

Per sample: the environment gives the prompt; then generate, step, append the observation, generate ... until one side
ends it. What was sampled is never decoded and encoded again, and an observation is encoded once. To continue, the
engine is asked for the whole conversation: its prefix cache holds all but the newest tokens.

Consumes rows and seeds, produces ``Rollout``s. A conversation waits for its own turns only, never for another's.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from actors.counters import count
from actors.seeds import turn_seed
from actors.vllm_engine import Request, Sampled, VllmEngine
from rayllm.config.environment import EnvironmentConfig
from rayllm.data.chat import Message, TurnFrame, messages_problem, prompt_messages, prompt_token_ids
from rayllm.data.rollout import Rollout, SampledTurn
from rayllm.environments.base import Environment, Response, Speech, Turn
from rayllm.environments.loading import load_environment


class Conversations:
    """Lets one engine's policy converse with fresh copies of one environment.

    Args:
        config: with a name.
        tokenizer: the model's.
        where: its folder, for messages.

    Raises:
        InputError: no such environment, or a chat template in which a conversation cannot be continued.
    """

    def __init__(self, config: EnvironmentConfig, engine: VllmEngine, tokenizer: Any, *, where: str) -> None:
        assert config.name is not None
        self._name = config.name
        self._max_turns = config.max_turns
        self._timeout_s = config.timeout_s
        self._make = load_environment(config.name, **config.options)
        self._engine = engine
        self._tokenizer = tokenizer
        self._frame = TurnFrame(tokenizer, where)

    async def play(
        self, prompt_id: int, row: Mapping[str, Any], *, seed: int, temperature: float, max_new_tokens: int
    ) -> Rollout:
        """One conversation, from ``reset`` to its end.

        Args:
            row: the prompt's row.
            seed: the sample's; the environment gets it, and each turn is sampled with one made from it.
            temperature: as in ``RolloutActor.generate``.
            max_new_tokens: of each turn, end-of-turn token included. A turn begins only where it has room for them.

        Raises:
            RuntimeError: the environment raised, was late or said what the policy cannot read.
        """
        with self._blaming(f"prompt {prompt_id}, reset"):
            environment, prompt = await self._begin(row, seed, max_new_tokens)
        transcript = _Transcript(prompt)
        finish_reason = None
        while finish_reason is None:
            number = len(transcript.turns)
            request = Request(token_ids=transcript.token_ids, seed=turn_seed(seed, number))
            (sampled,) = await self._engine.generate(
                [request], temperature=temperature, max_new_tokens=max_new_tokens
            )
            with self._blaming(f"prompt {prompt_id}, turn {number}"):
                turn = await self._step(environment, sampled)
                transcript.add(sampled, turn.reward)
                finish_reason = self._go_on(transcript, sampled, turn, max_new_tokens)
        return transcript.rollout(prompt_id, finish_reason)

    async def _begin(
        self, row: Mapping[str, Any], seed: int, max_new_tokens: int
    ) -> tuple[Environment, list[int]]:
        """A fresh environment and its prompt."""
        environment = self._make()
        said = await self._call(environment.reset, row, seed=seed)
        prompt = self._encode(said, lambda messages: prompt_token_ids(self._tokenizer, messages))
        problem = self._engine.problem(prompt, max_new_tokens=max_new_tokens)
        if problem:
            raise ValueError(f"the prompt {problem}")
        return environment, prompt

    async def _step(self, environment: Environment, sampled: Sampled) -> Turn:
        text = self._tokenizer.decode(list(sampled.token_ids), skip_special_tokens=True).strip()
        stopped = sampled.finish_reason == "stop"
        response = Response(text=text, token_ids=sampled.token_ids, stopped=stopped)
        turn = await self._call(environment.step, response)
        if not isinstance(turn, Turn):
            raise TypeError(f"step returned {turn!r:.60}, must return a Turn")
        return turn

    def _go_on(self, transcript: _Transcript, sampled: Sampled, turn: Turn, max_new_tokens: int) -> str | None:
        """Append the observation, or return why the conversation is over."""
        if sampled.finish_reason != "stop":
            return sampled.finish_reason
        if turn.done or sampled.token_ids[-1] != self._frame.end_of_turn:  # end-of-text: nothing can follow
            return "stop"
        if len(transcript.turns) == self._max_turns:
            return "max_turns"
        observation = self._encode(turn.observation, self._frame.encode)
        if len(transcript.token_ids) + len(observation) + max_new_tokens > self._engine.max_model_len:
            return "max_model_len"
        problem = self._engine.problem(observation, max_new_tokens=max_new_tokens)
        if problem:
            raise ValueError(f"the observation {problem}")
        transcript.response += observation
        return None

    def _encode(self, said: Speech, in_frame: Callable[[list[Message]], list[int]]) -> list[int]:
        """Token ids as they are, anything else in the template's frame."""
        if not isinstance(said, str) and isinstance(said[0], int):
            return list(said)
        messages = prompt_messages(said)
        problem = messages_problem(messages)
        if problem:
            raise ValueError(problem)
        return in_frame(messages)

    async def _call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the environment's method returns, or what its coroutine does, before the deadline."""
        deadline = asyncio.timeout(self._timeout_s)
        try:
            async with deadline:
                result = await in_thread(lambda: method(*args, **kwargs))
                answer = await result if inspect.isawaitable(result) else result
                count("turns")
                return answer
        except TimeoutError as error:
            if not deadline.expired():  # the environment's own
                raise
            raise TimeoutError(f"no answer within environment.timeout_s={self._timeout_s:g}") from error

    @contextmanager
    def _blaming(self, where: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:  # SystemExit would end the actor without a word
            raise RuntimeError(f"environment {self._name}: {where}: {error!r}") from error


@dataclass(slots=True)
class _Transcript:
    """A conversation so far."""

    prompt: list[int]
    response: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of the sampled ones of response
    versions: list[int] = field(default_factory=list)  # of the same
    turns: list[SampledTurn] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return self.prompt + self.response

    def add(self, sampled: Sampled, reward: float) -> None:
        start = len(self.response)
        self.response += sampled.token_ids
        self.logprobs += sampled.logprobs
        self.versions += sampled.versions
        self.turns.append(SampledTurn(start=start, end=len(self.response), reward=reward))

    def rollout(self, prompt_id: int, finish_reason: str) -> Rollout:
        return Rollout(
            prompt_id=prompt_id,
            prompt_token_ids=tuple(self.prompt),
            token_ids=tuple(self.response),
            logprobs=tuple(self.logprobs),
            finish_reason=finish_reason,
            policy_versions=tuple(self.versions),
            turns=tuple(self.turns),
        )


async def in_thread(function: Callable[[], Any]) -> Any:
    """Run ``function`` in a thread of its own.

    Not in a pool: a function that hangs for good would take a place in it from the others, and would be waited for
    when the process ends.
    """
    future: Future[tuple[Any, BaseException | None]] = Future()
    future.set_running_or_notify_cancel()  # the caller may give up, the thread cannot

    def run() -> None:
        outcome: tuple[Any, BaseException | None]
        try:
            outcome = function(), None
        except BaseException as error:  # raised below: some exceptions may not be set on a future
            outcome = None, error
        future.set_result(outcome)

    threading.Thread(target=run, name="environment", daemon=True).start()
    result, error = await asyncio.wrap_future(future)
    if error is not None:
        raise error
    return result
