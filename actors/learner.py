"""What policy and critic share: one rank of a DeepSpeed group, minibatches, checkpoints."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from actors.counters import count
from actors.environment import backend, device_of
from actors.scoring import per_token_in_parts, select
from actors.weight_group import open_store
from actors.weights import digest
from rayllm import faults
from rayllm.checkpoints import Files
from rayllm.config.ppo import PPOConfig
from rayllm.config.rl import LearnerActorsConfig
from rayllm.data.balancing import balanced_partition, micro_batches_by_tokens, with_num_parts
from rayllm.data.experience import Experience, concat
from rayllm.models.engine import Engine, TooManySkipped, UpdateStats, init_distributed


class LearnerActor:
    """One data-parallel rank. Construct all ranks, then `setup` all of them with rank 0's `address`."""

    def __init__(self, *, rank: int, world_size: int, config: PPOConfig, role: LearnerActorsConfig) -> None:
        device_of()
        self.rank, self.world_size = rank, world_size
        self.config, self.role = config, role
        self.engine: Engine
        self._step: int | None = None
        """Of the last update that was begun."""
        self._listener: socket.socket | None = None

    def address(self) -> tuple[str, int]:
        """Host and port where others are to meet with this rank. It listens there from now on, so that no other process
        gets the port before they do; on that address alone, and on one machine for nobody else."""
        one_machine = sum(node["Alive"] for node in ray.nodes()) == 1
        host = "127.0.0.1" if one_machine else ray.util.get_node_ip_address()
        self._listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        return host, self._listener.getsockname()[1]

    def _taken_listener(self) -> socket.socket | None:
        """What `address` has opened, once."""
        listener, self._listener = self._listener, None
        return listener

    def join(self, address: tuple[str, int]) -> None:
        """Meet the other ranks; returns when all are there."""
        os.environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK="0",  # Ray shows each actor its own GPUs only
            MASTER_ADDR=address[0],
            MASTER_PORT=str(address[1]),
        )
        store = open_store(*address, self.rank, self.world_size, self._taken_listener())
        init_distributed(backend(self.role.gpus_per_actor), store)

    def joined(self, shards: Sequence[Experience]) -> Experience:
        """This rank's rows of a step: every rank gets all shards and takes as many rows, and about as many tokens,
        as the others.

        Raises:
            RuntimeError: called with a part of the step's shards; the others' rows would be trained on by no rank.
        """
        if len(shards) != self.config.num_shards:
            raise RuntimeError(
                f"expected all {self.config.num_shards} shards of the step on every rank, got {len(shards)}"
            )
        lengths = [length for shard in shards for length in _lengths(shard)]
        mine = np.sort(balanced_partition(lengths, self.world_size)[self.rank])
        starts = np.cumsum([0, *map(len, shards)])
        parts = [mine[(mine >= a) & (mine < b)] - a for a, b in zip(starts[:-1], starts[1:], strict=True)]
        return concat([shard[torch.from_numpy(rows)] for shard, rows in zip(shards, parts, strict=True)])

    def minibatches(self, experience: Experience, step: int) -> Iterator[list[Experience]]:
        """Every epoch's minibatches as lists of micro-batches; equal numbers on every rank."""
        algorithm = self.config.algorithm
        lengths = _lengths(experience)
        for epoch in range(algorithm.num_epochs):
            rng = np.random.default_rng((self.config.seed, step, epoch, self.rank))
            order = rng.permutation(len(experience))
            plans = [self._parts(rows.tolist(), lengths) for rows in np.array_split(order, algorithm.num_minibatches)]
            for parts, num_parts in zip(plans, self._most([len(plan) for plan in plans]), strict=True):
                yield [select(experience, rows) for rows in with_num_parts(parts, num_parts)]

    def score(self, shard: Experience, forward: Callable[[Experience], torch.Tensor]) -> torch.Tensor:
        """(B, T) float32 on the CPU: ``forward`` in evaluation mode, in micro-batches."""
        self.engine.train(False)
        parts = self._parts(range(len(shard)), _lengths(shard))
        if self.role.learner.zero_stage == 3:  # a pass gathers weights from all ranks: all must make as many
            parts = with_num_parts(parts, self._most([len(parts)])[0])
        return per_token_in_parts(shard, parts, self.engine.device, forward)

    def _parts(self, rows: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """``rows`` cut into micro-batches, by padded tokens or by rows."""
        if self.role.micro_batch_tokens is None:
            size = self.role.micro_batch_size
            return [list(rows[i : i + size]) for i in range(0, len(rows), size)]
        parts = micro_batches_by_tokens([lengths[row] for row in rows], self.role.micro_batch_tokens)
        return [[rows[i] for i in part] for part in parts]

    def _most(self, counts: list[int]) -> list[int]:
        """The largest of each count over the ranks."""
        return self.engine.max_tensor(torch.tensor(counts)).tolist()

    def global_tokens(self, batch: list[Experience]) -> float:
        """Action tokens of a minibatch over all ranks: what losses are divided by."""
        return self.engine.sum_over_ranks(float(sum(int(part.action_mask.sum()) for part in batch)))

    def learning_rate(self, step: int) -> float:
        """The step's rate; warm-up steps of the critic do not count for the policy's schedule."""
        return self.role.optimizer.learning_rate_at(step, self.config.num_steps)

    def update_metrics(self, loss_name: str, name: str, stats: Sequence[UpdateStats]) -> dict[str, float]:
        """Means over the optimizer steps that were made, and the number of those that were not."""
        metrics = {f"{name}/skipped_steps": float(sum(s.skipped for s in stats))}
        made = [s for s in stats if not s.skipped]
        if made:
            metrics[loss_name] = self.engine.sum_over_ranks(sum(s.loss for s in made)) / len(made)
            metrics[f"{name}/grad_norm"] = sum(s.grad_norm for s in made) / len(made)
            metrics[f"{name}/lr"] = made[-1].learning_rate
        return metrics

    def mean_over_ranks(self, sums: dict[str, tuple[float, float]]) -> dict[str, float]:
        """name -> (sum, count) on this rank; returns name -> global mean."""
        flat = torch.tensor([number for pair in sums.values() for number in pair], dtype=torch.float64)
        totals = self.engine.sum_tensor(flat).view(-1, 2)
        means = {name: float(t / max(float(n), 1e-12)) for name, (t, n) in zip(sums, totals, strict=True)}
        return means

    def optimize(
        self,
        parts: Sequence[Any],
        loss: Callable[[Any], torch.Tensor],
        *,
        batch: list[Experience],
        learning_rate: float,
    ) -> UpdateStats:
        """One optimizer step.

        Args:
            parts: micro-batches.
            loss: of one of them.
            batch: the step's responses, to be named.
            learning_rate: of the step.

        Raises:
            RuntimeError: too many steps in a row were not finite; names the prompts of the last one.
        """

        def counted(part: Any) -> torch.Tensor:
            count("parts")
            return loss(part)

        try:
            return self.engine.update(parts, counted, learning_rate=learning_rate)
        except TooManySkipped as error:
            prompts = sorted({prompt for part in batch for prompt in part.prompt_ids.tolist()})
            raise RuntimeError(f"{error}; prompts of this rank in the last one: {prompts}") from error

    def rest(self) -> None:
        """Colocated: optimizer states move to the memory of the host, until the next `turn`."""
        if self.config.placement.mode == "colocated":
            self.engine.offload_states()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """In which optimizer states are where the model is."""
        self.engine.reload_states()
        yield
        self.rest()

    def begin_update(self, step: int) -> None:
        """From here on the weights may change."""
        self._step = step

    def has_begun(self, step: int) -> bool:
        """Whether this step's update was begun here, finished or not."""
        return self._step == step

    def digest(self) -> str:
        """Of all weights; every rank must be called."""
        return digest(self.engine.named_tensors())

    def checkpoint_bytes(self) -> int:
        """Of all ranks' parts, about."""
        return self.engine.checkpoint_bytes

    def save(self, folder: str) -> Files:
        """This rank's part of a checkpoint; returns what was written."""
        faults.reach("learner.save", Path(folder), rank=self.rank)
        with self.turn():
            return self.engine.save(Path(folder))

    def load(self, folder: str) -> None:
        """Continue from a checkpoint."""
        faults.reach("learner.load", Path(folder), rank=self.rank)
        self._step = None
        with self.turn():
            self.engine.load(Path(folder))


def _lengths(experience: Experience) -> list[int]:
    """Tokens of each row."""
    return experience.attention_mask.sum(1).tolist()
