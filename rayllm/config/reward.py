"""Section `reward` of the `ppo` job's config: what scores the responses."""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rayllm.config.common import ActorsConfig

Uncertainty = Literal["none", "mean_std", "worst"]


class SourcesConfig(ActorsConfig):
    """What every source of rewards has, told once for all or for each."""

    normalize: Literal["own", "none", "running"] = "own"
    """`own`: a reward model's scores by the mean and deviation that its training measured, other sources as they are;
    `none`: a reward model's as they are, too; `running`: by mean and deviation of the source's scores in this run."""

    on_failure: Literal["stop", "retry", "drop", "zero"] = "stop"
    """When a source raises, is late, or gives something else than a finite number: `stop` ends the run; `retry` asks
    again, `retries` times, and then ends it; `drop` leaves the response out of the step's loss; `zero` scores 0."""

    max_failed: float = Field(1.0, ge=0, le=1)
    """Under `drop` and `zero`: share of a step's responses on which the source may fail; more end the run."""

    retries: int = Field(2, ge=0)
    """Further tries with growing pauses: under `retry`, and over a network (http, judge) under every policy."""

    timeout_s: float = Field(300, gt=0)
    """Seconds after which one try on the responses of one shard counts as failed; what hangs is left or killed."""


class SourceConfig(SourcesConfig):
    """One of them."""

    weight: float = 1.0
    """Factor on the source's scores, after they are normalised; the reward is the sum over the sources."""

    @field_validator("weight")
    @classmethod
    def _is_finite(cls, weight: float) -> float:
        if not math.isfinite(weight):
            raise ValueError("expected a finite number")
        return weight


class ModelSource(SourceConfig):
    """A reward model."""

    kind: Literal["model"] = "model"

    model: Path | tuple[Path, ...] | None = None
    """Model folder, or several, which score as an ensemble; null: the run's `reward_model`."""

    uncertainty: Uncertainty = "none"
    """What several reward models, or several heads of one, make of a response that they disagree on: their mean
    (`none`), the mean less their deviation (`mean_std`), or the least score (`worst`; Coste et al. 2023)."""

    uncertainty_coef: float = Field(1.0, ge=0)
    """Weight of the deviation in `mean_std`."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """Its own models; none where it takes the run's."""
        return self.model if isinstance(self.model, tuple) else () if self.model is None else (self.model,)


class GoldSource(SourceConfig):
    """The toy world's exact judge."""

    kind: Literal["gold"] = "gold"


class EnvironmentSource(SourceConfig):
    """Nothing but the rewards of the environment's turns, which the others get on top."""

    kind: Literal["environment"] = "environment"


class FunctionSource(SourceConfig):
    """Python of the user's own."""

    kind: Literal["function"] = "function"

    function: str
    """`module:name` of f(prompts, responses, token_ids, rows), plain or async, which gives a number for each response:
    a sequence in their order, or, where it takes `sample_ids` as well, a mapping from these."""


class VerifierSource(SourceConfig):
    """A check that needs no model: 1 where the response passes, 0 where not."""

    kind: Literal["verifier"] = "verifier"

    verifier: Literal["exact", "regex", "choice", "math", "format", "length", "code"]
    """`exact`: is the answer; `regex`: the last match of `pattern` is; `choice`: names its letter; `math`: ends in an
    equal number or expression (math-verify); `format`: matches `pattern` as a whole; `length`: has `min_tokens` to
    `max_tokens`; `code`: its code passes the row's tests, in a sandbox."""

    column: str = "answer"
    """Column of the prompts with the right answer, or the tests of `code`. Not read by `format` and `length`."""

    pattern: str | None = None
    """Regular expression of `regex`, whose group 1 (without groups: all) is compared, and of `format`."""

    min_tokens: int = Field(0, ge=0)
    """Least tokens of a response for `length`."""

    max_tokens: int | None = Field(None, ge=1)
    """Most tokens of a response for `length`; null: any number."""

    cpu_s: float = Field(5, gt=0)
    """CPU seconds of one program of `code`; it has twice as long on the clock."""

    memory_mb: int = Field(512, ge=64)
    """Most memory of each process of one program of `code`."""

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> VerifierSource:
        if (self.verifier in ("regex", "format")) != (self.pattern is not None):
            raise ValueError(
                f"verifier={self.verifier} with pattern={self.pattern!r}: `regex` and `format` need a pattern, "
                "the others take none"
            )
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"pattern={self.pattern!r} is no regular expression: {error}") from None
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(f"max_tokens={self.max_tokens} is below min_tokens={self.min_tokens}")
        return self

    @property
    def needs_column(self) -> bool:
        return self.verifier not in ("format", "length")


class EndpointSource(SourceConfig):
    """What the sources over HTTP share."""

    url: str
    """Address, http:// or https://."""

    api_key_env: str | None = None
    """Environment variable of the reward actor that holds the key, sent as `Authorization: Bearer`; null: none."""

    concurrency: int = Field(8, ge=1)
    """Most requests under way at once."""

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        if not re.match(r"https?://[^/\s]", url):
            raise ValueError(f"got {url!r}, expected http://HOST... or https://HOST...")
        return url.rstrip("/")


class ProcessSource(SourceConfig):
    """A process reward model: each step of a response earns 2p - 1 at its end, with p the chance that it is right."""

    kind: Literal["process"] = "process"

    model: Path
    """Model folder of the `process-reward-model` job."""

    @model_validator(mode="after")
    def _keeps_its_scale(self) -> ProcessSource:
        if self.normalize == "running":
            raise ValueError("normalize=running would move the scale of a response's single steps; set own")
        return self


class HttpSource(EndpointSource):
    """A server of rewards: gets `{"samples": [{id, prompt, response, row}, ...]}`, answers `{"rewards": {id: number}}`.
    """

    kind: Literal["http"] = "http"

    batch_size: int = Field(64, ge=1)
    """Most responses in one request."""


DEFAULT_JUDGE_PROMPT = """Rate the response to the prompt from 1 (bad) to 10 (excellent).

Prompt:
{prompt}

Response:
{response}

Answer with "Score: N" and nothing else."""


class JudgeSource(EndpointSource):
    """A model as the judge, behind an OpenAI-compatible endpoint (`rayllm serve` is one): url ends in /v1."""

    kind: Literal["judge"] = "judge"

    model: str
    """Name of the model at the endpoint."""

    template: str = DEFAULT_JUDGE_PROMPT
    """What the judge is asked: {prompt} and {response} are filled in, and {NAME} by the prompt row's column NAME."""

    pattern: str = r"(?i)(?:\bscore\b\W*?|^\W*?)(-?\d+(?:\.\d+)?)(?!\.?\d|\s*[-–]\s*\d)"
    """Regular expression; group 1 of its last match in the judge's answer is the score. The default takes the number
    behind "Score", or the one that the answer begins with: of 7/10 the 7."""

    temperature: float = Field(0.0, ge=0)
    """Of the judge's sampling."""

    max_tokens: int = Field(16, ge=1)
    """Most tokens of the judge's answer."""

    @model_validator(mode="after")
    def _can_be_asked(self) -> JudgeSource:
        if "{response}" not in self.template:
            raise ValueError("template: {response} does not stand in it: the judge would not see what it judges")
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"pattern={self.pattern!r} is no regular expression: {error}") from None
        if not groups:
            raise ValueError(f"pattern={self.pattern!r} has no group: put the number of the score in parentheses")
        return self


Source = Annotated[
    ModelSource
    | GoldSource
    | EnvironmentSource
    | FunctionSource
    | VerifierSource
    | HttpSource
    | JudgeSource
    | ProcessSource,
    Field(discriminator="kind"),
]


KINDS: dict[str, type[SourceConfig]] = {
    "model": ModelSource, "gold": GoldSource, "environment": EnvironmentSource, "function": FunctionSource,
    "verifier": VerifierSource, "http": HttpSource, "judge": JudgeSource, "process": ProcessSource,
}  # fmt: skip


def _checked_source(name: str, given: Any) -> Any:
    """A source as it was given, when its kind and keys are known."""
    if isinstance(given, SourceConfig):
        return given
    kind = given.get("kind") if isinstance(given, dict) else None
    if kind not in KINDS:
        raise ValueError(f"sources.{name}: kind={kind}, expected one of {', '.join(KINDS)}")
    known = KINDS[kind].model_fields
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            hint = f"Did you mean {near[0]}?" if near else f"Known here: {', '.join(known)}"
            raise ValueError(f"sources.{name}.{key}: unknown key of a source of kind {kind}. {hint}")
    return given


class RewardConfig(SourcesConfig):
    """One source, by `source`, or several, by `sources`; these take from here what they do not say themselves."""

    source: Literal["model", "gold", "environment", "function"] = "model"
    """What scores the responses: `model`, the reward model; `gold`, the toy world's exact judge; `function`, Python
    code of your own; `environment`, nothing but the rewards of the environment's turns, which the others get on top."""

    function: str | None = None
    """`module:name` of the Python function that scores when source=function: f(prompts, responses, token_ids, rows)
    returns a number for each response."""

    uncertainty: Uncertainty = "none"
    """What several reward models, or several heads of one, make of a response that they disagree on: their mean
    (`none`), the mean less their deviation (`mean_std`), or the least score (`worst`; Coste et al. 2023)."""

    uncertainty_coef: float = Field(1.0, ge=0)
    """Weight of the deviation in `mean_std`."""

    sources: dict[str, Source] = {}
    """Several sources, or one of another kind: name -> {kind: model, function, verifier, http, judge,
    process, gold or environment, ...}; docs/rewards.md has an example of each. In place of `source`."""

    @model_validator(mode="before")
    @classmethod
    def _hand_down(cls, tree: Any) -> Any:
        """What every source has is told once."""
        if not isinstance(tree, dict) or not isinstance(tree.get("sources"), dict):
            return tree
        common = {key: tree[key] for key in SourcesConfig.model_fields if key in tree}
        sources = {name: _checked_source(name, given) for name, given in tree["sources"].items()}
        return {**tree, "sources": {k: {**common, **v} if isinstance(v, dict) else v for k, v in sources.items()}}

    @model_validator(mode="after")
    def _is_one_or_several(self) -> RewardConfig:
        if (self.source == "function") != (self.function is not None):
            raise ValueError(
                f"reward.source={self.source} with reward.function={self.function}: a function is named "
                "where the source is one, as module:name, and nowhere else"
            )
        if self.sources and self.source != "model":
            raise ValueError(
                f"reward.sources={', '.join(self.sources)} with reward.source={self.source}: name all sources in "
                "reward.sources"
            )
        for name in self.sources:
            if not re.fullmatch(r"[a-zA-Z0-9_]+", name):
                raise ValueError(f"reward.sources: the name {name!r} may have letters, digits and _ only")
        return self

    @property
    def by_name(self) -> dict[str, Source]:
        """All sources, in order; the one of `source` is called as its kind."""
        if self.sources:
            return self.sources
        common = {key: getattr(self, key) for key in SourcesConfig.model_fields}
        if self.function is not None:
            return {"function": FunctionSource(function=self.function, **common)}
        if self.source == "model":
            ensemble = {"uncertainty": self.uncertainty, "uncertainty_coef": self.uncertainty_coef}
            return {"model": ModelSource(**common, **ensemble)}
        return {self.source: KINDS[self.source](**common)}  # type: ignore[dict-item]

    def has(self, kind: str) -> bool:
        """Whether a source is of this kind."""
        return any(source.kind == kind for source in self.by_name.values())
