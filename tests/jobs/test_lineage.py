"""`rayllm lineage`, `verify` and `export` on the models of a real pipeline."""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ElementTree

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.jobs.conftest import rayllm


@pytest.fixture
def flipped(tiny_run, tmp_path):
    """The served model with one bit of its weights turned over."""
    source, _ = tiny_run
    model = shutil.copytree(source / "ppo/model", tmp_path / "model")
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    return model


def test_the_lineage_shows_every_stage_and_draws_it(tiny_run, tmp_path):
    source, _ = tiny_run
    done = rayllm("lineage", source / "ppo/model", f"picture={tmp_path / 'lineage.svg'}")
    assert done.returncode == 0, done.stdout
    for stage in ("ppo", "reward_model", "label", "sft", "pretrain", "tokenizer", "world"):
        assert f"{stage}  " in done.stdout
    assert "documents.parquet" in done.stdout and "every parent is there and unchanged" in done.stdout
    drawn = ElementTree.parse(tmp_path / "lineage.svg").getroot()
    words = " ".join(element.text or "" for element in drawn.iter("{http://www.w3.org/2000/svg}text"))
    assert "pretrain: pretrain/model" in words and "world: world/documents.parquet" in words


@pytest.mark.parametrize("command", ["verify", "serve"])
def test_a_flipped_byte_is_refused_by_the_files_name(flipped, command):
    done = rayllm(command, f"model={flipped}")
    assert done.returncode == 2
    assert f"{flipped}/model.safetensors is not the file that was written" in done.stdout


def test_an_export_is_a_model_with_a_card_and_without_paths(tiny_run, tmp_path):
    source, _ = tiny_run
    out = tmp_path / "assistant"
    done = rayllm("export", source / "ppo/model", out)
    assert done.returncode == 0, done.stdout
    AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out).chat_template
    for name in ("README.md", "lineage.json"):
        assert str(source) not in (out / name).read_text()
    assert "reward_model: reward_model" in (out / "README.md").read_text()
    verified = rayllm("verify", out)
    assert verified.returncode == 0 and "not in lineage.json: README.md" in verified.stdout
    again = rayllm("export", source / "ppo/model", out)
    assert again.returncode == 2 and "not an empty folder" in again.stdout


def test_a_changed_model_is_not_exported(flipped, tmp_path):
    done = rayllm("export", flipped, tmp_path / "out")
    assert done.returncode == 2 and "model.safetensors" in done.stdout
    assert not (tmp_path / "out").exists()
