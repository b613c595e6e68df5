"""The house's one rule: jobs -> actors -> rayllm, never back; heavy packages have one home each."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOMES = {
    "deepspeed": {"rayllm/models/engine.py"},
    "vllm": {
        "actors/vllm_engine.py", "actors/vllm_stepped.py", "actors/vllm_async.py", "actors/vllm_reload.py", "actors/serving.py",
    },  # fmt: skip
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


def sources(top: str) -> list[Path]:
    return sorted((ROOT / top).rglob("*.py"))


def test_no_import_against_the_rule():
    forbidden = {"rayllm": {"ray", "actors", "jobs"}, "actors": {"jobs"}, "jobs": set()}
    bad = [
        f"{path.relative_to(ROOT)} imports {name}"
        for top, names in forbidden.items()
        for path in sources(top)
        for name in imports(path) & names
    ]
    assert not bad


def test_heavy_packages_have_one_home():
    bad = [
        f"{path.relative_to(ROOT)} imports {package}"
        for top in ("rayllm", "actors", "jobs")
        for path in sources(top)
        for package, homes in HOMES.items()
        if package in imports(path) and str(path.relative_to(ROOT)) not in homes
    ]
    assert not bad


def test_algorithms_import_torch_and_nothing_of_ours_but_each_other():
    for path in sources("rayllm/algorithms"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rayllm"):
                assert node.module.startswith("rayllm.algorithms"), path


def test_data_and_models_do_not_import_each_other():
    for top, other in (("data", "rayllm.models"), ("models", "rayllm.data")):
        for path in sources(f"rayllm/{top}"):
            assert other not in path.read_text(), path


def test_every_init_is_empty():
    assert not [p for top in ("rayllm", "actors", "jobs") for p in sources(top) if p.name == "__init__.py" and p.read_text()]


def imported(code: str) -> set[str]:
    """Modules that a new process has after ``code``."""
    command = [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.split())


def test_importing_the_library_imports_no_backend():
    code = (
        "import pkgutil, importlib, rayllm\n"
        "for m in pkgutil.walk_packages(rayllm.__path__, 'rayllm.'): importlib.import_module(m.name)"
    )
    assert not imported(code) & {"ray", "vllm", "deepspeed", "actors", "jobs"}


def test_who_only_supervises_does_not_wait_for_torch():
    assert not imported("import actors.watchman, actors.fleet_actor") & {"torch", "numpy"}
    assert "torch" not in imported("import actors.publishing, rayllm.data.prompts, rayllm.config.environment")  # sent there


def test_a_job_looks_at_its_inputs_before_it_imports_torch(tiny_model_dir, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hi"}\n')
    folders = [f"model={tiny_model_dir}", f"reward_model={tiny_model_dir}", f"run_dir={tmp_path / 'run'}"]
    settings = [*folders, f"prompts={tmp_path / 'prompts.jsonl'}"]
    code = (
        "import jobs.cli, jobs.ppo; from jobs.ppo_inputs import check_inputs\n"
        "from rayllm.config.base import load_config; from rayllm.config.ppo import PPOConfig\n"
        f"check_inputs(load_config(PPOConfig, None, {settings!r}).config)"
    )
    assert not imported(code) & {"torch", "transformers"}


def test_who_asks_for_the_size_of_a_model_imports_no_model(tiny_model_dir):
    code = (
        "from pathlib import Path; from rayllm.models.folders import *\n"
        f"path = Path({str(tiny_model_dir)!r})\n"
        "load_tokenizer(path), vocabulary_size(path), max_positions(path), is_sequence_classifier(path)\n"
        "check_model_dir(path, key='model'), count_stored_parameters(path)"
    )
    assert not imported(code) & {"torch", "transformers.models.auto.modeling_auto"}
    assert not imported("import rayllm.models.loading") & {"torch._dynamo", "transformers"}
