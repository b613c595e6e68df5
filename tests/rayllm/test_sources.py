"""Files, folders, several sources with weights, the split by prompt, and data sets of the hub."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from rayllm.config.base import describe_fields, load_config
from rayllm.config.data import WeightedPath
from rayllm.config.reward_model import RewardModelConfig
from rayllm.config.sft import SftConfig
from rayllm.data.chat import read_conversations
from rayllm.data.files import check_data_file, count_rows, iter_rows, write_parquet
from rayllm.data.preferences import read_rankings
from rayllm.data.prompts import read_prompts
from rayllm.data.sources import Reader, is_held_out
from rayllm.errors import InputError
from rayllm.hub import fetch, fetch_inputs
from rayllm.lineage import config_inputs, content_id, fingerprint
from rayllm.report.run import Run

ROWS = [{"prompt": f"Q {n}, é?", "completion": f"line one\nline {n}"} for n in range(5)]


def jsonl(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arrow(path: Path, make) -> None:
    table = pa.Table.from_pylist(ROWS)
    with make(str(path), table.schema) as file:
        file.write_table(table, max_chunksize=2)


def write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(ROWS)


def saved(path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(path), num_shards=2)


WRITERS = {
    "d.jsonl": lambda path: jsonl(path, ROWS),
    "d.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "lines.json": lambda path: jsonl(path, ROWS),
    "d.jsonl.gz": lambda path: path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode())),
    "d.csv": write_csv,
    "d.parquet": lambda path: write_parquet(ROWS, path),
    "file.arrow": lambda path: arrow(path, pa.ipc.new_file),
    "stream.arrow": lambda path: arrow(path, pa.ipc.new_stream),
    "saved": saved,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    check_data_file(path, key="data")
    assert [row for _, row in iter_rows(path)] == ROWS
    assert count_rows(path) == 5
    before = content_id(path)
    ROWS_OTHER = [*ROWS[:4], {"prompt": "other", "completion": "other"}]
    if name == "d.jsonl":
        jsonl(path, ROWS_OTHER)
        assert content_id(path) != before


def test_structured_cells_of_a_csv_file(tmp_path):
    path = tmp_path / "d.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "responses", "ranks", "labeler"])
        writer.writerow(['[{"role": "user", "content": "a"}]', '["x", "y"]', "[1, 0]", "ana"])
    ((_, row),) = Reader(path, "ranking").rows(lambda row: row)
    assert (row["prompt"], row["responses"], row["ranks"]) == ([{"role": "user", "content": "a"}], ["x", "y"], [1, 0])


def test_a_folder_is_its_files_in_order_and_never_two_splits(tmp_path):
    folder = tmp_path / "data"
    jsonl(folder / "b.jsonl", ROWS[3:])
    write_parquet(ROWS[:3], folder / "a.parquet")
    (folder / "README.md").write_text("about")
    jsonl(folder / ".cache" / "c.jsonl", ROWS)
    assert [row for _, row in iter_rows(folder)] == ROWS
    before = content_id(folder)
    (folder / "README.md").write_text("more")
    assert content_id(folder) == before
    jsonl(folder / "b.jsonl", ROWS[2:])
    assert content_id(folder) != before
    for name in ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"):
        write_parquet(ROWS, tmp_path / "hub" / "data" / name)
    with pytest.raises(InputError, match="data: .*hub: holds the splits test, train; name the files or the folder of one"):
        check_data_file(tmp_path / "hub", key="data")
    assert len(list(iter_rows(tmp_path / "hub/data/test-00000-of-00001.parquet"))) == 5


def test_a_folder_with_several_splits_saved_by_datasets_is_refused(tmp_path):
    import datasets

    part = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"sft": part, "gen": part}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(InputError, match="holds the splits gen, sft"):
        check_data_file(tmp_path / "saved", key="data")
    assert len(list(iter_rows(tmp_path / "saved/gen"))) == 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.txt", "x", "data: .*d.txt must end in one of .parquet .jsonl"),
        ("d.arrow", "x", "data: .*d.arrow: not a readable Arrow file or stream"),
        ("d.parquet", "x", "data: .*d.parquet: not a readable Parquet file"),
        ("folder/d.txt", "x", "data: .*folder: no data in this folder"),
    ],
)
def test_what_is_no_data_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        check_data_file(path if path.parent == tmp_path else path.parent, key="data")
    with pytest.raises(InputError, match="data: no file at /no/such"):
        check_data_file(Path("/no/such"), key="data")


@pytest.mark.parametrize(("content", "message"), [("a,a\n1,2\n", "each once"), ("", "each once")])
def test_a_csv_file_names_its_columns(tmp_path, content, message):
    (tmp_path / "d.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        list(iter_rows(tmp_path / "d.csv"))


def test_weights_say_how_often_a_row_is_used(tmp_path, tiny_tokenizer):
    a = jsonl(tmp_path / "a.jsonl", [{"prompt": f"a{n}", "completion": "x"} for n in range(10)])
    b = jsonl(tmp_path / "b.jsonl", [{"messages": [{"role": "user", "content": f"b{n}"}, {"role": "assistant", "content": "x"}]} for n in range(4)])  # fmt: skip
    paths = (WeightedPath(path=a, weight=0.5), WeightedPath(path=b, weight=2.25))
    data = read_conversations(paths, tiny_tokenizer, max_length=64)
    assert data.origins.facts["format"] == "prompt and completion and OpenAI messages"
    assert [entry["rows"] for entry in data.origins.facts["sources"]] == [10, 4]
    used = Counter(data.origins.prompts[row] for row in data.origins.mix(range(14), seed=1))
    assert sum(n for prompt, n in used.items() if prompt.startswith("a")) == 5
    assert set(used.values()) == {1, 2, 3}
    assert sorted(n for prompt, n in used.items() if prompt.startswith("b")) == [2, 2, 2, 3]
    assert all(n == 1 for prompt, n in used.items() if prompt.startswith("a"))
    assert data.origins.mix(range(14), seed=1) == data.origins.mix(range(14), seed=1)
    assert data.origins.mix(range(14), seed=1) != data.origins.mix(range(14), seed=2)


def test_prompts_are_mixed_by_weight(tmp_path, tiny_tokenizer):
    a = jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    b = jsonl(tmp_path / "b.jsonl", [{"question": "c", "answer": "#### 1,000"}])
    paths = (WeightedPath(path=a), WeightedPath(path=b, weight=3))
    data = read_prompts(paths, tiny_tokenizer, max_prompt_tokens=50)
    assert [row["prompt"] for row in data.rows] == ["a", "b", "c", "c", "c"]
    assert data.rows[-1]["answer"] == "1000" and data.token_ids[2] == data.token_ids[4]
    assert data.facts["format"] == "prompts and GSM8K"


def test_a_prompt_is_on_one_side_only_whatever_its_blanks_and_its_file(tmp_path, tiny_tokenizer):
    rows = [{"prompt": f"Question  {n % 40}\n?", "completion": f"{n}"} for n in range(120)]
    rows += [{"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"Question {n} ?"}],
              "completion": "x"} for n in range(40)]  # fmt: skip
    data = read_conversations(jsonl(tmp_path / "d.jsonl", rows), tiny_tokenizer, max_length=128)
    train, held = data.origins.split(0.2, seed=0)
    prompts = data.origins.prompts
    assert sorted([*train, *held]) == list(range(160))
    assert not {prompts[row] for row in train} & {prompts[row] for row in held}
    assert len(held) % 4 == 0 and 0 < len(held) < 80  # each prompt stands four times, and its rows stay together
    assert all(is_held_out(prompts[row], 0.2) for row in held)
    shares = [sum(is_held_out(f"prompt {n}", share) for n in range(10_000)) / 10_000 for share in (0.02, 0.1, 0.3)]
    assert shares == pytest.approx([0.02, 0.1, 0.3], rel=0.15)


def test_the_held_out_side_knows_no_weights(tmp_path, tiny_tokenizer):
    path = jsonl(tmp_path / "d.jsonl", [{"prompt": f"q{n}", "completion": "x"} for n in range(50)])
    data = read_conversations((WeightedPath(path=path, weight=3),), tiny_tokenizer, max_length=64)
    train, held = data.origins.split(0.3, seed=0)
    assert len(set(held)) == len(held) and len(train) == 3 * (50 - len(held))


def test_held_out_rankings_of_a_trained_prompt_are_left_out_and_counted(tmp_path, tiny_tokenizer):
    def rankings(name, prompts):
        rows = [{"prompt": prompt, "chosen": "x", "rejected": "y"} for prompt in prompts]
        return read_rankings(jsonl(tmp_path / name, rows), tiny_tokenizer, max_length=64)

    train, heldout = rankings("a.jsonl", ["a", "b"]), rankings("b.jsonl", ["c", " b ", "d", "a"])
    apart = heldout.apart_from(train)
    assert apart.origins.prompts == ["c", "d"] and len(apart.rankings) == 2
    assert apart.dropped == {"of a prompt to train on": 2}
    assert rankings("c.jsonl", ["e"]).apart_from(train).dropped == {}


def test_held_out_prompts_that_are_trained_on_are_left_out_and_counted(tmp_path, tiny_tokenizer):
    def prompts(name, *given):
        path = jsonl(tmp_path / name, [{"prompt": prompt} for prompt in given])
        return read_prompts(path, tiny_tokenizer, max_prompt_tokens=60)

    same = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a  b"}]
    apart = prompts("b.jsonl", "c", same, [1, 2], [1, 3]).apart_from(prompts("a.jsonl", "a b", [1, 2]))
    assert [row["prompt"] for row in apart.rows] == ["c", [1, 3]] and apart.token_ids[1] == [1, 3]
    assert apart.dropped == {"of a prompt to train on": 2}


def sft(*overrides: str) -> SftConfig:
    return load_config(SftConfig, None, ["run_dir=/x", "model=/m", *overrides]).config


def test_a_config_takes_one_path_or_a_list(tmp_path):
    assert sft("data=/a.jsonl").data == Path("/a.jsonl")
    config = sft("data=[/a.jsonl, {path: /b, weight: 2}]")
    assert config.data == (WeightedPath(path=Path("/a.jsonl")), WeightedPath(path=Path("/b"), weight=2))
    assert SftConfig.model_validate(config.model_dump(mode="json")) == config
    inputs = config_inputs(config)
    assert inputs == {"model": Path("/m"), "data.0.path": Path("/a.jsonl"), "data.1.path": Path("/b")}
    relative = sft("data=[a.jsonl]").data
    assert relative[0].path == Path("a.jsonl").absolute()
    kinds = {key: kind for key, kind, _, _ in describe_fields(RewardModelConfig)}
    assert kinds["rankings"] == "Path | list of {path, weight}"
    ids = {"model": "1", "data.0.path": "2", "data.1.path": "3"}
    other = sft("data=[/a.jsonl, {path: /b, weight: 3}]")
    moved = sft("data=[/elsewhere.jsonl, {path: /b, weight: 2}]")
    assert fingerprint("sft", config, ids) == fingerprint("sft", moved, ids) != fingerprint("sft", other, ids)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[]", "data: expected a path, or a list of {path, weight}, got \\[\\]"),
        ("3", "data: expected a path, or a list"),
        ("[{path: a, weight: 0}]", "data: item 0: weight: Input should be greater than 0"),
        ("[a, {weight: 1}]", "data: item 1: path: Field required"),
        ("[{path: a, wight: 2}]", "data: item 0: wight: Extra inputs"),
        ("[3]", "data: item 0: 3: Input should be"),
    ],
)
def test_a_bad_list_of_sources_is_named(value, message):
    with pytest.raises(InputError, match=message):
        sft(f"data={value}")


def test_a_run_records_all_its_sources(tmp_path, tiny_model_dir):
    a, b = jsonl(tmp_path / "a.jsonl", ROWS), jsonl(tmp_path / "folder" / "b.jsonl", ROWS)
    arguments = [f"run_dir={tmp_path / 'run'}", f"model={tiny_model_dir}", f"data=[{a}, {{path: {b.parent}, weight: 2}}]"]
    job = Run("sft", load_config(SftConfig, None, arguments))
    job.add_data("data", rows=10)
    (entry,) = job.record["data"]
    assert entry["name"] == "data" and entry["path"] == f"{a}, {b.parent}" and len(entry["sha256"]) == 64
    assert [parent["role"] for parent in job.record["parents"]] == ["model"]  # a folder of data is no parent
    before = job.fingerprint
    jsonl(b, ROWS[:3])
    assert Run("sft", load_config(SftConfig, None, arguments)).fingerprint != before


def test_a_folder_that_is_neither_model_nor_data_has_an_id(tmp_path):
    (tmp_path / "weights.part").write_text("half")
    before = content_id(tmp_path)
    (tmp_path / "weights.part").write_text("more")
    assert content_id(tmp_path) != before


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The data set my/set with the splits train and test, as `datasets` leaves it in its cache once it was loaded."""
    import datasets

    files = {split: str(jsonl(tmp_path / f"{split}.jsonl", ROWS[:count])) for split, count in (("train", 3), ("test", 2))}
    datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path / "build"))
    (built,) = (tmp_path / "build/json").glob("default-*/0.0.0/*/")
    target = tmp_path / "cache/my___set/default/0.0.0" / built.name
    shutil.copytree(built, target)
    for file in target.glob("*.arrow"):
        file.rename(target / file.name.replace("json-", "set-"))
    info = json.loads((target / "dataset_info.json").read_text())
    info |= {"config_name": "default", "dataset_name": "set"}
    for split in info["splits"].values():
        split["dataset_name"] = "set"
    (target / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_a_data_set_of_the_hub_is_read_from_the_cache(hub_cache, tmp_path, monkeypatch, tiny_model_dir):
    monkeypatch.chdir(tmp_path)
    arguments = [f"run_dir={tmp_path / 'run'}", f"model={tiny_model_dir}"]
    loaded = load_config(SftConfig, None, [*arguments, "data=hf://datasets/my/set"])
    path = fetch_inputs(loaded).config.data
    assert [row for _, row in iter_rows(path)] == ROWS[:3]
    several = "data=[{path: 'hf://datasets/my/set?split=test', weight: 2}, 'hf://datasets/my/set:default?split=train[1:2]']"
    config = fetch_inputs(load_config(SftConfig, None, [*arguments, several])).config
    assert [[row for _, row in iter_rows(source.path)] for source in config.data] == [ROWS[:2], ROWS[1:2]]
    assert [source.weight for source in config.data] == [2, 1]
    assert content_id(fetch(Path("hf://datasets/my/set"), key="data")) == content_id(path)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("not/there", "data: cannot fetch the data set not/there, split train: .*not/there"),
        ("my/set?split=oops", "data: cannot fetch the data set my/set, split oops: Unknown split \"oops\""),
        ("my/set:other", "Couldn't find cache for my/set for config 'other'"),
        ("my/set@v1", "the hub is out of reach, and the cache does not know revisions; leave out @v1"),
        ("my/set?spit=train", "expected hf://datasets/ORG/NAME@REVISION:CONFIG\\?split=SPLIT"),
        ("a/b/c", "expected hf://datasets/ORG/NAME"),
    ],
)  # fmt: skip
def test_a_data_set_that_cannot_be_had_is_named(hub_cache, tmp_path, monkeypatch, address, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        fetch(Path(f"hf://datasets/{address}"), key="data")


def test_a_folder_that_hides_a_data_set_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my/set").mkdir(parents=True)
    with pytest.raises(InputError, match="data: .*my/set exists and hides the data set my/set"):
        fetch(Path("hf://datasets/my/set"), key="data")
