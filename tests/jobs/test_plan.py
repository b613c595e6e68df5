"""`rayllm plan` as a command: the documented example to the letter, JSON, exit status, a live cluster."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.cli import main
from rayllm.models.folders import count_stored_parameters
from rayllm.planning.hardware import GIB
from tests.conftest import ROOT

PAGE = (ROOT / "docs/planning.md").read_text()


def run(capsys, *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *map(str, arguments)])
    return stopped.value.code or 0, capsys.readouterr().out


def examples() -> list[tuple[list[str], str]]:
    """Commands of the page that are followed by what they print."""
    found = re.findall(r"```sh\n\.venv/bin/rayllm plan (.*?)\n```\n+```text\n(.*?)```", PAGE, flags=re.S)
    return [(command.split(), text) for command, text in found]


@pytest.mark.parametrize("example", range(2))
def test_the_page_shows_what_the_command_prints(example, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments, text = examples()[example]
    _, printed = run(capsys, *arguments)
    assert [line.rstrip() for line in printed.splitlines()] == text.splitlines()


def test_the_status_says_whether_it_fits(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    status, text = run(capsys, "--config", "docs/plan-8b.yaml")
    assert status == 0 and "everything fits" in text
    status, text = run(capsys, "--config", "docs/plan-8b.yaml", "cluster.nodes=1", "advice=false")
    assert status == 1 and "does not fit" in text and "nearest" not in text


def test_json_holds_what_the_tables_show_and_its_advice_fits(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    status, text = run(capsys, "--config", "docs/plan-8b.yaml", "cluster.gpu=a100-40gb", "--json")
    found = json.loads(text)
    assert status == 1 and not found["fits"] and found["problems"]
    policy = found["roles"][0]
    assert policy["role"] == "policy" and policy["parameters"] == 8_030_261_248
    parts = ("weights", "gradients", "optimizer", "activations", "buffers", "kv_cache", "runtime")
    assert policy["peak"] == pytest.approx(sum(policy[part] for part in parts)) and policy["available"] < policy["peak"]
    assert set(found["phases"]) == {"rollout", "score", "update", "sync"}
    assert found["slowest_phase"] == "score" and found["cost_per_thousand_steps"] > 0
    changes = found["advice"]["changes"]
    written = [f"{k if k.startswith('cluster.') else 'settings.' + k}={json.dumps(v)}" for k, v in changes.items()]
    status, text = run(capsys, "--config", "docs/plan-8b.yaml", "cluster.gpu=a100-40gb", *written)
    assert status == 0 and "everything fits" in text


def test_a_model_folder_and_the_runs_own_config(capsys, tmp_path, tiny_model_dir):
    own = tmp_path / "run.yaml"
    own.write_text(f"model: {tiny_model_dir}\nprompts_per_step: 8\nrollout: {{max_new_tokens: 16}}\n")
    cluster = ["cluster.gpus_per_node=0", "cluster.cpus_per_node=8", "cluster.memory_gib=16"]
    status, text = run(capsys, f"config={own}", *cluster, "workload.prompt_tokens=16", "settings.num_steps=3", "--json")
    found = json.loads(text)
    assert status == 0 and found["roles"][0]["model"] == tiny_model_dir.name
    assert found["roles"][0]["parameters"] == count_stored_parameters(tiny_model_dir)
    assert found["host_bytes"] < 5 * GIB
    status, text = run(capsys, f"config={own}", "settings.prompts_per_stpe=3")
    assert status == 2 and "Did you mean prompts_per_step" in " ".join(text.split())
    status, text = run(capsys)
    assert status == 2 and "settings of ppo: model: required but not given" in " ".join(text.split())
    status, text = run(capsys, f"config={tmp_path / 'none.yaml'}")
    assert status == 2 and "cannot read" in text


def test_json_is_for_plans_only(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["tokenizer", "run_dir=/tmp/x", "documents=/tmp/x.jsonl", "--json"])
    assert stopped.value.code == 2 and "--json: for `rayllm plan` only" in capsys.readouterr().out


@pytest.fixture(scope="module")
def gpu_cluster(tmp_path_factory):
    """A live cluster whose node says that it has four H100s."""
    ports = []
    for _ in range(3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    folder = tmp_path_factory.mktemp("ray")
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=6", "--num-gpus=4",
        '--resources={"accelerator_type:H100": 1}', f"--memory={64 << 30}", f"--port={ports[0]}",
        f"--dashboard-port={ports[1]}", f"--dashboard-agent-listen-port={ports[2]}", f"--temp-dir={folder}",
        "--disable-usage-stats",
    ]  # fmt: skip
    env = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    with (folder / "head.log").open("w") as out:
        head = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
    address = f"http://127.0.0.1:{ports[1]}"
    from ray.util.state import list_nodes

    def answers() -> bool:
        try:
            return bool(list_nodes(address=address))
        except Exception:  # whatever the client raises while nobody listens
            return False

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_AUTH_MODE", "disabled")
            deadline = time.monotonic() + 90
            while not answers():
                assert time.monotonic() < deadline, (folder / "head.log").read_text()
                time.sleep(0.5)
            yield address
    finally:
        head.terminate()
        head.wait(timeout=60)


def test_a_live_cluster_is_read_and_what_is_set_goes_over_it(gpu_cluster, capsys):
    settings = ["settings.model=qwen2.5-0.5b", "settings.policy.gpus_per_actor=1"]
    _, text = run(capsys, *settings, "--address", gpu_cluster, "--json")
    cluster = json.loads(text)["cluster"]
    assert (cluster["nodes"], cluster["gpus_per_node"], cluster["cpus_per_node"]) == (1, 4, 6)
    assert cluster["gpu"] == "h100" and cluster["memory_gib"] > 64
    _, text = run(capsys, *settings, "--address", gpu_cluster, "cluster.nodes=16", "cluster.gpu=h200", "--json")
    cluster = json.loads(text)["cluster"]
    assert (cluster["nodes"], cluster["gpus_per_node"], cluster["gpu"]) == (16, 4, "h200")


def test_no_cluster_at_the_address_is_an_input_error(capsys):
    status, text = run(capsys, "settings.model=qwen2.5-0.5b", "--address", "http://127.0.0.1:1")
    assert status == 2 and "no cluster answers at http://127.0.0.1:1" in " ".join(text.split())
