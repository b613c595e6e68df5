"""The source of kind `verifier`: the checks of ``rayllm.algorithms.verifiers``, and programs in the sandbox."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rayllm.algorithms import verifiers
from rayllm.config.reward import VerifierSource
from rayllm.data.samples import Samples
from rayllm.errors import InputError
from rayllm.sandbox import Limits, check_sandbox, passes_tests


def check_verifier(source: VerifierSource) -> None:
    """Raise InputError unless this machine has what the verifier needs."""
    if source.verifier == "code":
        check_sandbox()
    if source.verifier == "math":
        try:
            import math_verify  # noqa: F401
        except ImportError as error:
            raise InputError(f"verifier=math: {error}; pip install 'math-verify[antlr4-13-2]'") from None


class Verifier:
    """Called with samples; gives 1.0 or 0.0 for each."""

    def __init__(self, source: VerifierSource) -> None:
        """Raises InputError unless this machine has what it needs."""
        check_verifier(source)
        self.source = source
        self.limits = Limits(wall_s=2 * source.cpu_s, cpu_s=source.cpu_s, memory_mb=source.memory_mb)

    def __call__(self, samples: Samples) -> list[float]:
        places = range(len(samples))
        if self.source.verifier == "code":  # the programs run in processes of their own
            with ThreadPoolExecutor(max(1, round(self.source.cpus_per_actor))) as pool:
                return list(pool.map(lambda place: self._check(samples, place), places))
        return [self._check(samples, place) for place in places]

    def _check(self, samples: Samples, place: int) -> float:
        source, response = self.source, samples.responses[place]
        if source.verifier == "format":
            return verifiers.matches_format(response, pattern=source.pattern or "")
        if source.verifier == "length":
            count = len(samples.token_ids[place])
            return verifiers.has_length(count, min_tokens=source.min_tokens, max_tokens=source.max_tokens)
        answer = _answer(samples.rows[place], source.column)
        if source.verifier == "code":
            return passes_tests(verifiers.response_code(response), answer, limits=self.limits)[0]
        if source.verifier == "regex":
            return verifiers.regex(response, answer, pattern=source.pattern or "")
        checks = {"exact": verifiers.exact, "choice": verifiers.choice, "math": verifiers.math}
        return checks[source.verifier](response, answer)


def _answer(row: Mapping[str, Any], column: str) -> Any:
    if row.get(column) is None:
        raise InputError(f"the prompt's row has no {column!r}; it has: {', '.join(row)}")
    return row[column]
