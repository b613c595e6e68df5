"""What the steps of an RL run train on: rollouts under way, as far ahead of the learner as the config allows."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import Any

import ray

from actors.rollout import RolloutActor
from jobs.ppo_rewards import ShardScores
from jobs.ppo_roles import Roles
from rayllm.config.ppo import PPOConfig
from rayllm.data.experience import concat
from rayllm.data.prompts import PromptData, PromptSpan, PromptStream


@dataclass(frozen=True, slots=True)
class Part:
    """Whole prompts that are sampled and scored together."""

    step: int
    """The step that their prompts were drawn for: with the prompts it decides the seeds."""

    span: PromptSpan


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """A part under way."""

    part: Part
    version: int
    """Policy updates in the weights when it was begun."""

    experience: ray.ObjectRef
    scores: ShardScores


class Batches:
    """Shards of rollouts, begun in the order of the prompts and handed out step by step.

    As many are under way as ``max_policy_lag`` allows: none is trained on more than that many updates after it was
    begun. A prompt that was taken from the stream is trained on once: what is under way is part of the `state`, and is
    begun again when a run continues.
    """

    def __init__(self, roles: Roles, prompts: PromptData, config: PPOConfig) -> None:
        self.roles, self.prompts, self.config = roles, prompts, config
        self.stream = PromptStream(len(prompts), seed=config.seed)
        count = config.num_shards
        # Where the tail is cut, half a step less: room for the late ones to be taken a step later.
        self._capacity = count * (config.max_policy_lag + 1) - (count // 2 if config.rollout.cut_tail else 0)
        self._drawn = 0
        """Steps whose prompts were drawn."""
        self._waiting: list[Part] = []
        self._ahead: list[Shard] = []
        self._taken: list[Shard] = []
        self._position = self.stream.position
        """Of the prompts, when the last step was taken."""

    def take(self, step: int) -> tuple[list[Any], list[ShardScores]]:
        """References of the step's experience and scores, shard by shard. Later ones are begun as well."""
        room = self._capacity - len(self._ahead)
        while len(self._waiting) < room and self._drawn < self.config.num_steps:
            self._waiting += self._draw()
        self._ahead += self._begin(self._waiting[:room], version=step)
        self._waiting = self._waiting[room:]
        count = self.config.num_shards
        if self.config.rollout.cut_tail:
            self._sort_by_completion(step, count)
        self._taken, self._ahead = self._ahead[:count], self._ahead[count:]
        self._position = self.stream.position
        return [shard.experience for shard in self._taken], [shard.scores for shard in self._taken]

    def done(self) -> None:
        """What was taken is trained on."""
        self._taken = []

    def put_back(self, *, score: bool) -> None:
        """The step that was taken last begins again, on the same responses.

        Args:
            score: whoever scores them was lost; all that is under way is scored anew.
        """
        self._ahead, self._taken = [*self._taken, *self._ahead], []
        self.stream.position = self._position
        if score:
            anew = self.roles.reward.score([shard.experience for shard in self._ahead])
            self._ahead = [replace(shard, scores=scores) for shard, scores in zip(self._ahead, anew, strict=True)]

    def more(self, counts: list[int], step: int) -> list[Any]:
        """References of experience on the next prompts, one shard for each count. Behind an epoch's end they may be in
        the step already: their samples are others then."""
        epoch = min(shard.part.span.epoch for shard in self._taken)
        spans = [self.stream.take(count) for count in counts]
        return [self._sample([span], step, again=span.epoch - epoch)[0] for span in spans]

    def state(self) -> dict[str, Any]:
        """For a checkpoint: how far the prompts are used, and what is under way."""
        parts = [*(shard.part for shard in self._ahead), *self._waiting]
        return {
            "prompts": list(self.stream.position),
            "drawn": self._drawn,
            "num_shards": self.config.num_shards,
            "ahead": [[part.step, astuple(part.span)] for part in parts],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on after a checkpoint. What is under way is given up.

        Raises:
            RuntimeError: what was under way is cut for other numbers of ranks.
        """
        if state["ahead"] and state["num_shards"] != self.config.num_shards:
            raise RuntimeError(
                f"the checkpoint has rollouts under way in {state['num_shards']} shards a step, these numbers of "
                f"actors make {self.config.num_shards}; continue with the same policy.num_actors, critic.num_actors, "
                "rollout.num_actors and rollout.cut_tail (any will do with max_policy_lag=0)"
            )
        self.roles.rollout.drop([shard.experience for shard in [*self._taken, *self._ahead]])
        self._taken, self._ahead = [], []
        epoch, taken = state["prompts"]
        self.stream.position = (epoch, taken)
        self._drawn = state["drawn"]
        self._waiting = [Part(step, PromptSpan(*span)) for step, span in state["ahead"]]

    def _draw(self) -> list[Part]:
        """The next step's prompts."""
        spans = self.stream.take(self.config.prompts_per_step).split(self.config.num_shards)
        self._drawn += 1
        return [Part(self._drawn - 1, span) for span in spans]

    def _begin(self, parts: list[Part], *, version: int) -> list[Shard]:
        shards = []
        for step in dict.fromkeys(part.step for part in parts):
            of_step = [part for part in parts if part.step == step]
            references = self._sample([part.span for part in of_step], step)
            scores = self.roles.reward.score(references)
            shards += [Shard(p, version, e, s) for p, e, s in zip(of_step, references, scores, strict=True)]
        return shards

    def _sample(self, spans: list[PromptSpan], step: int, *, again: int = 0) -> list[ray.ObjectRef]:
        pieces = [span.split(self.config.pieces_per_shard) for span in spans]
        tokens = [[self._tokens(piece) for piece in of_span] for of_span in pieces]
        submit, sample = self.roles.rollout.submit_joined, RolloutActor.experience
        return submit(sample, pieces, tokens=tokens, join=concat, step=step, again=again)

    def _tokens(self, span: PromptSpan) -> int:
        """Tokens of these prompts and their longest responses; an environment's prompts are not known before."""
        config, lengths = self.config, self.prompts.token_ids
        prompt = sum(len(lengths[index]) for index in self.stream.ids(span)) if lengths else 0
        return (prompt + span.count * config.rollout.max_new_tokens) * config.samples_per_prompt

    def _sort_by_completion(self, step: int, count: int) -> None:
        """To the front: what may not get older, then what is done; ``count`` of them are done or must be."""
        ahead = [shard.experience for shard in self._ahead]
        ray.wait(ahead, num_returns=count, fetch_local=False)  # where more are done it names any
        done = set(ray.wait(ahead, num_returns=len(ahead), timeout=0, fetch_local=False)[0])
        oldest = step - self.config.max_policy_lag
        self._ahead.sort(key=lambda s: (s.version > oldest, s.experience not in done))
