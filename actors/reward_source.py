"""A source of rewards as an actor: whatever its kind, it is asked, timed, checked and let fail in one way.

One actor group a source. ``SourceActor.scores`` takes a shard and gives a ``Scores``: always within the deadline, one
finite number for each response or, by the source's policy, none. The other methods work on the scores of all sources
together; they are quick, and any source's actor does them: the loop of the actor is never blocked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch

from actors.environment import device_of
from actors.reward import RewardActor
from actors.reward_child import Child
from actors.reward_remote import HttpRewards, Judge
from rayllm import faults
from rayllm.config.reward import (
    EndpointSource,
    FunctionSource,
    GoldSource,
    HttpSource,
    JudgeSource,
    ModelSource,
    ProcessSource,
    Source,
    VerifierSource,
)
from rayllm.data.experience import Experience, concat
from rayllm.data.files import Row
from rayllm.data.samples import Failed, Samples
from rayllm.data.scores import Scores, ShardStats, sample_ids_of, stats, teaches
from rayllm.errors import InputError, RewardError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""Between the tries of one call."""


class SourceActor:
    """One source."""

    def __init__(
        self, *, name: str, source: Source, tokenizer: str, rows: list[Row], reward_models: Sequence[str] = ()
    ) -> None:
        """
        Args:
            name: of the source, in the config.
            source: its settings.
            tokenizer: model folder.
            rows: of the training prompts; a shard's prompt ids are indices into them.
            reward_models: the run's, for a source of kind `model` that names none.
        """
        device_of()
        self.name, self.source, self.rows = name, source, rows
        self.scorer = _scorer(source, reward_models)
        self.tokenizer: Any = None
        if not isinstance(source, ModelSource | ProcessSource):
            from rayllm.models.folders import load_tokenizer

            self.tokenizer = load_tokenizer(tokenizer)
        self._turn = asyncio.Lock()

    async def setup(self) -> None:
        """Load what takes time or may fail.

        Raises:
            InputError: the source cannot be used as configured.
        """
        if isinstance(self.scorer, Child):
            await self.scorer.start()

    async def digest(self) -> str:
        """Of the weights of its models; of a source without models nothing."""
        if isinstance(self.scorer, ModelScorer):
            return await asyncio.to_thread(self.scorer.actor.digest)
        return "" if not isinstance(self.source, ProcessSource) else await asyncio.to_thread(self.scorer.digest)

    async def scores(self, shard: Experience, rows: list[Row] | None = None) -> Scores:
        """Of every response of the shard.

        Args:
            shard: rollouts.
            rows: what the shard's prompt ids are indices into, for other prompts than the training ones.

        Raises:
            RewardError: the source failed and its policy is to stop.
        """
        faults.reach("reward.scores")
        sample_ids = sample_ids_of(shard.prompt_ids)
        samples = None if self.tokenizer is None else self._samples(shard, sample_ids, rows or self.rows)
        found = await self._tries(shard, samples, len(sample_ids))
        failed = [place for place, value in enumerate(found) if isinstance(value, Failed)]
        problem = ""
        if failed:
            last = found[failed[-1]]
            assert isinstance(last, Failed)
            problem = f"{last.reason} (response {sample_ids[failed[-1]]}; {len(failed)} of {len(found)} failed)"
            if self.source.on_failure in ("stop", "retry"):
                tried = f" after {self.source.retries} retries" if self._num_tries() > 1 else ""
                raise RewardError(f"{self.what} {problem}{tried}; on_failure={self.source.on_failure}")
        token_values = None
        if isinstance(self.source, ProcessSource):
            token_values, found = by_token(shard, found)
        instead = 0.0 if self.source.on_failure == "zero" else torch.nan
        values = torch.tensor([instead if isinstance(value, Failed) else value for value in found]).float()
        problem = f"{self.what} {problem}" if problem else ""
        return Scores(self.name, sample_ids, values, len(failed), problem, token_values)

    async def members(self, shard: Experience) -> torch.Tensor:
        """(B, H) float32: what each head of each reward model gives; (B, 0) of a source of another kind."""
        if not isinstance(self.scorer, ModelScorer):
            return torch.zeros(len(shard), 0)
        async with self._turn:
            return await asyncio.to_thread(self.scorer.actor.members, shard)

    @property
    def what(self) -> str:
        """The source, in messages."""
        names = {"http": "url", "judge": "url", "process": "model", "gold": None, "environment": None}
        field = names.get(self.source.kind, self.source.kind)
        return f"reward source {self.name}" + (f" ({field}={getattr(self.source, field)})" if field else "")

    def _num_tries(self) -> int:
        again = self.source.on_failure == "retry" or isinstance(self.source, EndpointSource)
        return 1 + (self.source.retries if again else 0)

    async def _tries(self, shard: Experience, samples: Samples | None, count: int) -> list[float | Failed]:
        """Ask until nothing fails or the tries are used up; what was scored is not asked about again."""
        found: list[float | Failed] = [Failed("")] * count
        pending = list(range(count))
        for attempt in range(self._num_tries()):
            if attempt:
                await asyncio.sleep(min(FIRST_PAUSE_S * 2 ** (attempt - 1), LONGEST_PAUSE_S))
            part = samples if samples is None or len(pending) == count else _select(samples, pending)
            for place, value in zip(pending, await self._once(shard[torch.tensor(pending)], part), strict=True):
                found[place] = value
            pending = [place for place in pending if isinstance(found[place], Failed)]
            if not pending:
                break
        return found

    async def _once(self, shard: Experience, samples: Samples | None) -> list[float | Failed]:
        """One try; whatever goes wrong is a failure of all responses that it was about."""
        timeout_s = self.source.timeout_s
        try:
            if isinstance(self.scorer, HttpRewards | Judge):
                assert samples is not None
                return await self.scorer.score(samples, timeout_s=timeout_s)
            async with self._turn:  # one call at a time; the deadline counts from its own start
                if isinstance(self.scorer, Child):
                    assert samples is not None
                    return await self.scorer.score(samples, timeout_s=timeout_s)
                return await asyncio.wait_for(asyncio.to_thread(self.scorer.score, shard, samples), timeout_s)
        except InputError:
            raise
        except TimeoutError:
            problem = f"did not answer within timeout_s={timeout_s:g} and was cut off"
        except Exception as error:  # what a failure means is the source's declared policy
            text = str(error)
            problem = text if isinstance(self.scorer, Child) else f"raised {type(error).__name__}: {text}"
        return [Failed(problem)] * len(shard)

    def _samples(self, shard: Experience, sample_ids: tuple[str, ...], rows: list[Row]) -> Samples:
        firsts = shard.action_mask.int().argmax(1).tolist()
        prompts = [ids[:first].tolist() for ids, first in zip(shard.sequences, firsts, strict=True)]
        token_ids = [ids[mask].tolist() for ids, mask in zip(shard.sequences, shard.action_mask, strict=True)]
        decode = self.tokenizer.decode
        return Samples(
            sample_ids=sample_ids,
            prompts=tuple(decode(ids) for ids in prompts),
            responses=tuple(decode(ids, skip_special_tokens=True).strip() for ids in token_ids),
            token_ids=tuple(token_ids),
            rows=tuple(rows[prompt_id] for prompt_id in shard.prompt_ids.tolist()),
            stopped=tuple(shard.stopped.tolist()),
        )

    # What follows works on the scores of all sources of a shard.

    @staticmethod
    def stats(*scores: Scores) -> list[ShardStats]:
        """What the scores of every source amount to, shard by shard; the sources of one shard stand together."""
        num_sources = len({part.source for part in scores})
        return [stats(shard) for shard in zip(*[iter(scores)] * num_sources, strict=True)]

    @staticmethod
    def count_without_signal(shard: Experience, *scores: Scores) -> int:
        """Prompts of the shard whose responses no source tells apart."""
        return len(shard.prompt_ids[~teaches(scores, shard.prompt_ids, shard.turn_rewards)].unique())

    @staticmethod
    def replace_without_signal(shard: Experience, spare: Experience, *scores: Scores) -> Experience:
        """The shard with prompts that teach nothing replaced by those of ``spare`` that do.

        Prompts have equal numbers of responses, next to each other, so that the shard keeps its size.

        Args:
            shard, spare: rollouts.
            scores: of the shard by all sources, then of ``spare`` by all.
        """
        return concat([shard, spare])[_replacement(shard, spare, scores)]

    @staticmethod
    def replaced_scores(place: int, shard: Experience, spare: Experience, *scores: Scores) -> Scores:
        """The scores of what ``replace_without_signal`` gives, by the source at ``place``."""
        rows = _replacement(shard, spare, scores)
        first, second = scores[place], scores[place + len(scores) // 2]
        sample_ids = sample_ids_of(torch.cat([shard.prompt_ids, spare.prompt_ids])[rows])
        problem = second.problem or first.problem
        failures = first.num_failures + second.num_failures
        return Scores(first.source, sample_ids, torch.cat([first.values, second.values])[rows], failures, problem)


def _replacement(shard: Experience, spare: Experience, scores: Sequence[Scores]) -> torch.Tensor:
    """Rows of shard and spare, one behind the other, that make the new shard."""
    half = len(scores) // 2
    keep = teaches(scores[:half], shard.prompt_ids, shard.turn_rewards)
    chosen = teaches(scores[half:], spare.prompt_ids, spare.turn_rewards)
    rows = torch.arange(len(shard))
    return torch.cat([rows[keep], len(shard) + chosen.nonzero()[:, 0], rows[~keep]])[: len(shard)]


def by_token(shard: Experience, found: list[Any]) -> tuple[torch.Tensor, list[float | Failed]]:
    """(B, T) what the steps earned, at their places among the action tokens, and the sum of each response."""
    token_values = torch.zeros(shard.sequences.shape)
    for row, values in enumerate(found):
        if not isinstance(values, Failed):
            token_values[row][shard.action_mask[row]] = torch.tensor(values)
    return token_values, [v if isinstance(v, Failed) else float(sum(v)) for v in found]


def _select(samples: Samples, places: list[int]) -> Samples:
    parts = {field: getattr(samples, field) for field in Samples.__slots__}
    return Samples(**{field: tuple(values[place] for place in places) for field, values in parts.items()})


class ModelScorer:
    """The reward model; blocking, in a thread."""

    def __init__(self, source: ModelSource, reward_models: Sequence[str]) -> None:
        self.actor = RewardActor(
            model=[str(folder) for folder in source.folders] or reward_models,
            micro_batch_size=source.micro_batch_size,
            uncertainty=source.uncertainty,
            uncertainty_coef=source.uncertainty_coef,
            standard=source.normalize != "none",
        )

    def score(self, shard: Experience, _: Samples | None) -> list[float | Failed]:
        values = self.actor.score(shard).tolist()
        return [v if v == v and abs(v) != float("inf") else Failed(f"gave {v}") for v in values]


class GoldScorer:
    """The toy world's exact judge, about -5 to 3."""

    def score(self, _: Experience, samples: Samples) -> list[float | Failed]:
        from rayllm.world.judge import judge
        from rayllm.world.prompts import Prompt

        given = zip(samples.rows, samples.responses, samples.stopped, strict=True)
        return [judge(Prompt.from_row(row), text, stopped=stopped).gold for row, text, stopped in given]


class NoScorer:
    """Zeros: the environment's turns are all."""

    def score(self, shard: Experience, _: Samples | None) -> list[float | Failed]:
        return [0.0] * len(shard)


def _scorer(source: Source, reward_models: Sequence[str]) -> Any:
    if isinstance(source, ModelSource):
        return ModelScorer(source, reward_models)
    if isinstance(source, ProcessSource):
        from actors.reward_process import ProcessScorer

        return ProcessScorer(source)
    if isinstance(source, FunctionSource | VerifierSource):
        return Child(source)
    if isinstance(source, HttpSource):
        return HttpRewards(source)
    if isinstance(source, JudgeSource):
        return Judge(source)
    return GoldScorer() if isinstance(source, GoldSource) else NoScorer()
