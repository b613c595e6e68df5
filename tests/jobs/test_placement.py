"""Where roles go on a cluster of four nodes: head, learner, rollout and scorer; GPUs are numbers that Ray hands out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from actors.group import ActorGroup, Role, find_lost
from actors.placement import reserve, where
from jobs.ppo_recovery import Recovery
from rayllm.config.common import PlacementConfig
from rayllm.config.rl import PPOPlacementConfig
from rayllm.errors import FleetExhausted, InputError
from tests.jobs.conftest import ROOT, rayllm
from tests.jobs.test_rl import SMALL
from tests.nodes import Nodes, cluster_of

NODES = """
- {labels: {rayllm.role: head}, num_cpus: 0}
- {labels: {rayllm.role: learner}, num_cpus: 4, num_gpus: 2}
- {labels: {rayllm.role: rollout}, num_cpus: 2, num_gpus: 2}
- {labels: {rayllm.role: scorer}, num_cpus: 2}
"""
PPO = ("policy", "critic", "reference", "reward", "rollout")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("period_ms", 500), ("timeout_ms", 3000), ("failure_threshold", 3)):  # of a node that goes
            patch.setenv(f"RAY_health_check_{name}", str(value))
        with cluster_of(NODES, tmp_path_factory.mktemp("nodes")) as found:
            yield found


# What follows runs as drivers on the cluster, each in a process of its own.


class Probe:
    """An actor that computes nothing."""

    def pid(self) -> int:
        return os.getpid()


def start(config: PlacementConfig, *roles: Role) -> dict[str, list[tuple[str | None, list[str]]]]:
    """Role -> type of the node and GPUs of each rank."""
    with reserve(roles, config, print) as held:
        groups = [ActorGroup(role, Probe, lambda rank: {}, held.seats(role)) for role in roles]
        found: dict[str, list[tuple[str | None, list[str]]]] = {role.name: [] for role in roles}
        for row in where(groups):
            found[row.role] += [(row.node_type, gpus.split(",")) for gpus in row.gpus]
        return found


def roles_with_gpus() -> None:
    on_gpu = [Role(name, 2, 0.1, 1) for name in ("policy", "rollout")]
    found = start(PPOPlacementConfig(mode="colocated"), *on_gpu, Role("reward", 1, 0.1, 0))
    assert found.pop("reward") == [("learner", [""])]
    assert all(ranks == found["policy"] for ranks in found.values())
    assert sorted(gpus for _, gpus in found["policy"]) == [["0"], ["1"]]
    assert {node for node, _ in found["policy"]} == {"learner"}

    paired = [Role(name, 1, 0.1, 1) for name in PPO[:4]]
    found = start(PPOPlacementConfig(mode="pairs"), *paired, Role("rollout", 1, 0.1, 2))
    assert found["policy"] == found["reference"] and found["critic"] == found["reward"] != found["policy"]
    ((node, gpus),) = found["rollout"]
    assert node == "rollout" and sorted(gpus) == ["0", "1"]

    small = Role("policy", 2, 0.1, 0.5), Role("reward.exact", 1, 0.1, 0)
    found = start(PlacementConfig(node_types={"policy": "rollout"}), *small)
    assert {node for node, _ in found["policy"]} == {"rollout"}
    assert len({gpus[0] for _, gpus in found["policy"]}) == 1
    assert found["reward.exact"] == [("scorer", [""])]


def too_small() -> None:
    def refused(config: PlacementConfig, *roles: Role) -> str:
        with pytest.raises(InputError) as error:
            reserve(roles, config, print)
        return str(error.value)

    assert refused(PlacementConfig(), Role("policy", 4, 1, 1), Role("critic", 2, 1, 0)) == (
        "placement: the roles need 6 CPU on learner nodes (policy 4 x 1 + critic 2 x 1), the cluster has 4; ask for "
        "less, or set placement.wait_s where nodes may come"
    )
    colocated = refused(PPOPlacementConfig(mode="colocated"), Role("policy", 3, 1, 1), Role("rollout", 3, 0.1, 1))
    assert "the roles need 3 GPU on learner nodes (policy with rollout 3 x 1), the cluster has 2" in colocated
    assert "one actor of policy needs 6 CPU and 1 GPU; no node has both" in refused(
        PlacementConfig(node_types={"policy": "any"}), Role("policy", 1, 6, 1)
    )
    assert (
        "critic goes to nodes with rayllm.role=lerner (placement.node_types.critic), those of the cluster are head, "
        "learner, rollout, scorer, did you mean learner?"
    ) in refused(PlacementConfig(node_types={"critic": "lerner"}), Role("critic", 1, 1, 0))
    assert "no nodes came within placement.wait_s=1" in refused(PlacementConfig(wait_s=1), Role("rollout", 1, 3, 0))


def node_by_node() -> None:
    """Four GPUs are free, on two nodes: the pair goes to one of them, wherever the others are asked for before."""
    config = PlacementConfig(node_types={"reference": "any", "rollout": "any", "policy": "any"})
    roles = Role("reference", 2, 0.1, 1), Role("rollout", 1, 0.1, 2)
    with reserve(roles, config, print):  # or it would wait for ever
        pass
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match=r"6 CPU, \d of \d are free, but no way"):
        patch.setattr("actors.placement.PATIENCE_S", 1.0)
        reserve([Role("policy", 2, 3, 0)], config, print)


def two_jobs() -> None:
    role, told, second = Role("rollout", 2, 1, 0), [], []
    first = reserve([role], PlacementConfig(), print)
    waiting = threading.Thread(target=lambda: second.append(reserve([role], PlacementConfig(), told.append)))
    waiting.start()
    waiting.join(timeout=4)
    assert waiting.is_alive() and "waiting for other jobs to end: the roles need 2 CPU" in told[0]
    first.close()
    waiting.join(timeout=60)
    assert len(second) == 1 and len(told) == 1
    second[0].close()


def a_node_that_comes() -> None:
    config = PlacementConfig(wait_s=120, node_types={"reward": "late"})
    print(start(config, Role("reward", 1, 1, 0)), flush=True)


def a_node_that_goes() -> None:
    """With the ranks of a learner. The first time another node comes, and Ray sends the new ranks to the one that went
    before it knows of that. The second time none comes."""
    config, role = PlacementConfig(wait_s=120, node_types={"policy": "brittle"}), Role("policy", 2, 0.5, 0)
    settings = SimpleNamespace(placement=SimpleNamespace(wait_s=0.0))
    recovery = Recovery(SimpleNamespace(config=settings, roles=SimpleNamespace(models={})), {})  # type: ignore[arg-type]
    held = reserve([role], config, print)
    group = ActorGroup(role, Probe, lambda rank: {}, held.seats(role))

    def lose_the_node(*, known: bool) -> set[str]:
        there = {node for node, _ in group.whereabouts()}
        ranks = [psutil.Process(pid) for pid in group.call(Probe.pid)]
        raylet = next(parent for parent in ranks[0].parents() if parent.name() == "raylet")
        for process in (raylet, *ranks):  # by themselves they would outlive it, here
            process.kill()
        if known:
            assert list(find_lost([group])) == ["policy"]
        print("gone", flush=True)
        group.renew()
        return there

    before = lose_the_node(known=False)
    recovery._wait_for_places({"policy": group})  # type: ignore[dict-item]
    assert before.isdisjoint(node for node, _ in group.whereabouts())
    lose_the_node(known=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(FleetExhausted, match=(
        r"no place was found within 2 s: needed are policy 2 x 0.5 CPU and 0 GPU, free are .* CPU and \d GPU\. The last"
    )):  # fmt: skip
        patch.setattr("jobs.ppo_recovery.PLACE_S", 2.0)
        recovery._wait_for_places({"policy": group})  # type: ignore[dict-item]


def driver(nodes: Nodes, name: str) -> subprocess.Popen[str]:
    code = f"import ray, tests.jobs.test_placement as t; ray.init(log_to_driver=False, logging_level=40); t.{name}()"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=nodes.env
    )


@pytest.mark.parametrize("name", [f.__name__ for f in (roles_with_gpus, too_small, node_by_node, two_jobs)])
def test_on_four_nodes(nodes, name):
    process = driver(nodes, name)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


def test_what_is_asked_for_while_nodes_may_come_is_placed_when_they_do(nodes):
    process = driver(nodes, a_node_that_comes.__name__)
    assert process.stdout is not None
    assert "waiting for nodes: reward goes to nodes with rayllm.role=late" in process.stdout.readline()
    nodes.add(labels={"rayllm.role": "late"}, num_cpus=1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "{'reward': [('late', [''])]}" in output, output


@pytest.mark.scorecard("R13", partly=True)
def test_ranks_of_a_lost_node_go_to_the_next_one_and_without_one_it_is_told(nodes, seen):
    process = driver(nodes, a_node_that_goes.__name__)
    nodes.add(labels={"rayllm.role": "brittle"}, num_cpus=1)
    assert process.stdout is not None
    said = []
    while not said or said[-1] != "gone\n":
        said.append(process.stdout.readline())
        assert said[-1], "".join(said)
    nodes.add(labels={"rayllm.role": "brittle"}, num_cpus=1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    seen("a learner's ranks came back on another node; without one the run ends with need against have")


# The RL job itself.


def placed(run_dir: Path) -> dict[str, tuple[str, str]]:
    """Role -> type and name of the node, of one actor a role."""
    rows = json.loads((run_dir / "run.json").read_text())["placement"]
    assert [row["role"] for row in rows] == list(PPO) and all(row["ranks"] == [0] for row in rows)
    return {row["role"]: (row["node_type"], row["node"]) for row in rows}


def model_id(run_dir: Path) -> str:
    return json.loads((run_dir / "run.json").read_text())["model"]["id"]


def undo_the_last_step(run_dir: Path) -> None:
    """As if the run had been killed in it."""
    shutil.rmtree(run_dir / "checkpoints/step-000002")
    shutil.rmtree(run_dir / "model")
    record = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**record, "status": "failed"}))


@pytest.mark.long
def test_ppo_places_every_role_on_its_node_type_and_one_section_moves_it(nodes, tiny_run, tmp_path):
    source, _ = tiny_run
    (tmp_path / "ppo.yaml").write_text(
        f"model: {source / 'sft/model'}\nreward_model: {source / 'reward_model/model'}\n"
        f"prompts: {source / 'world/prompts_train.parquet'}\ncritic: {{warmup_steps: 0}}\n"
    )
    found: dict[str, dict[str, tuple[str, str]]] = {}
    models: list[str] = []
    for mode in ("split", "pairs", "colocated"):
        if mode == "colocated":  # the first run, interrupted and moved
            shutil.copytree(tmp_path / "split", tmp_path / mode)
            undo_the_last_step(tmp_path / mode)
        arguments = ["ppo", "--config", tmp_path / "ppo.yaml", *SMALL, f"run_dir={tmp_path / mode}"]
        done = rayllm(*arguments, f"placement.mode={mode}", env=nodes.env)
        assert done.returncode == 0, done.stdout
        assert "where each actor runs" in done.stdout and ("resumes in" in done.stdout) == (mode == "colocated")
        found[mode] = placed(tmp_path / mode)
        models.append(model_id(tmp_path / mode))
    types = {mode: {role: node_type for role, (node_type, _) in rows.items()} for mode, rows in found.items()}
    assert types["split"] == {
        "policy": "learner", "critic": "learner", "reference": "scorer", "reward": "scorer", "rollout": "rollout"
    }  # fmt: skip
    assert types["pairs"] == {**dict.fromkeys(PPO, "learner"), "rollout": "rollout"}
    assert set(types["colocated"].values()) == {"learner"}
    assert len({node for _, node in found["split"].values()}) == 3
    assert len(set(models)) == 1  # where it runs changes nothing that it learns
