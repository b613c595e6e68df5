"""The preference job's task: batches of whole prompts, the loss, what is measured, the reference's log-probabilities.

A batch element is a prompt with all its responses: each response is computed once, however many pairs it is in. The
loss is the mean over prompts of the mean over a prompt's pairs (kto: over its responses).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.trainer import TrainTask
from rayllm.algorithms.logprobs import token_logprobs
from rayllm.algorithms.preference import KINDS, kto_loss, preference_loss, reference_point, response_logprobs
from rayllm.config.preference import PreferenceConfig
from rayllm.data.balancing import micro_batches_by_tokens, with_num_parts
from rayllm.data.batching import BatchOrder
from rayllm.data.comparisons import Comparison
from rayllm.data.padding import pad_right
from rayllm.models.engine import Engine
from rayllm.models.folders import load_tokenizer
from rayllm.models.loading import load_causal_lm, save_model

SUMS = ("loss", "right", "weight", "chosen", "chosen_weight", "rejected", "rejected_weight", "kl")
"""What the metrics of a batch are made of; micro-batches and ranks add up."""


@dataclass(frozen=True)
class Responses:
    """Padded prompts with responses."""

    tokens: torch.Tensor  # (B, T) int64
    attention_mask: torch.Tensor  # (B, T) bool
    action_mask: torch.Tensor  # (B, T) bool, the responses
    ref_logprobs: torch.Tensor  # (B,) nats under the reference, summed over the response; 0 without one

    def to(self, device: torch.device) -> Responses:
        return Responses(**{name: tensor.to(device) for name, tensor in vars(self).items()})


@dataclass(frozen=True)
class MicroBatch:
    """All responses of some prompts of a batch."""

    responses: Responses
    row_weights: torch.Tensor  # (B,) share of each response in the batch's means over responses
    chosen: torch.Tensor  # (P,) int64, rows of `responses`; P is 0 for kto
    rejected: torch.Tensor  # (P,)
    pair_weights: torch.Tensor  # (P,) share of each pair in the batch's means over pairs
    desirable: torch.Tensor  # (B,) bool; kto only
    mismatched: Responses | None  # as many as `responses`; kto only


@dataclass
class PreferenceTask(TrainTask):
    config: PreferenceConfig
    train: list[Comparison]
    heldout: list[Comparison]
    pad_token_id: int
    num_steps: int
    data_id: str
    """Digest of the reference model and of all data."""

    _ref_logprobs: list[np.ndarray] = field(default_factory=list)
    _kl: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    _sums: torch.Tensor = field(default_factory=lambda: _no_sums())

    def build(self) -> torch.nn.Module:
        return load_causal_lm(self.config.model)

    def prepare(self, engine: Engine, run_dir: Path) -> None:
        """Reference log-probabilities of all data: read, if an earlier attempt wrote them, else computed."""
        if not KINDS[self.config.kind].reference:
            return
        path = run_dir / f"reference-{self.data_id[:16]}.npy"
        if engine.sum_over_ranks(path.is_file()) == engine.world_size:
            flat = np.load(path)
        else:
            flat = self._compute_reference(engine)
            if engine.rank == 0:
                partial = path.with_name(path.name + ".partial")
                with partial.open("wb") as file:
                    np.save(file, flat)
                partial.replace(path)
        ends = np.cumsum([len(_all_sequences(comparison)) for comparison in self._comparisons])
        self._ref_logprobs = np.split(flat, ends[:-1])

    def micro_batches(self, step: int, rank: int, world_size: int) -> Sequence[MicroBatch]:
        return self._micro_batches(self._order.rows(step).tolist(), rank, world_size)

    def begin_step(self, engine: Engine, micro_batches: Sequence[MicroBatch]) -> None:
        self._sums = _no_sums()
        if not KINDS[self.config.kind].paired:
            self._kl = self._reference_point(engine, micro_batches)

    def loss(self, engine: Engine, micro_batch: MicroBatch) -> torch.Tensor:
        """Adds to the sums of the batch on the way."""
        responses = micro_batch.responses.to(engine.device)
        logprobs = self._logprobs(engine, responses)
        if KINDS[self.config.kind].paired:
            loss, sums = self._paired_loss(micro_batch, responses, logprobs)
        else:
            loss, sums = self._unpaired_loss(micro_batch, responses, logprobs)
        if KINDS[self.config.kind].reference:
            drift = responses.ref_logprobs.cpu() - logprobs.detach().cpu()
            sums["kl"] = (micro_batch.row_weights * drift).sum()
        sums["loss"] = loss.detach()
        self._sums += torch.tensor([float(sums.get(name, 0.0)) for name in SUMS], dtype=torch.float64)
        return loss

    def num_tokens(self, micro_batch: MicroBatch) -> int:
        return int(micro_batch.responses.attention_mask.sum())

    def step_metrics(self, engine: Engine) -> dict[str, float]:
        return self._metrics(engine, "train")

    def evaluate(self, engine: Engine) -> dict[str, float]:
        rows = [len(self.train) + index for index in range(len(self.heldout))]
        micro_batches = self._micro_batches(rows, engine.rank, engine.world_size)
        self.begin_step(engine, micro_batches)
        for micro_batch in micro_batches:
            self.loss(engine, micro_batch)
        metrics = self._metrics(engine, "eval")
        self._sums = _no_sums()
        return metrics

    def save(self, module: Any, state_dict: Mapping[str, torch.Tensor], folder: Path) -> None:
        save_model(module, load_tokenizer(self.config.model), folder, state_dict=state_dict)

    @cached_property
    def _order(self) -> BatchOrder:
        return BatchOrder(len(self.train), self.config.batch_size, seed=self.config.seed)

    @cached_property
    def _comparisons(self) -> list[Comparison]:
        return [*self.train, *self.heldout]

    def _paired_loss(
        self, micro_batch: MicroBatch, responses: Responses, logprobs: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        config, device = self.config, logprobs.device
        chosen, rejected = micro_batch.chosen.to(device), micro_batch.rejected.to(device)
        weights = micro_batch.pair_weights.to(device)
        lengths = responses.action_mask.sum(1).clamp(min=1)
        per_token = logprobs / lengths
        policy, ref = logprobs, responses.ref_logprobs
        if KINDS[config.kind].averaged:
            policy, ref = per_token, ref / lengths
        loss, chosen_rewards, rejected_rewards = preference_loss(
            policy[chosen], policy[rejected], ref[chosen], ref[rejected], kind=config.kind, beta=config.beta,
            label_smoothing=config.label_smoothing, target_margin=config.target_margin, weights=weights,
        )  # fmt: skip
        if config.sft_coef:
            loss = loss - config.sft_coef * (weights * per_token[chosen]).sum()
        return loss, {
            "right": (weights * _share_right(chosen_rewards - rejected_rewards)).sum(),
            "weight": weights.sum(),
            "chosen": (weights * chosen_rewards).sum(),
            "chosen_weight": weights.sum(),
            "rejected": (weights * rejected_rewards).sum(),
            "rejected_weight": weights.sum(),
        }

    def _unpaired_loss(
        self, micro_batch: MicroBatch, responses: Responses, logprobs: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        config, device = self.config, logprobs.device
        desirable, weights = micro_batch.desirable.to(device), micro_batch.row_weights.to(device)
        loss, rewards = kto_loss(
            logprobs, responses.ref_logprobs, desirable, self._kl, beta=config.beta, weights=weights,
            desirable_weight=config.desirable_weight, undesirable_weight=config.undesirable_weight,
        )  # fmt: skip
        wanted, unwanted = weights * desirable, weights * ~desirable
        gain = rewards - config.beta * self._kl.to(device)
        return loss, {
            "right": (weights * _share_right(torch.where(desirable, gain, -gain))).sum(),
            "weight": weights.sum(),
            "chosen": (wanted * rewards).sum(),
            "chosen_weight": wanted.sum(),
            "rejected": (unwanted * rewards).sum(),
            "rejected_weight": unwanted.sum(),
        }

    def _metrics(self, engine: Engine, prefix: str) -> dict[str, float]:
        sums = dict(zip(SUMS, engine.sum_tensor(self._sums).tolist(), strict=True))
        chosen = sums["chosen"] / max(sums["chosen_weight"], 1e-12)
        rejected = sums["rejected"] / max(sums["rejected_weight"], 1e-12)
        found = {
            "loss": sums["loss"],
            "accuracy": sums["right"] / sums["weight"],
            "chosen_rewards": chosen,
            "rejected_rewards": rejected,
            "margin": chosen - rejected,
        }
        if KINDS[self.config.kind].reference:
            found["kl"] = sums["kl"]
        if not KINDS[self.config.kind].paired:
            found["reference_point"] = float(self._kl)
        return {f"{prefix}/{name}": value for name, value in found.items()}

    def _logprobs(self, engine: Engine, responses: Responses) -> torch.Tensor:
        """(B,) nats, summed over each response."""
        logits = engine(input_ids=responses.tokens, attention_mask=responses.attention_mask).logits
        return response_logprobs(token_logprobs(logits, responses.tokens), responses.action_mask)

    @torch.no_grad()
    def _reference_point(self, engine: Engine, micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
        """KTO's reference point over the whole batch, on all ranks."""
        engine.train(False)
        totals = torch.zeros(3, dtype=torch.float64)  # policy, reference, responses
        for micro_batch in micro_batches:
            assert micro_batch.mismatched is not None
            mismatched = micro_batch.mismatched.to(engine.device)
            counted = micro_batch.row_weights > 0
            for index, values in enumerate((self._logprobs(engine, mismatched), mismatched.ref_logprobs)):
                totals[index] += values.double().cpu()[counted].sum()
            totals[2] += counted.sum()
        policy, ref, count = engine.sum_tensor(totals)
        return reference_point((policy / count)[None], (ref / count)[None])

    @torch.no_grad()
    def _compute_reference(self, engine: Engine) -> np.ndarray:
        """(R,) float32 nats of every sequence of the data in order, each rank a part."""
        rows = [(s, c.num_prompt_tokens) for c in self._comparisons for s in _all_sequences(c)]
        found = torch.zeros(len(rows), dtype=torch.float64)
        engine.train(False)
        with engine.reference() if self.config.learner.lora.rank is not None else nullcontext():
            for part in self._parts([len(s) for s, _ in rows], 1, engine.rank, engine.world_size):
                responses = self._pad([rows[row] for row in part or [0]], np.zeros(len(part or [0])))
                logprobs = self._logprobs(engine, responses.to(engine.device))
                if part:
                    found[part] = logprobs.double().cpu()
        return engine.sum_tensor(found).float().numpy()

    def _micro_batches(self, rows: Sequence[int], rank: int, world_size: int) -> list[MicroBatch]:
        """This rank's part of a batch of rows of `_comparisons`."""
        most = max(len(comparison.sequences) for comparison in self._comparisons)
        parts = self._parts([self._comparisons[row].longest for row in rows], most, rank, world_size)
        return [
            self._collate([rows[i] for i in part], 1 / len(rows)) if part else self._collate([rows[0]], 0.0)
            for part in parts
        ]

    def _parts(self, lengths: Sequence[int], rows_each: int, rank: int, world_size: int) -> list[list[int]]:
        """Places in ``lengths`` for each forward pass of this rank; every rank makes the same number of passes.

        Args:
            lengths: longest row of each element.
            rows_each: most rows of an element.
        """
        shares = [self._cut(range(r, len(lengths), world_size), lengths, rows_each) for r in range(world_size)]
        return with_num_parts(shares[rank], max(len(share) for share in shares))

    def _cut(self, places: Sequence[int], lengths: Sequence[int], rows_each: int) -> list[list[int]]:
        if self.config.micro_batch_tokens is not None:
            parts = micro_batches_by_tokens([lengths[p] * rows_each for p in places], self.config.micro_batch_tokens)
            return [[places[i] for i in part] for part in parts]
        size = max(1, self.config.micro_batch_size // rows_each)
        return [list(places[i : i + size]) for i in range(0, len(places), size)]

    def _collate(self, rows: Sequence[int], weight: float) -> MicroBatch:
        """Prompts as a micro-batch, each with this weight in the batch."""
        comparisons = [self._comparisons[row] for row in rows]
        starts = np.cumsum([0, *(len(c.sequences) for c in comparisons)]).tolist()
        pairs = [(start + a, start + b) for c, start in zip(comparisons, starts, strict=False) for a, b in c.pairs]
        chosen, rejected = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
        refs = [self._ref_logprobs[row] if self._ref_logprobs else np.zeros(len(c.sequences))
                for row, c in zip(rows, comparisons, strict=True)]  # fmt: skip
        counts = [len(c.sequences) for c in comparisons]
        mismatched = [(s, c.num_prompt_tokens) for c in comparisons for s in c.mismatched]
        return MicroBatch(
            responses=self._pad(
                [(s, c.num_prompt_tokens) for c in comparisons for s in c.sequences],
                np.concatenate([ref[:count] for ref, count in zip(refs, counts, strict=True)]),
            ),
            row_weights=torch.tensor([weight / count for count in counts for _ in range(count)]),
            chosen=chosen,
            rejected=rejected,
            pair_weights=torch.tensor([weight / len(c.pairs) for c in comparisons for _ in c.pairs]),
            desirable=torch.tensor([wanted for c in comparisons for wanted in c.desirable], dtype=torch.bool),
            mismatched=self._pad(
                mismatched, np.concatenate([ref[count:] for ref, count in zip(refs, counts, strict=True)])
            ) if mismatched else None,
        )  # fmt: skip

    def _pad(self, rows: Sequence[tuple[np.ndarray, int]], ref_logprobs: np.ndarray) -> Responses:
        """(sequence, number of its prompt's tokens) rows as one batch."""
        tokens, mask = pad_right([sequence for sequence, _ in rows], self.pad_token_id)
        places = torch.arange(tokens.shape[1])[None]
        action_mask = mask & (places >= torch.tensor([start for _, start in rows])[:, None])
        return Responses(tokens, mask, action_mask, torch.from_numpy(ref_logprobs).float())


def _all_sequences(comparison: Comparison) -> list[np.ndarray]:
    return [*comparison.sequences, *comparison.mismatched]


def _share_right(margins: torch.Tensor) -> torch.Tensor:
    """1 where a margin is positive, 0 where it is negative, and a half within rounding of 0, as before training."""
    return torch.where(margins.abs() < 1e-5, 0.5, (margins > 0).float())


def _no_sums() -> torch.Tensor:
    return torch.zeros(len(SUMS), dtype=torch.float64)
