"""What policy and critic share: one rank of a DeepSpeed group, minibatches, checkpoints."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from actors.environment import backend, device_of
from actors.scoring import micro_batches
from rayllm.config.ppo import LearnerActorsConfig, PPOConfig
from rayllm.data.experience import Experience, concat
from rayllm.models.engine import Engine, init_distributed


class LearnerActor:
    """One data-parallel rank. Construct all ranks, then `setup` all of them with rank 0's `address`."""

    def __init__(self, *, rank: int, world_size: int, config: PPOConfig, role: LearnerActorsConfig) -> None:
        device_of()
        self.rank, self.world_size = rank, world_size
        self.config, self.role = config, role
        self.engine: Engine

    def address(self) -> tuple[str, int]:
        """Host and a free port where the ranks meet."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def join(self, address: tuple[str, int]) -> None:
        """Meet the other ranks; returns when all are there."""
        os.environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK="0",  # Ray shows each actor its own GPUs only
            MASTER_ADDR=address[0],
            MASTER_PORT=str(address[1]),
        )
        init_distributed(backend(self.role.gpus_per_actor))

    def minibatches(self, experience: Experience, step: int) -> Iterator[list[Experience]]:
        """Every epoch's minibatches as lists of micro-batches; equal numbers on every rank."""
        algorithm = self.config.algorithm
        for epoch in range(algorithm.num_epochs):
            rng = np.random.default_rng((self.config.seed, step, epoch, self.rank))
            order = torch.from_numpy(rng.permutation(len(experience)))
            for rows in order.tensor_split(algorithm.num_minibatches):
                yield micro_batches(experience[rows], self.role.micro_batch_size)

    def global_tokens(self, batch: list[Experience]) -> float:
        """Action tokens of a minibatch over all ranks: what losses are divided by."""
        return self.engine.sum_over_ranks(float(sum(int(part.action_mask.sum()) for part in batch)))

    def learning_rate(self, step: int) -> float:
        """The step's rate; warm-up steps of the critic do not count for the policy's schedule."""
        return self.role.optimizer.learning_rate_at(step, self.config.num_steps)

    def mean_over_ranks(self, sums: dict[str, tuple[float, float]]) -> dict[str, float]:
        """name -> (sum, count) on this rank; returns name -> global mean."""
        flat = torch.tensor([number for pair in sums.values() for number in pair], dtype=torch.float64)
        totals = self.engine.sum_tensor(flat).view(-1, 2)
        means = {name: float(t / max(float(n), 1e-12)) for name, (t, n) in zip(sums, totals, strict=True)}
        return means

    def save(self, folder: str, state: dict[str, Any]) -> None:
        """This rank's part of a checkpoint."""
        self.engine.save(Path(folder), state)

    def load(self, folder: str) -> dict[str, Any]:
        """Continue from a checkpoint; returns its state."""
        return self.engine.load(Path(folder))

    @staticmethod
    def joined(shards: tuple[Experience, ...]) -> Experience:
        return concat(list(shards))
