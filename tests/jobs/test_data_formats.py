"""Data as people have it, through whole jobs: from the file to the trained model, nothing written by hand between."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

from tests.jobs.conftest import ROOT, rayllm

WORDS = ["snow", "milk", "grass", "coal", "blood", "gold", "wood", "rain"]


def jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_mixture_of_formats_with_a_bad_row_trains_sft(tmp_path, tiny_model_dir):
    shared = [{"conversations": [{"from": "human", "value": f"What is {w}?"}, {"from": "gpt", "value": f"It is {w}."}]}
              for w in WORDS]  # fmt: skip
    plain = [{"prompt": f"Say {a} {b}.", "completion": f"{a} {b}"} for a in WORDS for b in WORDS]
    a = jsonl(tmp_path / "a.jsonl", [*shared, {"conversations": [{"from": "cat", "value": "meow"}]}])
    b = jsonl(tmp_path / "b.jsonl", plain)
    arguments = [
        "sft", f"run_dir={tmp_path / 'run'}", f"model={tiny_model_dir}", f"data=[{{path: {a}, weight: 3}}, {b}]",
        "batch_size=8", "num_epochs=1", "heldout_fraction=0.1",
    ]  # fmt: skip
    done = rayllm(*arguments)
    assert done.returncode == 2
    assert f"{a}:9: conversations[0].from: unknown speaker 'cat'; known: system, human" in " ".join(done.stdout.split())
    done = rayllm(*arguments, "max_bad_rows=1", "overwrite=true")
    assert done.returncode == 0, done.stdout
    said = " ".join(done.stdout.split())
    assert "a.jsonl (weight 3, 9 rows) + " in said and "b.jsonl (weight 1, 64 rows): " in said
    assert "read as ShareGPT and prompt and completion, 73 rows; kept 72 rows, " in said
    assert "passed over 1 bad rows, first: " in said
    record = json.loads((tmp_path / "run/run.json").read_text())
    (data,) = record["data"]
    assert data["bad_rows"] == 1 and data["first_bad_rows"][0].startswith(f"{a}:9: conversations[0].from")
    assert data["heldout_rows"] > 0 and set(record["inputs"]) == {"model", "data.0.path", "data.1.path"}
    manifest = json.loads((tmp_path / "run/model/lineage.json").read_text())
    assert manifest["data"][0]["sources"][0]["weight"] == 3
    assert "is done and unchanged" in rayllm(*arguments, "max_bad_rows=1", "overwrite=true").stdout


def test_transcripts_train_a_reward_model_with_some_prompts_set_aside(tmp_path, tiny_model_dir):
    rows = [
        {
            "chosen": f"\n\nHuman: Tell me of {a} and {b}.\n\nAssistant: Gladly: {a} and {b}.",
            "rejected": f"\n\nHuman: Tell me of {a} and {b}.\n\nAssistant: No{'.' * n}",
        }
        for a in WORDS for b in WORDS for n in (1, 2)
    ]  # fmt: skip
    rows.append({"chosen": "\n\nHuman: Why?\n\nAssistant: ", "rejected": "\n\nHuman: Why?\n\nAssistant: Because."})
    path = jsonl(tmp_path / "hh.jsonl", rows)
    done = rayllm(
        "reward-model", f"run_dir={tmp_path / 'run'}", f"model={tiny_model_dir}", f"rankings={path}", "batch_size=8",
        "num_epochs=2", "heldout_fraction=0.2",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "read as Anthropic HH, 129 rows; kept 128 rows" in " ".join(done.stdout.split())
    record = json.loads((tmp_path / "run/run.json").read_text())
    data = record["data"][0]
    assert (data["format"], data["rows"]) == ("Anthropic HH", 128)
    assert data["dropped"] == {"an answer without words": 1}
    assert 0 < data["heldout_rows"] < 64 and data["heldout_rows"] % 2 == 0  # both rows of a prompt are on one side
    assert record["metrics"]["train/loss"] < 0.05  # untrained: 0.29


def test_the_readmes_way_with_ones_own_data_and_model(tmp_path, tiny_model_dir):
    """Its three commands, on a model with a template like those of most on the hub: without marks."""
    mine = shutil.copytree(tiny_model_dir, tmp_path / "models/mine")
    template = (mine / "chat_template.jinja").read_text()
    (mine / "chat_template.jinja").write_text(re.sub(r"\{% (end)?generation %\}", "", template))
    asked = [(f"What is {a} and {b}?", f"{a} {b}.") for a in WORDS for b in WORDS]
    jsonl(tmp_path / "my-chats.jsonl", [{"prompt": prompt, "response": said} for prompt, said in asked])
    pairs = [{"prompt": prompt, "chosen": said, "rejected": "No."} for prompt, said in asked]
    jsonl(tmp_path / "my-pairs.jsonl", pairs)
    jsonl(tmp_path / "my-prompts.jsonl", [{"prompt": prompt} for prompt, _ in asked])
    shutil.copytree(ROOT / "jobs/configs", tmp_path / "jobs/configs")
    size = {
        "sft": [], "reward-model": [],
        "ppo": ["num_steps=1", "prompts_per_step=8", "rollout.max_new_tokens=8",
                *(f"{role}.cpus_per_actor=0.2" for role in ("policy", "critic", "reference", "reward", "rollout"))],
    }  # fmt: skip
    commands = re.findall(r"^\.venv/bin/rayllm (.* run_dir=runs/my-.*)$", (ROOT / "README.md").read_text(), flags=re.M)
    assert len(commands) == 3
    for command in commands:
        name, *arguments = shlex.split(command)
        done = rayllm(name, *arguments, *size[name], cwd=tmp_path)
        assert done.returncode == 0, done.stdout
    assert (tmp_path / "runs/my-ppo/model/model.safetensors").is_file()
    trained = json.loads((tmp_path / "runs/my-sft/run.json").read_text())["metrics"]
    assert trained["train/loss"] > 0
