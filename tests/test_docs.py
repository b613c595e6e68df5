"""The README tells the truth: its tree is the tree, its commands are run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import torch

from jobs.cli import COMMANDS, parse
from rayllm.algorithms import advantages
from rayllm.config.base import load_config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()

RUN_BY = {
    "make quickstart": ".ci/run",
    "make test": ".ci/run",
    "make lint": ".ci/run",
    ".venv/bin/rayllm serve model=runs/quickstart/ppo/model": ".ci/run",
    ".venv/bin/rayllm chat": ".ci/run",
    ".venv/bin/rayllm sft run_dir=runs/mine": ".ci/run",
    ".venv/bin/python -m bench.algorithms runs/quickstart runs/algorithms": ".ci/run",
    ".venv/bin/python -m bench.preferences runs/quickstart runs/preferences": ".ci/run",
    ".venv/bin/rayllm preference --config jobs/configs/preference-quickstart.yaml": ".ci/run",
    ".venv/bin/rayllm online-preference": "tests/jobs/test_preference.py",
    ".venv/bin/rayllm ppo --config runs/quickstart/ppo/config.yaml --config jobs/configs/grpo.yaml": ".ci/run",
    "ray job submit --address http://HEAD:8265": "tests/jobs/test_pipeline.py",
    "rayllm sft --config my-sft.yaml --address": "tests/jobs/test_pipeline.py",
}
"""Beginning of a command -> the file that runs it."""


def commands() -> list[str]:
    pages = [README, *(path.read_text() for path in (ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")))]
    blocks = re.findall(r"```sh\n(.*?)```", "\n".join(pages), flags=re.S)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_every_command_of_the_docs_is_run_somewhere():
    for command in commands():
        homes = [home for start, home in RUN_BY.items() if command.startswith(start)]
        assert homes, f"nothing runs {command!r}"
    ci = (ROOT / ".ci/run").read_text()
    for start, home in RUN_BY.items():
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


def test_the_tree_names_every_file():
    tree = README.split("## The house")[1].split("## Development")[0]
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
    registry: dict[str, advantages.Advantage] = {}
    exec(code, {**vars(advantages), "ADVANTAGES": registry})
    rewards = torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, 2.0], [float("nan"), 7.0]])
    mask = torch.tensor([[True, True]] * 3 + [[False, True]])
    found, _ = registry["best_other"](
        rewards, mask, prompt_ids=torch.tensor([5, 5, 5, 6]), gamma=1.0, gae_lambda=1.0
    )
    assert found.tolist() == [[-2.0, -2.0], [1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]]  # 6 has no other response
