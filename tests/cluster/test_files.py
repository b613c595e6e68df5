"""The shipped cluster files hold what their readers expect: Ray's schema, KubeRay's API, Kubernetes' pods, a shell."""

from __future__ import annotations

import copy
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from ray._private.label_utils import validate_label_key, validate_label_value
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from jobs.cli import parse
from rayllm.config.base import Config, load_config
from rayllm.config.common import USUAL_NODE_TYPES, PlacementConfig
from rayllm.config.pipeline import PipelineConfig
from rayllm.config.serve import ServeConfig

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
ROOT = CLUSTER.parent
ROLES = ["learner", "rollout", "scorer"]
CLOUDS = ["aws", "gcp"]
KUBERAY = ["raycluster", "rayjob", "rayservice"]
KUBERNETES = "1.34"
SCHEMA = yaml.safe_load((Path(__file__).parent / "kuberay.yaml").read_text())


def tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


@pytest.mark.parametrize("name", [*CLOUDS, "on-premise"])
def test_ray_up_files_follow_rays_schema(name):
    validate_config(prepare_config(load(f"{name}.yaml")))


def misspell(config: dict[str, Any]) -> None:
    config["idle_timeout_minute"] = config.pop("idle_timeout_minutes")


def misspell_in_a_type(config: dict[str, Any]) -> None:
    config["available_node_types"]["rollout"]["max_worker"] = 4


def name_no_head(config: dict[str, Any]) -> None:
    config["head_node_type"] = "master"


def text_for_a_number(config: dict[str, Any]) -> None:
    config["available_node_types"]["learner"]["resources"]["GPU"] = "8"


@pytest.mark.parametrize("spoil", [misspell, misspell_in_a_type, name_no_head, text_for_a_number])
def test_a_wrong_ray_up_file_is_refused(spoil):
    config = load("aws.yaml")
    spoil(config)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate_config(prepare_config(config))


def test_roles_go_to_the_types_of_these_files():
    assert {PlacementConfig().node_type(role, labelled=True) for role in USUAL_NODE_TYPES} == set(ROLES)


@pytest.mark.parametrize("name", CLOUDS)
def test_every_role_has_its_node_type(name):
    config = load(f"{name}.yaml")
    types = config["available_node_types"]
    assert list(types) == ["head", *ROLES]
    assert types["head"]["resources"] == {"CPU": 0}  # it computes nothing
    for role in ROLES:
        assert types[role]["labels"] == {"rayllm.role": role}
        assert 0 == types[role]["min_workers"] < types[role]["max_workers"]
        assert types[role]["resources"]["GPU"]
    assert sum(types[role]["max_workers"] for role in ROLES) == config["max_workers"]
    spot = {role for role in ROLES if "spot" in yaml.safe_dump(types[role]["node_config"]).lower()}
    assert spot == {"rollout"}


def labels_of(tree: Any) -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict):
        yield from tree.get("labels", {}).items()
        for branch in tree.values():
            yield from labels_of(branch)
    elif isinstance(tree, list):
        for branch in tree:
            yield from labels_of(branch)


@pytest.mark.parametrize("name", [*(f"{n}.yaml" for n in CLOUDS), *(f"kuberay/{n}.yaml" for n in KUBERAY)])
def test_labels_are_labels_of_ray(name):
    found = list(labels_of(load(name)))
    assert found
    for key, value in found:
        assert validate_label_key(key) is None and validate_label_value(value) is None


@pytest.mark.parametrize("name", [*CLOUDS, "on-premise"])
@pytest.mark.scorecard("S07")
def test_the_token_is_on_and_the_dashboard_is_not_open(name):
    config = load(f"{name}.yaml")
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    everywhere = config.get("docker", {}).get("run_options", [])
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        start = commands[-1]
        assert "ray start" in start
        assert "--env=RAY_AUTH_MODE=token" in everywhere or "RAY_AUTH_MODE=token" in start
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


@pytest.mark.parametrize("name", [*CLOUDS, "on-premise"])
def test_start_commands_have_options_that_ray_has(name):
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    config = load(f"{name}.yaml")
    for command in (config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]):
        options = re.findall(r"(--[a-z-]+)", command.split("ray start")[1])
        assert options and set(options) <= known


def group_specs(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    spec = document["spec"]
    cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    return {"head": cluster["headGroupSpec"], **{g["groupName"]: g for g in cluster["workerGroupSpecs"]}}


def check_kuberay(document: dict[str, Any]) -> None:
    """The API's schema, Kubernetes' own for the pods, and the rules of KubeRay's validation that concern us."""
    jsonschema.validate(document, SCHEMA)
    spec = document["spec"]
    cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    if cluster.get("authOptions"):
        assert cluster["authOptions"].get("mode") == "token" and "rayVersion" in cluster  # else it is off
    for group in group_specs(document).values():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        assert group.get("minReplicas", 0) <= group.get("replicas", 0) <= group.get("maxReplicas", 1)
        assert not {"labels", "resources"} & set(group["rayStartParams"])
        assert not ("resources" in group and "num-cpus" in group["rayStartParams"])
        assert "restartPolicy" not in group["template"]["spec"]  # autoscaler v2 sets Never
        names = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        for container in group["template"]["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= names
            for amount in (*container["resources"]["requests"].values(), *container["resources"]["limits"].values()):
                assert re.fullmatch(r"\d+(m|[KMGT]i)?", amount)


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_files_follow_the_api(name):
    document = load(f"kuberay/{name}.yaml")
    check_kuberay(document)
    cluster = document["spec"].get("rayClusterSpec") or document["spec"].get("rayClusterConfig") or document["spec"]
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["enableInTreeAutoscaling"] and cluster["authOptions"] == {"mode": "token"}
    assert group_specs(document)["head"]["resources"] == {"CPU": "0"}


def spoilt(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    document = copy.deepcopy(load("kuberay/raycluster.yaml"))
    change(document["spec"])
    return document


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec.update(enableInTreeAutoscaler=True),
        lambda spec: spec["autoscalerOptions"].update(upscalingMode="Fast"),
        lambda spec: spec["headGroupSpec"].update(resources={"CPU": 0}),
        lambda spec: spec["headGroupSpec"].pop("template"),
        lambda spec: spec["workerGroupSpecs"][0].update(minReplicas=9),
        lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0].update(volumeMount=[]),
        lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0].update(image=7),
        lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"].update(volumes=[]),
        lambda spec: spec.pop("rayVersion"),
    ],
)
def test_a_wrong_kuberay_file_is_refused(change):
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError, AssertionError)):
        check_kuberay(spoilt(change))


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_worker_groups_are_the_roles(name):
    groups = group_specs(load(f"kuberay/{name}.yaml"))
    assert list(groups) == ["head", *ROLES]
    for role in ROLES:
        assert groups[role]["labels"] == {"rayllm.role": role}
        assert groups[role]["minReplicas"] < groups[role]["maxReplicas"]


def test_the_rayjobs_entrypoint_is_a_command_of_ours():
    program, name, *arguments = shlex.split(load("kuberay/rayjob.yaml")["spec"]["entrypoint"])
    parsed = parse(name, arguments)
    loaded = load_config(PipelineConfig, ROOT / "jobs/configs/quickstart.yaml", parsed.overrides)
    assert (program, name) == ("rayllm", "pipeline") and parsed.config
    assert loaded.config.ppo.placement.wait_s > 0 and loaded.config.sft.placement.wait_s > 0  # it starts without workers


def test_the_rayservice_serves_what_our_app_takes():
    text = load("kuberay/rayservice.yaml")["spec"]["serveConfigV2"]
    (app,) = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    assert app.import_path == "actors.serving:build_app"
    config: Config = ServeConfig.model_validate(app.args)
    assert isinstance(config, ServeConfig) and config.api_key_file is not None  # all of the network reaches it
    mounts = group_specs(load("kuberay/rayservice.yaml"))["server"]["template"]["spec"]["containers"][0]["volumeMounts"]
    for path in (config.model, config.api_key_file):
        assert any(path.is_relative_to(mount["mountPath"]) for mount in mounts)


def test_the_slurm_script_is_clean():
    script = CLUSTER / "slurm.sh"
    assert os.access(script, os.X_OK)
    for command in (["bash", "-n"], [tool("shellcheck")]):
        done = subprocess.run([*command, str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_is_clean_and_copies_what_exists():
    done = subprocess.run([tool("hadolint"), str(CLUSTER / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    sources = re.findall(r"^COPY --chown=\S+ (.+) \S+$", (CLUSTER / "Dockerfile").read_text(), flags=re.M)
    named = [word for line in sources for word in line.split()]
    assert named and all((ROOT / word).exists() for word in named)
    sent = (CLUSTER / "Dockerfile.dockerignore").read_text().split()
    assert sorted(named) == sorted(word[1:] for word in sent if word.startswith("!"))


def test_placeholders_are_told():
    for path in CLUSTER.rglob("*.yaml"):
        text = path.read_text()
        assert "CAPITALS stand for what is yours" in text, path
