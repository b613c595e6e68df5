"""What a process only hands on: nothing is imported for it there, nothing copied, and it arrives as it was."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray.util
import torch

from actors.carried import Carried, Delivery
from actors.tensors import send_as_arrays
from rayllm.data.experience import Experience, concat
from rayllm.data.rollout import Rollout, collate

ROOT = Path(__file__).resolve().parent.parent.parent

HAND_ON = """
import pickle, sys
from actors.carried import Delivery
parts, join = pickle.load(sys.stdin.buffer)
pickle.dump(Delivery(parts, join), sys.stdout.buffer, protocol=5)
assert not {"torch", "rayllm.data.experience"} & {*sys.modules}
"""


def shard_of(*responses: tuple[int, ...]) -> Experience:
    rollouts = [
        Rollout(prompt_id=0, prompt_token_ids=(1, 2), token_ids=tokens, logprobs=(-0.5,) * len(tokens),
                finish_reason="stop", policy_versions=(3,) * len(tokens))
        for tokens in responses
    ]  # fmt: skip
    return collate(rollouts, pad_token_id=0)


def test_who_hands_it_on_imports_nothing_for_it():
    parts = [shard_of((3, 4), (5,)), shard_of((6, 7, 8))]
    given = pickle.dumps(([Carried(part) for part in parts], Carried(concat)), protocol=5)
    command = [sys.executable, "-c", HAND_ON]
    sent = subprocess.run(command, input=given, stdout=subprocess.PIPE, cwd=ROOT, check=True).stdout
    found, expected = pickle.loads(sent), concat(parts)
    assert len(found) == 3
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.rollout_logprobs, expected.rollout_logprobs)


def test_arrays_are_handed_on_where_they_lie():
    array, buffers, again = np.arange(1000.0), [], []
    sent = pickle.dumps(Carried({"array": array}), protocol=5, buffer_callback=buffers.append)
    assert len(sent) < array.nbytes
    handed_on = pickle.dumps(Delivery([pickle.loads(sent, buffers=buffers)]), protocol=5, buffer_callback=again.append)
    found = pickle.loads(handed_on, buffers=again)
    assert np.shares_memory(found["array"], array)


def test_tensors_go_as_arrays(local_ray):
    tensor = torch.arange(1000, dtype=torch.bfloat16)
    buffers: list[pickle.PickleBuffer] = []
    send_as_arrays()
    try:
        carried = Carried(tensor)
    finally:
        ray.util.deregister_serializer(torch.Tensor)
    pickle.dumps(carried, protocol=5, buffer_callback=buffers.append)
    assert [buffer.raw().nbytes for buffer in buffers] == [2000]
    assert torch.equal(carried.open(), tensor)
    assert not Carried(tensor)._buffers  # the other tests of this process send them as they were


def test_several_parts_want_to_be_joined():
    with pytest.raises(AssertionError, match="want to be joined"):
        pickle.loads(pickle.dumps(Delivery([Carried(1), Carried(2)]), protocol=5))
