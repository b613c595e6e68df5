"""The policy: the model being trained."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.credit import completed
from actors.learner import LearnerActor
from actors.publishing import Published, Publisher, Seat
from actors.scoring import mean_nats
from actors.weight_group import WeightGroup
from actors.weights import ADAPTER_A, ADAPTER_B
from rayllm import faults
from rayllm.algorithms.advantages import masked_moments, whiten
from rayllm.algorithms.kl import kl_estimate
from rayllm.algorithms.logprobs import token_entropy, token_logprobs
from rayllm.algorithms.losses import aggregate, language_model_loss, policy_loss
from rayllm.algorithms.metrics import approx_kl, clip_fraction
from rayllm.algorithms.off_policy import importance_weights, mismatch
from rayllm.config.ppo import PPOConfig
from rayllm.data.experience import Experience, concat
from rayllm.data.scores import Mix
from rayllm.data.text import PackedRows
from rayllm.models.engine import Engine
from rayllm.models.folders import load_tokenizer
from rayllm.models.loading import DTYPES, load_causal_lm, save_model
from rayllm.models.partial import adapters
from rayllm.startup import without_garbage_collection


class PolicyActor(LearnerActor):
    """One rank of the policy."""

    def __init__(self, *, rank: int, world_size: int, config: PPOConfig, ptx_tokens: Path | None = None) -> None:
        """
        Args:
            rank, world_size: this process among the policy's.
            config: of the run.
            ptx_tokens: the pretraining text to mix in, as ``tokenize_documents`` saved it.
        """
        super().__init__(rank=rank, world_size=world_size, config=config, role=config.policy)
        self.advantage_kind = config.algorithm.advantage_kind
        self._publisher = Publisher()
        self._ratio_max = torch.zeros(1)
        """Largest ratio of new to old probability in this step."""
        self._weight_group: WeightGroup | None = None
        self.ptx: PackedRows | None = None
        if ptx_tokens is not None:
            tokens = np.load(ptx_tokens, mmap_mode="r")
            ptx = config.ptx
            self.ptx = PackedRows(tokens, ptx.sequence_length, ptx.batch_size, seed=config.seed)

    @without_garbage_collection()
    def setup(self, address: tuple[str, int]) -> float:
        """Join the ranks and load the model; returns the seconds of it that DeepSpeed took."""
        faults.reach("policy.setup", rank=self.rank)
        began = time.perf_counter()
        self.join(address)
        joined = time.perf_counter()
        model = load_causal_lm(self.config.model)
        loaded = time.perf_counter()
        self.engine = Engine(model, self.role.optimizer, self.role.learner)
        seconds = joined - began + time.perf_counter() - loaded
        self.rest()
        return seconds

    def logprobs(self, shard: Experience) -> torch.Tensor:
        """(B, T) nats under the weights before this step's update, at the sampling temperature."""
        return faults.reach("policy.logprobs", self.score(shard, self._logprobs), rank=self.rank)

    def ref_logprobs(self, shard: Experience) -> torch.Tensor:
        """(B, T) nats under the start policy, which is this one with its adapters switched off (LoRA only)."""
        with self.engine.reference():
            return self.score(shard, self._logprobs)

    def experience(
        self,
        shard: Experience,
        logprobs: torch.Tensor | None,
        ref_logprobs: torch.Tensor | None,
        values: torch.Tensor | None,
        *scored: Any,
        mix: Mix,
        kl_coef: float,
    ) -> Experience:
        """`completed`; ``scored``: the shard's scores, one a source, and for ReMax its greedy responses with theirs."""
        scores, greedy = scored[: len(mix)], scored[len(mix) :]
        return completed(
            shard, logprobs, ref_logprobs, values, scores, mix=mix, kl_coef=kl_coef, config=self.config,
            greedy=(greedy[0], greedy[1:]) if greedy else None,
        )  # fmt: skip

    def update(self, *shards: Experience, step: int, kl_coef: float) -> dict[str, float]:
        """Clipped policy steps on the step's experience. Returns metrics of rollouts and update."""
        faults.reach("policy.update", rank=self.rank)
        self.begin_update(step)
        experience = self.joined(shards)
        if self.advantage_kind.whitens:
            moments = self.engine.sum_tensor(masked_moments(experience.advantages, experience.action_mask))
            experience = experience.replace(
                advantages=whiten(experience.advantages, experience.action_mask, moments=moments)
            )
        if self.advantage_kind.needs_critic and step < self.config.critic.warmup_steps:
            if experience.logprobs is None:
                experience = experience.replace(logprobs=self.logprobs(experience))
            return self._rollout_metrics(experience, step)
        with self.turn():
            metrics, experience = self._optimize(experience, step, kl_coef)
        return self._rollout_metrics(experience, step) | metrics

    def _optimize(
        self, experience: Experience, step: int, kl_coef: float
    ) -> tuple[dict[str, float], Experience]:
        """Metrics, and the experience with the policy's log-probabilities if it came without."""
        stats = []
        scored: list[Experience] = []
        self._ratio_max = torch.zeros(1)
        sums: dict[str, tuple[float, float]] = {}
        learning_rate = self.learning_rate(step)
        for index, batch in enumerate(self.minibatches(experience, step)):
            normalizer = self._normalizer(batch)
            if not normalizer:  # all its responses were dropped, on every rank
                continue
            text = self._ptx_batches(step * self.config.algorithm.updates_per_step + index)
            loss = partial(self._loss, normalizer=normalizer, kl_coef=kl_coef, sums=sums, scored=scored)
            stats.append(self.optimize([*batch, *text], loss, batch=batch, learning_rate=learning_rate))
        metrics = {**self.update_metrics("loss/policy", "policy", stats), **self.mean_over_ranks(sums)}
        metrics["policy/ratio_max"] = float(self.engine.max_tensor(self._ratio_max))
        if experience.logprobs is None:
            if kept := [part for part in scored if part.action_mask.any()]:
                experience = concat(kept)
            else:  # all that this rank had was dropped: it counts nowhere
                experience = experience.replace(logprobs=torch.zeros_like(experience.rollout_logprobs))
        return metrics, experience

    def _loss(
        self,
        part: Experience | torch.Tensor,
        *,
        normalizer: float,
        kl_coef: float,
        sums: dict[str, tuple[float, float]],
        scored: list[Experience],
    ) -> torch.Tensor:
        """Part of the minibatch's loss: the parts of all micro-batches and ranks sum to it. A part without the old
        policy's log-probabilities gets these and goes to ``scored``."""
        if isinstance(part, torch.Tensor):
            return self._ptx_loss(part, sums)
        algorithm = self.config.algorithm
        part, mask = part.to(self.engine.device), part.action_mask.to(self.engine.device)
        logits = self._logits(part)
        new = token_logprobs(logits, part.sequences, temperature=self.config.rollout.temperature)
        if part.logprobs is None:  # nothing was updated since: the old policy is this one
            part = part.replace(logprobs=new.detach())
            scored.append(part.to("cpu"))
        old = part.logprobs
        weights = importance_weights(
            old, part.rollout_logprobs, mask,
            kind=self.config.off_policy, low=algorithm.off_policy_low, high=algorithm.off_policy_high,
        )  # fmt: skip
        reduce = partial(aggregate, action_mask=mask, aggregation=algorithm.aggregation, normalizer=normalizer)
        loss = policy_loss(
            new, old, part.advantages, mask,
            clip_range=algorithm.clip_range, clip_range_high=algorithm.clip_range_high, dual_clip=algorithm.dual_clip,
            kind=algorithm.policy_loss, weights=weights,
            aggregation=algorithm.aggregation, normalizer=normalizer,
        )  # fmt: skip
        if part.ref_logprobs is not None and algorithm.kl_in == "loss":
            drift = kl_estimate(new, part.ref_logprobs, estimator=algorithm.kl_estimator, mask=mask)
            loss = loss + kl_coef * reduce(drift)
        if algorithm.entropy_coef:
            entropy = token_entropy(logits, temperature=self.config.rollout.temperature)
            loss = loss - algorithm.entropy_coef * reduce(entropy)
        ratio = torch.where(mask, new.detach() - old, 0.0).max().exp().cpu()
        self._ratio_max = torch.maximum(self._ratio_max, ratio)
        count = float(mask.sum())
        clipped = clip_fraction(new.detach(), old, mask, algorithm.clip_range, algorithm.clip_range_high)
        _add(sums, "policy/clipfrac", float(clipped), count)
        _add(sums, "policy/approx_kl", float(approx_kl(new.detach(), old, mask)), count)
        return loss

    def _normalizer(self, batch: list[Experience]) -> float:
        """What the losses of a minibatch are divided by: its tokens, rows, or rows times the longest response, over
        all ranks."""
        aggregation = self.config.algorithm.aggregation
        if aggregation == "token_mean":
            return self.global_tokens(batch)
        rows = self.engine.sum_over_ranks(float(sum(int(part.action_mask.any(1).sum()) for part in batch)))
        return rows * self.config.rollout.max_new_tokens if aggregation == "constant" else rows

    def _ptx_batches(self, update: int) -> list[torch.Tensor]:
        """This rank's rows of pretraining text for one optimizer step."""
        if self.ptx is None:
            return []
        rows = torch.from_numpy(self.ptx.batch(update))[self.rank :: self.world_size]
        return list(rows.split(self.role.micro_batch_size))

    def _ptx_loss(self, rows: torch.Tensor, sums: dict[str, tuple[float, float]]) -> torch.Tensor:
        ptx = self.config.ptx
        rows = rows.to(self.engine.device)
        logits = self.engine(input_ids=rows).logits
        loss = language_model_loss(logits, rows, normalizer=ptx.batch_size * (ptx.sequence_length - 1))
        _add(sums, "loss/ptx", float(loss.detach()) * ptx.batch_size / len(rows), len(rows))
        return ptx.coef * loss

    def _logits(self, part: Experience) -> torch.Tensor:
        return self.engine(input_ids=part.sequences, attention_mask=part.attention_mask).logits

    def _logprobs(self, part: Experience) -> torch.Tensor:
        return token_logprobs(self._logits(part), part.sequences, temperature=self.config.rollout.temperature)

    def _rollout_metrics(self, experience: Experience, step: int) -> dict[str, float]:
        sums = self.mean_over_ranks(self._rollout_sums(experience))
        return sums | self._sampler_metrics(experience, step)

    def _rollout_sums(self, experience: Experience) -> dict[str, tuple[float, float]]:
        mask, logprobs = experience.action_mask, experience.logprobs
        kept = mask.any(1)
        rows, tokens = float(kept.sum()), float(mask.sum())
        sums = {
            "objective/rewards": (float(experience.rewards.sum()), rows),
            "objective/entropy": (-float(logprobs[mask].sum()), tokens),
            "response/length_mean": (tokens, rows),
            "response/stop_rate": (float(experience.stopped[kept].sum()), rows),
        }
        if experience.ref_logprobs is not None:
            estimator = self.config.algorithm.kl_estimator
            kl = kl_estimate(logprobs, experience.ref_logprobs, estimator=estimator, mask=mask)
            sums["objective/kl"] = (float(kl.sum()), rows)
        return sums

    def _sampler_metrics(self, experience: Experience, step: int) -> dict[str, float]:
        """How far the sampler was from this policy: on tokens of the same weights, where it should not be, and, in a
        run that samples ahead, on all, with their age in policy updates."""
        learner, sampler, mask = experience.logprobs, experience.rollout_logprobs, experience.action_mask
        age = step - experience.policy_versions
        same = mismatch(learner, sampler, mask & (age == 0))
        metrics = self._mismatch_metrics("rollout/logprob_mismatch", same)
        if self.config.max_policy_lag:
            metrics |= self._mismatch_metrics("off_policy/difference", mismatch(learner, sampler, mask))
            oldest = torch.where(mask, age, 0).max().view(1)
            ages = {"off_policy/lag": (float(age[mask].sum()), float(mask.sum()))}
            metrics |= {**self.mean_over_ranks(ages), "off_policy/lag_max": float(self.engine.max_tensor(oldest))}
        return metrics

    def _mismatch_metrics(self, name: str, apart: dict[str, torch.Tensor]) -> dict[str, float]:
        """Mean, largest and KL over the ranks; nothing where no token counts."""
        sums = torch.stack([apart["num_tokens"], apart["difference_sum"], apart["kl_sum"]])
        num_tokens, difference, kl = self.engine.sum_tensor(sums).tolist()
        largest = float(self.engine.max_tensor(apart["difference_max"].view(1)))
        if not num_tokens:
            return {}
        return {name: difference / num_tokens, f"{name}_max": largest, f"{name}_kl": kl / num_tokens}

    def mean_nats(self, rows: torch.Tensor) -> float:
        """Mean loss per predicted token over (R, T) rows of text, in nats; every rank must be called."""
        self.engine.train(False)
        return mean_nats(self.engine, rows, self.role.micro_batch_size, self.engine.device)

    @torch.no_grad()
    def text_logprobs(self, token_ids: list[int], after: None = None) -> list[float]:
        """Nats of every token after the first, given those before it, at temperature 1; every rank must be called.

        Args:
            after: a reference of what is to be done first.
        """
        self.engine.train(False)
        sequences = torch.tensor([token_ids], device=self.engine.device)
        return token_logprobs(self.engine(input_ids=sequences).logits, sequences)[0, 1:].tolist()

    def publish_weights(
        self, version: int, *, dtype: str | None = None, nodes: Collection[str] | None = None
    ) -> Published | None:
        """Let others read what is trained: all weights, or with LoRA the adapters alone. Rank 0 tells where they lie;
        every rank must be called.

        Args:
            version: number of updates in them.
            dtype: a name in `DTYPES` to cast whole weights to: half the bytes for an engine that holds half of them.
            nodes: where the readers live; None: anywhere.
        """
        faults.reach("policy.publish", rank=self.rank)
        if self.config.policy.learner.lora.rank is None:
            tensors, scaling = self.engine.named_tensors(), None
        else:
            tensors = self._adapter_tensors()
            scaling = {name: adapter.scaling for name, adapter in adapters(self.engine.module).items()}
            dtype = None
        if self.rank == 0:
            return self._publisher.publish(
                tensors, version=version, dtype=DTYPES.get(dtype), scaling=scaling, nodes=nodes
            )
        for _ in tensors:  # ZeRO-3 gathers on all ranks
            continue
        return None

    def join_engines(self, seat: Seat) -> None:
        """Meet the engines in a `WeightGroup`."""
        self._weight_group = WeightGroup(seat, self.engine.device, self._taken_listener())

    def send_weights(self, *, dtype: str) -> None:
        """Send all weights, adapters merged, to the engines that this rank has joined; every rank must be called."""
        tensors = self.engine.named_tensors()
        if self._weight_group is not None:
            self._weight_group.send(tensors, dtype=DTYPES[dtype])
        for _ in tensors:  # ZeRO-3 gathers on all ranks
            continue

    def _adapter_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, adapter in self.engine.named_adapters():
            yield name + ADAPTER_A, adapter.a.detach().clone()
            yield name + ADAPTER_B, adapter.b.detach().clone()

    def export(self, folder: str) -> None:
        """Write the model folder (rank 0; every rank must be called)."""
        weights: dict[str, Any] = self.engine.state_dict()
        self.engine.save_adapter(Path(folder) / "adapter")
        if self.rank == 0:
            tokenizer = load_tokenizer(self.config.model)
            save_model(self.engine.module, tokenizer, Path(folder), state_dict=weights)


def _add(sums: dict[str, tuple[float, float]], name: str, mean: float, count: float) -> None:
    total, seen = sums.get(name, (0.0, 0.0))
    sums[name] = (total + mean * count, seen + count)
