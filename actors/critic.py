"""The critic: estimates, before each token, the reward still to come (PPO's value half)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from actors.learner import LearnerActor
from rayllm import faults
from rayllm.algorithms.losses import value_loss
from rayllm.algorithms.metrics import explained_variance
from rayllm.config.ppo import PPOConfig
from rayllm.data.experience import Experience, concat
from rayllm.models.engine import Engine
from rayllm.models.folders import is_sequence_classifier, load_tokenizer
from rayllm.models.heads import ScalarModel, token_values
from rayllm.models.loading import save_model
from rayllm.startup import without_garbage_collection


class CriticActor(LearnerActor):
    """One rank of the critic; unless told otherwise it starts from the reward model (InstructGPT, C.4)."""

    def __init__(self, *, rank: int, world_size: int, config: PPOConfig) -> None:
        super().__init__(rank=rank, world_size=world_size, config=config, role=config.critic)

    @without_garbage_collection()
    def setup(self, address: tuple[str, int]) -> None:
        """Join the ranks and load the model."""
        faults.reach("critic.setup", rank=self.rank)
        self.join(address)
        start = self.config.critic_start
        seed = None if is_sequence_classifier(start) else self.config.seed
        model = ScalarModel.from_folder(start, seed=seed, num_heads=1)
        self.engine = Engine(model, self.role.optimizer, self.role.learner)
        self.rest()

    def values(self, shard: Experience) -> torch.Tensor:
        """(B, T) value before each token."""
        return faults.reach("critic.values", self.score(shard, self._values), rank=self.rank)

    def update(self, *shards: Experience, step: int) -> dict[str, float]:
        """Regress on the returns; returns metrics."""
        faults.reach("critic.update", rank=self.rank)
        self.begin_update(step)
        experience, step_experience = self.joined(shards), concat(list(shards))
        variance = explained_variance(
            step_experience.values, step_experience.returns, step_experience.action_mask
        )
        stats = []
        with self.turn():
            for batch in self.minibatches(experience, step):
                tokens = self.global_tokens(batch)
                if not tokens:  # all its responses were dropped, on every rank
                    continue
                loss = partial(self._loss, tokens=tokens)
                rate = self.learning_rate(step)
                stats.append(self.optimize(batch, loss, batch=batch, learning_rate=rate))
        return {
            **self.update_metrics("loss/value", "critic", stats),
            "value/explained_variance": float(variance),
        }

    def export(self, folder: str) -> None:
        """Write the model folder, as that of a reward model (rank 0; every rank must be called)."""
        weights = self.engine.state_dict()
        if self.rank == 0:
            weights = {name.removeprefix("classifier."): tensor for name, tensor in weights.items()}
            tokenizer = load_tokenizer(self.config.model)
            save_model(self.engine.module.classifier, tokenizer, Path(folder), state_dict=weights)

    def _loss(self, part: Experience, tokens: float) -> torch.Tensor:
        part = part.to(self.engine.device)
        return value_loss(
            self._values(part),
            part.values,
            part.returns,
            part.action_mask,
            clip_range=self.config.algorithm.value_clip_range,
            normalizer=tokens,
        )

    def _values(self, part: Experience) -> torch.Tensor:
        return token_values(self.engine(input_ids=part.sequences, attention_mask=part.attention_mask))
