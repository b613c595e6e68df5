"""What scores responses: a reward model, the toy world's own judge, or a function of the user's. One number each."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from actors.environment import device_of
from actors.scoring import micro_batches
from rayllm.algorithms.advantages import has_signal
from rayllm.algorithms.ensembles import combine_ensemble
from rayllm.algorithms.rewards import RunningMoments
from rayllm.data.experience import Experience, concat
from rayllm.data.files import Row
from rayllm.data.padding import pad_right
from rayllm.errors import InputError
from rayllm.models.heads import ScalarModel, sequence_rewards
from rayllm.named import import_named


class RewardSource:
    """What the sources of rewards share. A source implements ``score``."""

    def score(self, shard: Experience) -> torch.Tensor:
        """(B,) float32."""
        raise NotImplementedError

    def rewards(self, shard: Experience) -> torch.Tensor:
        """(B,) float32: those that the shard brings, or else its scores and what its turns earned."""
        if shard.rewards is not None:
            return shard.rewards
        return with_turns(self.score(shard), shard)

    @staticmethod
    def moments(rewards: torch.Tensor) -> RunningMoments:
        """Of a shard's rewards, for the scale of the whole run."""
        return RunningMoments().update(rewards)

    @staticmethod
    def count_without_signal(shard: Experience, rewards: torch.Tensor) -> int:
        """Prompts of the shard whose responses all got the same reward."""
        return len(shard.prompt_ids[~has_signal(rewards, shard.prompt_ids)].unique())

    @staticmethod
    def replace_without_signal(
        shard: Experience, rewards: torch.Tensor, spare: Experience, spare_rewards: torch.Tensor
    ) -> Experience:
        """The shard with prompts that teach nothing replaced by those of ``spare`` that do; it brings its rewards.

        Prompts have equal numbers of responses, next to each other, so that the shard keeps its size.
        """
        shard, spare = shard.replace(rewards=rewards), spare.replace(rewards=spare_rewards)
        keep = has_signal(rewards, shard.prompt_ids)
        chosen = spare[has_signal(spare_rewards, spare.prompt_ids)]
        parts = [part for part in (shard[keep], chosen, shard[~keep]) if len(part)]
        return concat(parts)[slice(0, len(shard))]


class RewardActor(RewardSource):
    """Scores responses with a frozen reward model, or with an ensemble: several heads, several models, or both."""

    def __init__(
        self,
        *,
        model: str | Sequence[str],
        micro_batch_size: int,
        uncertainty: str = "none",
        uncertainty_coef: float = 1.0,
    ) -> None:
        """
        Args:
            model: folder of the reward model, or of each of several.
            micro_batch_size: most rows in one forward pass.
            uncertainty: kind of `combine_ensemble`.
            uncertainty_coef: its coef.
        """
        self.device = device_of()
        self.micro_batch_size = micro_batch_size
        self.uncertainty, self.uncertainty_coef = uncertainty, uncertainty_coef
        folders = [model] if isinstance(model, str) else model
        self.models = [ScalarModel.from_folder(folder).to(self.device).eval() for folder in folders]

    def score(self, shard: Experience) -> torch.Tensor:
        """(B,) float32: of an ensemble with what its disagreement takes off."""
        return combine_ensemble(self.members(shard), kind=self.uncertainty, coef=self.uncertainty_coef)[0]

    @torch.no_grad()
    def members(self, shard: Experience) -> torch.Tensor:
        """(B, H) float32: of every head of every model, standardised by the mean and deviation that its training
        measured on held-out data."""
        parts = micro_batches(shard, self.micro_batch_size)
        columns = []
        for model in self.models:
            mean, std = model.moments()
            scores = [self._read(model, part.sequences, part.attention_mask) for part in parts]
            columns.append((torch.cat(scores) - mean) / std)
        return torch.cat(columns, 1)

    @torch.no_grad()
    def raw_scores(self, sequences: list[np.ndarray]) -> torch.Tensor:
        """(B, H) float32 of prompts with responses as they come from the heads."""
        columns = []
        for model in self.models:
            parts = [sequences[i : i + self.micro_batch_size] for i in range(0, len(sequences), self.micro_batch_size)]
            columns.append(torch.cat([self._read(model, *pad_right(part, 0)) for part in parts]))
        return torch.cat(columns, 1)

    def _read(self, model: ScalarModel, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        return sequence_rewards(model(tokens, mask), mask).reshape(len(tokens), -1).cpu()


class GoldRewardActor(RewardSource):
    """Scores responses with the toy world's exact judge."""

    def __init__(self, *, tokenizer: str, rows: list[Row]) -> None:
        """
        Args:
            tokenizer: model folder.
            rows: of the training prompts; a shard's prompt ids are indices into them.
        """
        from rayllm.models.loading import load_tokenizer

        device_of()
        self.tokenizer: Any = load_tokenizer(tokenizer)
        self.rows = rows

    def score(self, shard: Experience) -> torch.Tensor:
        """(B,) float32 gold scores, about -5 to 3."""
        from rayllm.world.judge import judge
        from rayllm.world.prompts import Prompt

        scores = []
        for index, prompt_id in enumerate(shard.prompt_ids.tolist()):
            token_ids = shard.sequences[index][shard.action_mask[index]].tolist()
            text = self.tokenizer.decode(token_ids, skip_special_tokens=True).strip()
            prompt = Prompt.from_row(self.rows[prompt_id])
            scores.append(judge(prompt, text, stopped=bool(shard.stopped[index])).gold)
        return torch.tensor(scores)


class FunctionRewardActor(RewardSource):
    """Scores responses with a Python function ``f(prompts, responses, token_ids, rows)``, plain or async, which returns
    a number for each response.

    ``prompts`` are text as the model reads it, special tokens included; ``responses`` are text without them;
    ``token_ids`` are the tokens that the policy sampled; ``rows`` are the prompts' rows, with all their columns.
    """

    def __init__(self, *, function: str, tokenizer: str, rows: list[Row]) -> None:
        """
        Args:
            function: ``module:name``.
            tokenizer: model folder.
            rows: of the training prompts; a shard's prompt ids are indices into them.
        """
        from rayllm.models.loading import load_tokenizer

        device_of()
        self.name = function
        self.function = load_reward_function(function)
        self.tokenizer: Any = load_tokenizer(tokenizer)
        self.rows = rows
        self.runner = asyncio.Runner()  # one loop for all calls: what the function keeps open stays of use

    def score(self, shard: Experience) -> torch.Tensor:
        """(B,) float32, as the function returns them.

        Raises:
            RuntimeError: the function raised, or returned something else than a finite number for each response.
        """
        return self._score(shard, self.rows)

    def held_out_rewards(self, shard: Experience, rows: list[Row]) -> torch.Tensor:
        """``rewards`` of responses to other prompts than the training ones; prompt ids are indices into ``rows``."""
        return with_turns(self._score(shard, rows), shard)

    def _score(self, shard: Experience, rows: list[Row]) -> torch.Tensor:
        firsts = shard.action_mask.int().argmax(1).tolist()
        prompts = [ids[:first].tolist() for ids, first in zip(shard.sequences, firsts, strict=True)]
        token_ids = [ids[mask].tolist() for ids, mask in zip(shard.sequences, shard.action_mask, strict=True)]
        responses = [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in token_ids]
        chosen = [rows[prompt_id] for prompt_id in shard.prompt_ids.tolist()]
        try:
            found = self.function([self.tokenizer.decode(ids) for ids in prompts], responses, token_ids, chosen)
            if inspect.isawaitable(found):
                found = self.runner.run(_result(found))
        except Exception as error:
            raise RuntimeError(f"reward.function={self.name} raised {type(error).__name__}: {error}") from error
        return checked_rewards(found, count=len(shard), name=self.name)


class EnvironmentRewardActor(RewardSource):
    """Nothing but what the environment's turns earned."""

    def score(self, shard: Experience) -> torch.Tensor:
        """(B,) zeros."""
        return torch.zeros(len(shard))


def with_turns(scores: torch.Tensor, shard: Experience) -> torch.Tensor:
    """(B,) scores and, on top, what the turns earned."""
    return scores if shard.turn_rewards is None else scores + shard.turn_rewards.sum(1)


def load_reward_function(path: str) -> Callable[..., Any]:
    """The function that ``module:name`` names.

    Raises:
        InputError: it cannot be imported or called.
    """
    found = import_named(path, what="reward.function")
    if not callable(found):
        raise InputError(f"reward.function: {path} is {found!r:.60}, expected a function")
    return found


def checked_rewards(found: Sequence[float], *, count: int, name: str) -> torch.Tensor:
    """(count,) float32 on the CPU: what the function ``name`` returned.

    Raises:
        RuntimeError: it is no sequence of ``count`` finite numbers.
    """
    expected = f"expected a sequence of {count} finite numbers, one a response"
    try:
        rewards = torch.as_tensor(found, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise RuntimeError(f"reward.function={name} returned {found!r:.80}, {expected}") from None
    if rewards.shape != (count,):
        raise RuntimeError(f"reward.function={name} returned the shape {tuple(rewards.shape)}, {expected}")
    if not rewards.isfinite().all():
        place = int(rewards.isfinite().logical_not().nonzero()[0])
        raise RuntimeError(f"reward.function={name} returned {float(rewards[place])} for response {place}, {expected}")
    return rewards


async def _result(awaitable: Any) -> Any:
    return await awaitable
