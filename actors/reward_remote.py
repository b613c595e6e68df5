"""Sources of rewards behind HTTP: a server of rewards (`http`), and a model as the judge (`judge`)."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx2

from rayllm.config.reward import EndpointSource, HttpSource, JudgeSource
from rayllm.data.samples import Failed, Samples, checked_scores
from rayllm.errors import InputError

SHOWN = 120
"""Characters of an answer in a message."""


class Endpoint:
    """A client of one URL. Requests go side by side, each fails for itself, and none lasts beyond the deadline."""

    def __init__(self, source: EndpointSource) -> None:
        """Raises InputError when the key's environment variable is not set."""
        headers = {}
        if source.api_key_env is not None:
            key = os.environ.get(source.api_key_env)
            if not key:
                raise InputError(
                    f"api_key_env: the environment variable {source.api_key_env} is not set where the reward actor "
                    "runs; export it before Ray starts there"
                )
            headers["Authorization"] = f"Bearer {key}"
        local = urlsplit(source.url).hostname in ("localhost", "127.0.0.1", "::1")
        self.url = source.url
        self._client = httpx2.AsyncClient(headers=headers, timeout=None, trust_env=not local)
        self._places = asyncio.Semaphore(source.concurrency)

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer's JSON.

        Raises:
            RuntimeError: no connection, a status that is no success, or no JSON; the text goes on after "the source".
        """
        content = json.dumps(body, default=str).encode()
        try:
            async with self._places:
                answer = await self._client.post(
                    self.url + path, content=content, headers={"Content-Type": "application/json"}
                )
        except httpx2.HTTPError as error:
            raise RuntimeError(f"cannot be reached at {self.url}: {type(error).__name__} {error}".rstrip()) from None
        if not answer.is_success:
            raise RuntimeError(f"answered HTTP {answer.status_code}: {answer.text[:SHOWN]!r}")
        try:
            return answer.json()
        except ValueError:
            raise RuntimeError(f"answered no JSON: {answer.text[:SHOWN]!r}") from None


async def _each(
    parts: list[Samples], ask: Callable[[Samples], Awaitable[list[float | Failed]]], timeout_s: float
) -> list[float | Failed]:
    """``ask`` of all parts side by side, put together; a part that raises or is late fails alone."""
    deadline = asyncio.get_running_loop().time() + timeout_s

    async def one(part: Samples) -> list[float | Failed]:
        try:
            async with asyncio.timeout_at(deadline):
                return await ask(part)
        except TimeoutError:
            problem = f"did not answer within timeout_s={timeout_s:g}"
        except (RuntimeError, ValueError) as error:
            problem = str(error)
        return [Failed(problem)] * len(part)

    return [value for values in await asyncio.gather(*map(one, parts)) for value in values]


class HttpRewards:
    """POSTs ``{"samples": [{id, prompt, response, row}, ...]}``; the answer is ``{"rewards": {id: number}}``."""

    def __init__(self, source: HttpSource) -> None:
        self.batch_size = source.batch_size
        self.endpoint = Endpoint(source)

    async def score(self, samples: Samples, *, timeout_s: float) -> list[float | Failed]:
        """In the order of the responses."""
        size = self.batch_size
        return await _each([samples[i : i + size] for i in range(0, len(samples), size)], self._ask, timeout_s)

    async def _ask(self, part: Samples) -> list[float | Failed]:
        columns = zip(part.sample_ids, part.prompts, part.responses, part.rows, strict=True)
        body = [{"id": i, "prompt": prompt, "response": r, "row": row} for i, prompt, r, row in columns]
        answer = await self.endpoint.post("", {"samples": body})
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, dict):
            raise RuntimeError(f"answered {str(answer)[:SHOWN]!r}, expected {{\"rewards\": {{id: number}}}}")
        return checked_scores(rewards, part.sample_ids)


class Judge:
    """Asks a chat model about each response; its answer's last number of the pattern is the score."""

    def __init__(self, source: JudgeSource) -> None:
        self.source = source
        self.endpoint = Endpoint(source)

    async def score(self, samples: Samples, *, timeout_s: float) -> list[float | Failed]:
        """In the order of the responses."""
        return await _each([samples[i : i + 1] for i in range(len(samples))], self._ask, timeout_s)

    async def _ask(self, part: Samples) -> list[float | Failed]:
        source = self.source
        content = filled(source.template, part)
        answer = await self.endpoint.post("/chat/completions", {
            "model": source.model, "messages": [{"role": "user", "content": content}],
            "temperature": source.temperature, "max_tokens": source.max_tokens,
        })  # fmt: skip
        try:
            text = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise RuntimeError(f"answered {str(answer)[:SHOWN]!r}, expected a chat completion") from None
        return checked_scores([judged(text or "", source.pattern)], part.sample_ids)


def judged(text: str, pattern: str) -> float | Failed:
    """The score in a judge's answer: group 1 of the last match of ``pattern``."""
    matches = list(re.finditer(pattern, text))
    try:
        return float(matches[-1].group(1))
    except (IndexError, ValueError, TypeError):
        return Failed(f"answered {text[:SHOWN]!r}, where pattern={pattern!r} finds no number")


def filled(template: str, sample: Samples) -> str:
    """The template with {prompt}, {response} and columns of the row in it; other braces stay."""
    (row,), (response,), (prompt,) = sample.rows, sample.responses, sample.prompts
    given = row.get("prompt")
    if isinstance(given, str):
        prompt = given
    elif isinstance(given, list) and given and isinstance(given[0], Mapping):
        prompt = "\n".join(f"{message['role']}: {message['content']}" for message in given)
    values = {**row, "prompt": prompt, "response": response}
    return re.sub(r"\{(\w+)\}", lambda found: str(values.get(found[1], found[0])), template)
