"""The command: help, and one clear line for every kind of wrong input, before anything heavy starts."""

from __future__ import annotations

import json

import pytest

from jobs.cli import COMMANDS, main
from tests.jobs.conftest import TINY


def run(capsys, *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code or 0, capsys.readouterr().out


def test_the_overview_names_every_command(capsys):
    status, text = run(capsys, "--help")
    assert status == 0
    for name, command in COMMANDS.items():
        assert name in text and command.summary.split(",")[0] in text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_prints_every_field_with_default_and_meaning(capsys, name):
    from rayllm.config.base import describe_fields

    status, text = run(capsys, name, "--help")
    assert status == 0
    flat = " ".join(text.split())
    for key, _, _, doc in describe_fields(COMMANDS[name].config_class()):
        assert key in flat and doc[:30] in flat, key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrian"], "pretrian: no such command. Did you mean pretrain?"),
        (["frobnicate"], "Known: world, tokenizer"),
        (["sft", "--confg", "x"], "--confg: unknown option"),
        (["sft", "--config", "/no/such.yaml"], "cannot read /no/such.yaml: No such file"),
        (["tokenizer"], "run_dir: required but not given. Folder of this run"),
        (["tokenizer", "run_dir=/tmp/x", "documents=/no/d.jsonl"], "documents: no file at /no/d.jsonl"),
        (["tokenizer", "run_dir=/tmp/x", "documents=/no/d.jsonl", "vocab=3"], "Did you mean vocab_size"),
        (["sft", "run_dir=/tmp/x", "model=/no/model", "data=/no/d.jsonl"], "model: no model folder at /no/model"),
        (["pipeline", "--config", TINY, "run_dir=/tmp/x", "ppo.num_stesp=3"], "Did you mean ppo.num_steps"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(capsys, arguments, message):
    status, text = run(capsys, *arguments)
    assert status == 2 and "Traceback" not in text
    assert message in " ".join(text.split())


@pytest.mark.scorecard("R39")
def test_bad_data_is_named_and_nothing_is_trained(capsys, tmp_path, tiny_model_dir):
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n" + json.dumps({"prompt": "a"}) + "\n")
    status, text = run(capsys, "sft", f"run_dir={tmp_path / 'run'}", f"model={tiny_model_dir}", f"data={data}")
    assert status == 2 and "d.jsonl:2: completion: missing, and no 'response'; the row holds prompt" in text.replace("\n", " ")
    assert not (tmp_path / "run/model").exists()


@pytest.mark.scorecard("R63")
def test_too_small_a_cluster_fails_at_once_with_need_against_have(local_ray, capsys, tmp_path, tiny_model_dir):
    prompts = tmp_path / "p.jsonl"
    row = {"prompt": [{"role": "user", "content": "hi"}], "kind": "chat", "family": "chat", "entity": "greeting"}
    prompts.write_text((json.dumps(row) + "\n") * 4)
    status, text = run(
        capsys, "label", f"run_dir={tmp_path / 'run'}", f"model={tiny_model_dir}", f"prompts={prompts}",
        f"heldout_prompts={prompts}", "rollout.num_actors=100",
    )  # fmt: skip
    assert status == 2
    assert "the roles need 100 CPU (rollout 100 x 1), the cluster has 8" in " ".join(text.split())
