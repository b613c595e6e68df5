"""What a placement group is asked for, by hand; on a cluster: tests/jobs/test_placement.py."""

from __future__ import annotations

import pytest

from actors.group import Role
from actors.placement import Share

GPU = {"CPU": 1.0, "GPU": 1.0}


def test_a_role_of_its_own_has_a_bundle_an_actor():
    assert Share((Role("policy", 3, 2, 1),), None).bundles() == [{"CPU": 2.0, "GPU": 1.0}] * 3
    assert Share((Role("reward", 2, 0.5, 0),), None).bundles() == [{"CPU": 0.5}] * 2
    small = Share((Role("reference", 2, 1, 0.25),), None)
    assert small.bundles() == [{"CPU": 1.0, "GPU": 0.25}] * 2 and small.gpus == 0.25


def test_an_engine_over_several_gpus_is_one_bundle_which_no_node_border_cuts():
    assert Share((Role("rollout", 2, 4, 8),), None).bundles() == [{"CPU": 4.0, "GPU": 8.0}] * 2


def test_roles_that_share_have_the_same_gpus():
    roles = (Role("policy", 4, 1, 1), Role("critic", 4, 1, 1), Role("reference", 2, 1, 1), Role("reward", 1, 1, 0.5))
    share = Share((*roles, Role("rollout", 4, 2, 1)), "learner")
    assert share.gpus == 0.2
    assert [share.bundle_of(rank) for rank in range(4)] == [0, 1, 2, 3]
    assert share.bundles() == [
        {"CPU": 6.0, "GPU": 1.0}, {"CPU": 5.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 1.0}
    ]  # fmt: skip
    assert share.selector() == {"rayllm.role": "learner"}


@pytest.mark.parametrize("sharing", [2, 3, 5, 6, 7])
def test_the_parts_of_a_gpu_are_never_more_than_it(sharing):
    share = Share(tuple(Role(str(number), 1, 1, 1) for number in range(sharing)), None)
    assert 1 - 1e-3 < sharing * share.gpus <= 1
    assert share.gpus == round(share.gpus, 4)  # what Ray can count


def test_processes_without_a_gpu_go_along_and_take_no_part():
    share = Share((Role("critic", 2, 1, 1), Role("reward", 4, 0.5, 0)), None)
    assert share.gpus == 1.0 and share.bundles() == [{"CPU": 2.0, "GPU": 1.0}] * 2
    assert [share.bundle_of(rank) for rank in range(4)] == [0, 1, 0, 1]
    on_cpu = Share((Role("policy", 1, 0.4, 0), Role("rollout", 2, 0.4, 0)), None)
    assert on_cpu.bundles() == [{"CPU": 0.8}, {"CPU": 0.4}] and on_cpu.gpus == 0
