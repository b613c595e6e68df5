"""The tree of a model's ancestors, from files written by hand; what is moved, missing, changed or flipped."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from rich.console import Console

from rayllm.errors import InputError
from rayllm.lineage import check_files, content_id, sha256_file, write_json, write_manifest
from rayllm.report.card import model_card, shorten_paths
from rayllm.report.lineage import picture, problems, trace, tree


def write_model(root: Path, stage: str, parents: dict[str, Path], data: dict[str, Path]) -> Path:
    """A run folder with a model, as a job leaves it."""
    folder = root / stage / "model"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(f"weights of {stage}".encode())
    (folder / "config.json").write_text("{}")
    write_manifest(
        folder,
        stage=stage,
        parents=[{"role": role, "id": content_id(path), "path": str(path)} for role, path in parents.items()],
        data=[{"name": name, "path": str(path), "sha256": sha256_file(path), "rows": 3} for name, path in data.items()],
        config={"run_dir": str(root / stage), "seed": 0},
        metrics={"eval/loss": 1.25},
    )
    return folder


@pytest.fixture
def family(tmp_path) -> Path:
    """text -> pretrain -> sft -> reward_model and ppo; rankings written by a label job from sft."""
    root = tmp_path / "runs"
    (root / "given").mkdir(parents=True)
    text = root / "given/text.jsonl"
    text.write_text('{"text": "raw"}\n')
    base = write_model(root, "pretrain", {}, {"documents": text})
    sft = write_model(root, "sft", {"model": base}, {})
    (root / "label").mkdir()
    rankings = root / "label/rankings.parquet"
    rankings.write_bytes(b"rankings")
    record = {
        "stage": "label",
        "config": {"run_dir": str(root / "label")},
        "parents": [{"role": "model", "id": content_id(sft), "path": str(sft)}],
        "data": [],
    }
    write_json(root / "label/run.json", record)
    reward = write_model(root, "reward_model", {"model": sft}, {"rankings": rankings})
    write_model(root, "ppo", {"model": sft, "reward_model": reward}, {})
    return root


def text_of(source) -> list[str]:
    console = Console(width=200, color_system=None)
    with console.capture() as captured:
        console.print(tree(source, place=lambda path: "/".join(path.parts[-2:])))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_the_tree_goes_down_to_the_raw_text(family):
    source = trace(family / "ppo/model")
    i = {s: content_id(family / s / "model")[:8] for s in ("pretrain", "sft", "reward_model", "ppo")}
    raw, ranked = sha256_file(family / "given/text.jsonl")[:8], sha256_file(family / "label/rankings.parquet")[:8]
    assert text_of(source) == [
        f"ppo  ppo/model  {i['ppo']}",
        f"├── model: sft  sft/model  {i['sft']}",
        f"│   └── model: pretrain  pretrain/model  {i['pretrain']}",
        f"│       └── documents: made elsewhere  given/text.jsonl  {raw}",
        f"└── reward_model: reward_model  reward_model/model  {i['reward_model']}",
        f"    ├── model: sft  sft/model  {i['sft']}  (see above)",
        f"    └── rankings: label  label/rankings.parquet  {ranked}",
        f"        └── model: sft  sft/model  {i['sft']}  (see above)",
    ]
    assert problems(source) == []


def test_runs_that_were_moved_together_are_found(family):
    moved = family.rename(family.with_name("elsewhere"))
    assert problems(trace(moved / "ppo/model")) == []


def test_missing_and_changed_parents_are_told(family):
    (family / "given/text.jsonl").write_text("other")
    (family / "label/rankings.parquet").unlink()
    lines = problems(trace(family / "ppo/model"))
    assert len(lines) == 2
    assert any(line.startswith(f"{family}/given/text.jsonl: changed: was ") for line in lines)
    assert f"{family}/label/rankings.parquet: missing" in lines
    was = content_id(family / "pretrain/model")
    (family / "pretrain/model/lineage.json").unlink()  # a model of another make is known by its files
    assert trace(family / "ppo/model").sources[0].sources[0].name == "made elsewhere"
    assert content_id(family / "pretrain/model") == was
    (family / "pretrain/model/model.safetensors").write_bytes(b"other weights")
    assert any("pretrain/model: changed" in line for line in problems(trace(family / "ppo/model")))


def test_the_picture_holds_everything_once(family):
    (family / "label/rankings.parquet").unlink()
    root = ElementTree.fromstring(picture(trace(family / "ppo/model")))
    space = "{http://www.w3.org/2000/svg}"
    words = [element.text or "" for element in root.iter(f"{space}text")]
    assert len(list(root.iter(f"{space}rect"))) == 6
    assert len(list(root.iter(f"{space}path"))) == 6  # the rankings' own parent is not known any more
    for name in ("ppo: ppo/model", "sft: sft/model", "pretrain: pretrain/model", "missing"):
        assert words.count(name) == 1
    boxes = [(float(r.get("x", 0)), float(r.get("y", 0))) for r in root.iter(f"{space}rect")]
    assert len(set(boxes)) == 6


@pytest.mark.scorecard("S25")
def test_a_flipped_byte_is_told_by_file(family):
    folder = family / "ppo/model"
    assert check_files(folder, key="model") is not None
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match=r"model: .*ppo/model/model\.safetensors is not the file that was written"):
        check_files(folder, key="model")
    weights.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        check_files(folder, key="model")


@pytest.mark.scorecard("S25")
def test_a_manifest_that_was_edited_is_told(family):
    path = family / "ppo/model/lineage.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["config.json"] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="was changed: its id is not that"):
        check_files(family / "ppo/model", key="model")


def test_the_card_says_what_the_lineage_says_and_no_path(family):
    manifest = shorten_paths(json.loads((family / "ppo/model/lineage.json").read_text()))
    card = model_card("assistant", manifest, trace(family / "ppo/model"), f"rayllm ppo run_dir={family}/ppo -v")
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    assert "| eval/loss | 1.25 |" in card and "reward_model: reward_model" in card and "rayllm ppo run_dir=runs/ppo -v\n" in card
    assert str(family) not in card and 'from_pretrained("assistant")' in card


def test_a_parent_from_the_hub_is_the_cards_base_model(tmp_path):
    folder = tmp_path / "models--ORG--base/snapshots/0123"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    model = write_model(tmp_path / "runs", "sft", {"model": folder}, {})
    source = trace(model)
    assert source.sources[0].name == "ORG/base"
    assert "base_model:\n- ORG/base\n" in model_card("m", json.loads((model / "lineage.json").read_text()), source, None)
