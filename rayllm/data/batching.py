"""Which rows make the batch of a step: a pure function of (seed, step), so that a resumed run continues exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class BatchOrder:
    """Seeded order of rows over epochs.

    Every epoch is a new permutation, cut into whole batches; the rows left over at its end are left out of that
    epoch only. With ``lengths``, rows of similar length share a batch, which saves padding: the permutation is
    sorted within windows of ten batches and the batches are shuffled.
    """

    WINDOW = 10

    def __init__(
        self, num_rows: int, batch_size: int, *, seed: int, lengths: Sequence[int] | None = None
    ) -> None:
        if num_rows < batch_size:
            raise ValueError(f"{num_rows} rows do not fill one batch of {batch_size}")
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self.steps_per_epoch = num_rows // batch_size
        self._lengths = None if lengths is None else np.asarray(lengths)
        self._epoch = -1
        self._batches = np.empty((0, batch_size), dtype=np.int64)

    def rows(self, step: int) -> np.ndarray:
        """(batch_size,) int64 row numbers of the step, counted from 0 over all epochs."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffle(epoch)
        return self._batches[index]

    def _shuffle(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.num_rows)[: self.steps_per_epoch * self.batch_size]
        if self._lengths is not None:
            window = self.WINDOW * self.batch_size
            for start in range(0, len(order), window):
                part = order[start : start + window]
                order[start : start + window] = part[np.argsort(self._lengths[part], kind="stable")]
        batches = order.reshape(self.steps_per_epoch, self.batch_size)
        return batches[rng.permutation(self.steps_per_epoch)] if self._lengths is not None else batches
