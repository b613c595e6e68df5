"""Seeds of sampling: a run can be replayed, whoever samples what and in which order."""

from __future__ import annotations

import hashlib


def sample_seed(seed: int, step: int, prompt_id: int, sample: int, occurrence: int) -> int:
    """63 bits that name one sample of a run.

    Hashed: vLLM seeds the samples of one request consecutively, and plain sums would collide between prompts.
    """
    return _hash(f"{seed}/{step}/{prompt_id}/{sample}/{occurrence}")


def turn_seed(seed: int, turn: int) -> int:
    """63 bits that name one turn (from 0) of the sample with this ``sample_seed``."""
    return _hash(f"{seed}/turn {turn}")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
