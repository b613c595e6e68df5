"""The README tells the truth: its tree is the tree, its commands are run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from jobs.cli import COMMANDS, parse
from rayllm.algorithms import advantages
from rayllm.algorithms.kinds import AdvantageKind
from rayllm.config.base import load_config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()

JOB_VERBS = ("submit", "list", "status", "logs", "stop")

RUN_BY = {
    "make quickstart": ".ci/run",
    "make test": ".ci/run",
    "make lint": ".ci/run",
    "make faults-full": "Makefile",
    ".venv/bin/python -m bench.ppo --model runs/bench/10m": "Makefile",
    "make faults": ".ci/run",
    ".venv/bin/rayllm serve model=runs/quickstart/ppo/model": ".ci/run",
    ".venv/bin/rayllm chat": ".ci/run",
    ".venv/bin/rayllm sft run_dir=runs/mine": ".ci/run",
    ".venv/bin/rayllm sft run_dir=runs/my-sft": "tests/jobs/test_data_formats.py",
    ".venv/bin/rayllm reward-model run_dir=runs/my-rm": "tests/jobs/test_data_formats.py",
    ".venv/bin/rayllm ppo --config jobs/configs/ppo-trl.yaml": "tests/jobs/test_data_formats.py",
    ".venv/bin/rayllm label labeler=reward-model": ".ci/run",
    ".venv/bin/python -m bench.algorithms runs/quickstart runs/algorithms": ".ci/run",
    ".venv/bin/python -m bench.lag runs/quickstart runs/lag": ".ci/run",
    ".venv/bin/python -m bench.reward_models runs/quickstart runs/reward_models": ".ci/run",
    ".venv/bin/rayllm reward-report run_dir=runs/rm-report": ".ci/run",
    ".venv/bin/python -m bench.preferences runs/quickstart runs/preferences": ".ci/run",
    ".venv/bin/rayllm preference --config jobs/configs/preference-quickstart.yaml": ".ci/run",
    ".venv/bin/rayllm online-preference": "tests/jobs/test_preference.py",
    ".venv/bin/rayllm ppo --config runs/quickstart/ppo/config.yaml --config jobs/configs/grpo.yaml": ".ci/run",
    ".venv/bin/rayllm plan --config docs/plan-8b.yaml": "tests/jobs/test_plan.py",
    "ray get-auth-token --generate": "tests/jobs/test_cluster.py",
    "chmod 600 ~/.ray/auth_token": "tests/jobs/test_cluster.py",
    "export RAY_AUTH_MODE=token": "tests/jobs/test_cluster.py",
    **{f"ray job {verb} --address http://HEAD:8265": "tests/jobs/test_cluster.py" for verb in JOB_VERBS},
    "rayllm sft --config my-sft.yaml --address": "tests/jobs/test_cluster.py",
    "rayllm sft run_dir=/shared/sft storage_path=s3://bucket": "tests/jobs/test_shared_storage.py",
    "rayllm pipeline run_dir=/shared/run storage_path=s3://bucket": "tests/jobs/test_shared_storage.py",
    "rayllm ppo --config my-ppo.yaml placement.wait_s=1800 --address": "tests/jobs/test_cluster.py",
    "rayllm ppo --config my-ppo.yaml rollout.max_engines=8": "tests/jobs/test_elastic.py",
    **{f".venv/bin/rayllm {name} runs/quickstart/ppo/model": ".ci/run" for name in ("lineage", "verify", "export")},
}
"""Beginning of a command -> the file that runs it."""


def commands() -> list[str]:
    pages = [README, *(path.read_text() for path in (ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")))]
    blocks = re.findall(r"```sh\n(.*?)```", "\n".join(pages), flags=re.S)
    lines = [line for block in blocks for line in block.splitlines() if "# not run here" not in line]
    lines = [line.split(" #")[0].strip() for line in lines]
    return [line for line in lines if line]


def test_every_command_of_the_docs_is_run_somewhere():
    for command in commands():
        homes = [home for start, home in RUN_BY.items() if command.startswith(start)]
        assert homes, f"nothing runs {command!r}"
    ci = (ROOT / ".ci/run").read_text()
    for start, home in RUN_BY.items():
        assert (ROOT / home).is_file()
        if home == ".ci/run":
            words = shlex.split(start.removeprefix(".venv/bin/"))
            assert all(word in ci for word in words[:3]), start


def test_rayllm_commands_of_the_docs_have_known_keys(tmp_path):
    for command in commands():
        words = shlex.split(command)
        if not words[0].endswith("rayllm"):
            continue
        name, *arguments = words[1:]
        parsed = parse(name, arguments)
        if not parsed.config:
            load_config(COMMANDS[name].config_class(), None, parsed.overrides)


def test_only_clouds_and_their_like_are_not_run_here():
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/cluster.md").read_text(), flags=re.S)
    lines = [line for block in blocks for line in block.splitlines() if "# not run here" in line]
    assert {line.split()[0] for line in lines} == {"docker", "kubectl", "ray", "sbatch"}
    assert all(line.split()[1] in ("up", "down", "dashboard") for line in lines if line.startswith("ray "))
    for path in re.findall(r"cluster/[\w./-]+\w", "\n".join(lines)):
        assert (ROOT / path).is_file(), path


def test_the_tree_names_every_file():
    tree = README.split("## The house")[1].split("## Development")[0]
    for path in (ROOT / "cluster").rglob("*.*"):
        assert path.name in tree, f"README's tree does not name {path.relative_to(ROOT)}"
    for top in ("jobs", "actors", "rayllm", "bench"):
        for path in (ROOT / top).rglob("*.py"):
            assert path.name == "__init__.py" or path.name in tree, f"README's tree does not name {path.relative_to(ROOT)}"
    named = set(re.findall(r"\b([a-z_]+\.py)\b", tree))
    existing = {path.name for top in ("jobs", "actors", "rayllm", "bench") for path in (ROOT / top).rglob("*.py")}
    assert not named - existing


def test_every_command_has_its_row():
    for name in COMMANDS:
        assert f"`rayllm {name}`" in README, name


def test_the_worked_example_of_contributing_works():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.S)
    functions: dict[str, Callable[..., Any]] = {}
    kinds: dict[str, AdvantageKind] = {}
    registries = {"ADVANTAGES": functions, "ADVANTAGE_KINDS": kinds}
    exec(code, {**vars(advantages), "AdvantageKind": AdvantageKind, **registries})
    assert kinds["best_other"].needs_groups
    rewards = torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, 2.0], [float("nan"), 7.0]])
    mask = torch.tensor([[True, True]] * 3 + [[False, True]])
    found, _ = functions["best_other"](
        rewards, mask, prompt_ids=torch.tensor([5, 5, 5, 6]), gamma=1.0, gae_lambda=1.0
    )
    assert found.tolist() == [[-2.0, -2.0], [1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]]  # 6 has no other response
