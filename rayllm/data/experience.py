"""The one batch type that moves between the rollout, scoring and update stages.

Shapes (used by every module under rayllm/):
    B  sequences in the batch
    T  tokens per sequence, prompt + response, right-padded
Every per-token tensor is (B, T) and aligned to ``sequences``: position t describes
the token ``sequences[b, t]`` given the tokens before it. Position 0 has no
predecessor, so it is always outside ``action_mask``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

PER_SEQUENCE = ("rewards", "prompt_ids", "stopped")
"""Fields of shape (B,); all others are (B, T)."""

MASKS = ("attention_mask", "action_mask")
OF_SAMPLED = {"rollout_logprobs", "policy_versions", "turn_rewards", "advantages", "returns"}
"""Fields that are 0 beside the tokens that the policy sampled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Experience:
    """Rollouts of one step, plus everything the update needs, filled stage by stage."""

    # Set by the rollout stage.
    sequences: torch.Tensor  # (B, T) int64 token ids
    attention_mask: torch.Tensor  # (B, T) bool, True on real tokens
    action_mask: torch.Tensor  # (B, T) bool, True on tokens sampled by the policy
    rollout_logprobs: torch.Tensor  # (B, T) nats, from the sampling engine
    policy_versions: torch.Tensor  # (B, T) int32, policy updates in the weights that sampled the token
    prompt_ids: torch.Tensor  # (B,) int64, equal for samples of the same prompt
    stopped: torch.Tensor  # (B,) bool, the model ended its turn by itself
    turn_rewards: torch.Tensor | None = None  # (B, T) from an environment: on a turn's last token, 0 elsewhere
    # Set by the scoring stage.
    rewards: torch.Tensor | None = None  # (B,) scalar reward per sequence
    logprobs: torch.Tensor | None = None  # (B, T) nats, policy before this step's updates
    ref_logprobs: torch.Tensor | None = None  # (B, T) nats, frozen reference policy
    values: torch.Tensor | None = None  # (B, T) critic estimate before each token
    # Set from the scores, by rayllm.algorithms.rewards and .advantages.
    advantages: torch.Tensor | None = None  # (B, T)
    returns: torch.Tensor | None = None  # (B, T) regression target of the critic

    def __post_init__(self) -> None:
        batch, tokens = self.sequences.shape
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor is None:
                continue
            expected = (batch,) if field.name in PER_SEQUENCE else (batch, tokens)
            if tuple(tensor.shape) != expected:
                raise ValueError(f"Experience.{field.name} has shape {tuple(tensor.shape)}, expected {expected}")
        if self.action_mask[:, 0].any():
            raise ValueError("Experience.action_mask[:, 0] must be False: the first token has no predecessor")

    def __reduce__(self) -> tuple[Any, ...]:
        """As arrays, which pickle hands over as they lie, in about half of the bytes: masks in bits, and of what is 0
        beside the sampled tokens only theirs."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items() if tensor is not None}
        sampled = arrays["action_mask"]
        packed = {name: array[sampled] for name, array in arrays.items() if name in OF_SAMPLED}
        packed |= {name: np.packbits(arrays[name]) for name in MASKS}
        packed["sequences"] = arrays["sequences"].astype(np.int32)
        return _unpacked, (sampled.shape, arrays | packed)

    def __len__(self) -> int:
        return self.sequences.shape[0]

    def __getitem__(self, rows: slice | torch.Tensor) -> Experience:
        """Select sequences; every tensor keeps its rows together."""
        return self._map(lambda tensor: tensor[rows])

    def replace(self, **fields: torch.Tensor) -> Experience:
        """A copy with some fields set; shapes are checked again."""
        return replace(self, **fields)

    def trimmed(self) -> Experience:
        """Without the columns that are padding in every row."""
        width = int(self.attention_mask.sum(1).max())
        return self._map(lambda tensor: tensor[:, :width] if tensor.dim() == 2 else tensor)

    def to(self, device: torch.device | str) -> Experience:
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> Experience:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: fn(v) for k, v in values.items() if v is not None})


def _unpacked(shape: tuple[int, int], arrays: dict[str, np.ndarray]) -> Experience:
    """Copies: an array out of Ray's store is read-only, which tensors do not know."""
    packed = ("sequences", *MASKS, *OF_SAMPLED)
    found = {name: array.copy() for name, array in arrays.items() if name not in packed}
    found["sequences"] = arrays["sequences"].astype(np.int64)
    for name in MASKS:
        found[name] = np.unpackbits(arrays[name], count=shape[0] * shape[1]).view(bool).reshape(shape)
    sampled = found["action_mask"]
    for name in OF_SAMPLED & arrays.keys():
        found[name] = np.zeros(shape, arrays[name].dtype)
        found[name][sampled] = arrays[name]
    return Experience(**{name: torch.from_numpy(array) for name, array in found.items()})


def concat(parts: list[Experience]) -> Experience:
    """Join batches along B, right-padding T to the longest. Raises ValueError on an empty list or
    when a field is set in some parts only."""
    if not parts:
        raise ValueError("concat() needs at least one Experience")
    longest = max(part.sequences.shape[1] for part in parts)
    joined = {}
    for field in fields(Experience):
        tensors = [getattr(part, field.name) for part in parts]
        if all(tensor is None for tensor in tensors):
            continue
        if any(tensor is None for tensor in tensors):
            raise ValueError(f"Experience.{field.name} is set in some parts only")
        if tensors[0].dim() == 2:
            tensors = [torch.nn.functional.pad(t, (0, longest - t.shape[1])) for t in tensors]
        joined[field.name] = torch.cat(tensors)
    return Experience(**joined)


def without_dropped(
    shard: Experience, rewards: torch.Tensor, baselines: torch.Tensor | None = None
) -> tuple[Experience, torch.Tensor, torch.Tensor | None]:
    """The shard without action tokens in the rows whose reward (or baseline) is NaN; these numbers are 0 then.

    The rows keep their places, so that ranks and minibatches stay as large as they were; a row without an action token
    is in no loss, no count and no group.
    """
    kept = rewards.isfinite() if baselines is None else rewards.isfinite() & baselines.isfinite()
    if bool(kept.all()):
        return shard, rewards, baselines
    shard = shard.replace(action_mask=shard.action_mask & kept[:, None])
    return shard, rewards.where(kept, 0.0), None if baselines is None else baselines.where(kept, 0.0)


def check_finite(shard: Experience, numbers: Mapping[str, torch.Tensor | None]) -> None:
    """Raise RuntimeError when a number of an action token is NaN or infinite.

    Args:
        shard: says where actions are, and of which prompts.
        numbers: what they are -> (B, T); None: there are none.
    """
    for name, values in numbers.items():
        if values is None:
            continue
        bad = (shard.action_mask & ~values.isfinite()).any(1)
        if bad.any():
            prompts = sorted(set(shard.prompt_ids[bad].tolist()))
            raise RuntimeError(
                f"{name} are not finite for {int(bad.sum())} of {len(shard)} responses, of the prompts {prompts}: "
                "nothing was learned from them"
            )
