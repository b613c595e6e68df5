"""What is wrong with data or a tokenizer is told at the door: damaged files, empty and over-long prompts, odd text."""

from __future__ import annotations

import copy
import json
import random
import shutil
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import processors

from rayllm.data.batching import BatchOrder
from rayllm.data.chat import check_chat_template, encode_conversation, prompt_token_ids, read_conversations
from rayllm.data.files import check_data_file, read_rows, write_parquet
from rayllm.data.preferences import read_rankings
from rayllm.data.prompts import PromptStream, read_prompts
from rayllm.data.rows import RowError
from rayllm.data.tokenizer import CHAT_TEMPLATE
from rayllm.errors import InputError
from rayllm.models.folders import check_same_tokens, load_tokenizer
from rayllm.models.loading import create_causal_lm, save_model
from rayllm.report.terminal import printable
from tests.conftest import TINY_SHAPE


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path):
    return list(read_rows(path, ["text"]))


# R38


@pytest.mark.scorecard("R38")
def test_no_flipped_bit_of_our_parquet_files_gives_other_rows(tmp_path, seen):
    rows = [{"text": f"Row {n}: the colour of thing {n * 7919 % 101}.", "n": n} for n in range(400)]
    path = tmp_path / "d.parquet"
    write_parquet(rows, path)
    whole, rng = path.read_bytes(), random.Random(0)
    told = 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert rows_of(path) == rows  # of what no row depends on
        except InputError as error:
            told += 1
            assert str(path) in str(error)
    assert told > 300
    seen(f"of 400 files with a flipped bit {told} were refused by name, the others had the same rows")


@pytest.mark.scorecard("R38")
def test_a_file_that_is_cut_or_empty_is_named(tmp_path):
    path, other = tmp_path / "d.parquet", tmp_path / "other.parquet"
    write_parquet([{"text": "a" * 50}] * 300, path)
    pq.write_table(pa.table({"text": ["a"] * 300}), other)  # another writer's, without checksums
    for file in (path, other):
        whole = file.read_bytes()
        for length in (0, 1, 4, 11, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:length])
            with pytest.raises(InputError, match=str(file)):
                rows_of(file)
            with pytest.raises(InputError, match=f"^data: {file}"):
                check_data_file(file, key="data")


# R40, R41, R42, R43


@pytest.mark.scorecard("R40")
@pytest.mark.parametrize("prompt", ["", " \t\n", "\u00a0\u2003", [], [{"role": "user", "content": "  "}]])
def test_a_prompt_that_says_nothing_is_refused_by_its_line(tmp_path, tiny_tokenizer, prompt):
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "fine"}, {"prompt": prompt}])
    with pytest.raises(InputError, match=r"p.jsonl:2: prompt.*: (is empty|must be)"):
        read_prompts(path, tiny_tokenizer, max_prompt_tokens=64)


@pytest.mark.scorecard("R40")
def test_a_prompt_that_the_template_swallows_is_refused(tmp_path, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{% if m['content'] != 'secret' %}{{ m['content'] }}{% endif %}{% endfor %}"
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "fine"}, {"prompt": "secret"}])
    with pytest.raises(InputError, match=r"p.jsonl:2: prompt: the chat template makes nothing of it"):
        read_prompts(path, tokenizer, max_prompt_tokens=64)


@pytest.mark.scorecard("R41")
def test_a_prompt_just_fits_or_is_left_out_and_counted(tmp_path, tiny_tokenizer, seen):
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": [5] * length} for length in (9, 10, 11, 500)])
    data = read_prompts(path, tiny_tokenizer, max_prompt_tokens=10)
    assert [len(ids) for ids in data.token_ids] == [9, 10]
    assert data.dropped == {"longer than 10 tokens": 2}
    with pytest.raises(InputError, match="no prompt of at most 8 tokens"):
        read_prompts(path, tiny_tokenizer, max_prompt_tokens=8)
    numbered = jsonl(tmp_path / "n.jsonl", [{"prompt": list(range(length))} for length in (10, 12)])
    cut = read_prompts(numbered, tiny_tokenizer, max_prompt_tokens=10, long_prompts="cut")
    assert cut.token_ids == [list(range(10)), list(range(2, 12))]
    assert (cut.facts["cut"], cut.dropped) == (1, {})
    with pytest.raises(InputError, match=r"n.jsonl:2: prompt: has 12 tokens, 10 fit; see rollout.long_prompts"):
        read_prompts(numbered, tiny_tokenizer, max_prompt_tokens=10, long_prompts="stop")
    seen("at load 2 of 4 left out and counted, or cut, or refused, as set; one fills the room to the last token")


@pytest.mark.scorecard("R42")
def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tmp_path, tiny_tokenizer):
    larger = copy.deepcopy(tiny_tokenizer)
    save_model(create_causal_lm("qwen3", tiny_tokenizer, TINY_SHAPE, seed=0), tiny_tokenizer, tmp_path)
    assert len(load_tokenizer(tmp_path)) == len(tiny_tokenizer)
    larger.add_tokens(["<new>"])
    larger.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"the tokenizer has token {len(tiny_tokenizer)}, the model has embeddings for"):
        load_tokenizer(tmp_path)


def copied(folder, to, name, change):
    """A copy with another JSON file of this name."""
    shutil.copytree(folder, to)
    (to / name).write_text(json.dumps(change(json.loads((to / name).read_text()))))
    return to


@pytest.mark.scorecard("R42")
def test_a_reward_model_that_reads_other_tokens_is_refused(tmp_path, tiny_tokenizer, tiny_model_dir):
    from rayllm.data.tokenizer import train_tokenizer

    other = train_tokenizer(["Quite other words are in here."] * 4, vocab_size=300, max_length=512)
    save_model(create_causal_lm("qwen3", other, TINY_SHAPE, seed=0), other, tmp_path)
    check_same_tokens(tiny_model_dir, tiny_model_dir, key="reward_model")
    again = copied(tiny_model_dir, tmp_path / "again", "tokenizer_config.json", lambda config: config | {"note": "ours"})
    check_same_tokens(tiny_model_dir, again, key="reward_model")
    small = copied(tiny_model_dir, tmp_path / "small", "config.json", lambda config: config | {"vocab_size": 8})
    with pytest.raises(InputError, match="the model has embeddings for 8: they are not of one model"):
        check_same_tokens(tiny_model_dir, small, key="reward_model")
    with pytest.raises(InputError, match=r"^reward_model: .* has another tokenizer than model="):
        check_same_tokens(tiny_model_dir, tmp_path, key="reward_model")


@pytest.mark.scorecard("R43")
def test_equal_prompts_keep_their_own_ids_and_are_counted(tmp_path, tiny_tokenizer):
    from rayllm.algorithms.advantages import group_advantages
    from rayllm.data.scores import sample_ids_of

    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "hi", "k": k} for k in (1, 2)] + [{"prompt": "you", "k": 3}])
    data = read_prompts(path, tiny_tokenizer, max_prompt_tokens=64)
    assert [row["k"] for row in data.rows] == [1, 2, 3] and data.facts["duplicates"] == 1
    assert data.token_ids[0] == data.token_ids[1]
    import torch

    ids = torch.tensor([0, 0, 1, 1])
    advantages = group_advantages(torch.tensor([0.0, 2.0, 10.0, 12.0]), ids, kind="dr_grpo")
    assert advantages.tolist() == [-1.0, 1.0, -1.0, 1.0]  # by id: as one group it would be -6, -4, 4, 6
    assert sample_ids_of(ids) == ("0/0", "0/1", "1/0", "1/1")


# R44


ODD = {
    "nul": "before\x00after",
    "right to left": "\u202eabc\u202c שלום \u200f",
    "emoji": "👩\u200d👩\u200d👧 🏳️\u200d🌈",
    "composed": unicodedata.normalize("NFC", "é ñ Å"),
    "decomposed": unicodedata.normalize("NFD", "é ñ Å"),
    "line separators": "a\u2028b\u2029c\x85d",
    "escape": "\x1b[2J\x1b]0;title\x07red",
    "no character": "\ufffe\uffff\U0010ffff",
    "a line of 1 MB": "x" * (1 << 20),
}


@pytest.mark.scorecard("R44")
@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet", "d.csv", "d.json"])
def test_odd_text_comes_back_as_it_was(tmp_path, name):
    path = tmp_path / name
    rows = [{"text": text} for text in ODD.values()]
    if name == "d.parquet":
        write_parquet(rows, path)
    elif name == "d.csv":
        path.write_text("text\n" + "".join(f'"{row["text"]}"\n' for row in rows), newline="")
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) if name == "d.jsonl" else f"[{','.join(lines)}]")
    assert [row["text"] for row in rows_of(path)] == list(ODD.values())


@pytest.mark.scorecard("R44")
def test_odd_text_survives_the_tokenizer_and_lone_surrogates_are_refused(tmp_path, tiny_tokenizer):
    for name, text in ODD.items():
        ids = tiny_tokenizer.encode(text[:2000], add_special_tokens=False)
        assert tiny_tokenizer.decode(ids) == text[:2000], name
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "half \\ud800"}\n')
    from rayllm.data.text import tokenize_documents

    with pytest.raises(InputError, match=r"d.jsonl:2: text: holds half a character"):
        tokenize_documents(path, tiny_tokenizer)


@pytest.mark.scorecard("R44", "S14")
def test_no_text_of_a_file_reaches_the_terminal_as_a_command(tmp_path, capsys, tiny_model_dir):
    from jobs.cli import main

    for name, text in ODD.items():
        shown = printable(text)
        assert not any(unicodedata.category(c) == "Cc" and c not in "\n\t" for c in shown), name
        assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"), name
    assert printable("half \ud800") == "half ?"
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps({"\x1b[2Jcolumn": "x", "\u202eother": 1}) + "\n")
    with pytest.raises(SystemExit) as stopped:
        main(["sft", f"run_dir={tmp_path / 'run'}", f"model={tiny_model_dir}", f"data={data}"])
    out = capsys.readouterr().out
    assert stopped.value.code == 2 and "column" in out
    assert "\x1b[2J" not in out and "\u202e" not in out


@pytest.mark.scorecard("R44")
def test_odd_text_in_a_runs_notes_is_one_line_of_json(tmp_path):
    from rayllm.config.base import load_config
    from rayllm.config.tokenizer import TokenizerConfig
    from rayllm.report.run import Run

    documents = jsonl(tmp_path / "d.jsonl", [{"text": "a"}])
    run = Run("tokenizer", load_config(TokenizerConfig, None, [f"run_dir={tmp_path / 'run'}", f"documents={documents}"]))
    with run:
        for text in ODD.values():
            run.note(text)
        run.describe(odd=list(ODD.values()))
    lines = (tmp_path / "run/events.jsonl").read_bytes().split(b"\n")[:-1]
    assert [json.loads(line)["text"] for line in lines] == list(ODD.values())
    assert json.loads((tmp_path / "run/run.json").read_text())["odd"] == list(ODD.values())


# R45


def saved(tmp_path, tokenizer, **changes):
    """A folder with this tokenizer, its configuration changed; None takes a key away."""
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return tmp_path


@pytest.mark.scorecard("R45")
def test_a_tokenizer_without_padding_gets_its_own_and_without_an_end_is_refused(tmp_path, tiny_tokenizer):
    found = load_tokenizer(saved(tmp_path / "pad", tiny_tokenizer, pad_token=None))
    assert found.pad_token_id is not None and found.pad_token_id != found.eos_token_id
    with pytest.raises(InputError, match="the tokenizer has no eos_token; set one in tokenizer_config.json"):
        load_tokenizer(saved(tmp_path / "eos", tiny_tokenizer, eos_token=None))


@pytest.mark.scorecard("R45")
def test_a_missing_template_is_named_with_its_cure(tmp_path, tiny_tokenizer):
    talk = jsonl(tmp_path / "d.jsonl", [{"prompt": "hi", "response": "yes"}])
    ranked = jsonl(tmp_path / "r.jsonl", [{"prompt": "hi", "chosen": "yes", "rejected": "no"}])
    bare = with_template(tiny_tokenizer, None)
    for read in (
        lambda: read_conversations(talk, bare, max_length=64),
        lambda: read_rankings(ranked, bare, max_length=64),
        lambda: read_prompts(talk, bare, max_prompt_tokens=64),
        lambda: check_chat_template(bare, "folder"),
    ):
        with pytest.raises(InputError, match="has no chat template; add chat_template.jinja to the folder"):
            read()


UNMARKED = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TALK = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "yes?"}, {"role": "assistant", "content": " ☃ two\n\nlines, yes "},
]  # fmt: skip


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def trained(tokenizer, messages):
    example = encode_conversation(tokenizer, messages)
    return tokenizer.decode(example.token_ids[example.loss_mask])


@pytest.mark.scorecard("R45")
def test_a_template_without_marks_trains_the_same_tokens(tiny_tokenizer):
    marked, unmarked = tiny_tokenizer, with_template(tiny_tokenizer, UNMARKED)
    for talk in (TALK, TALK[:3], TALK[1:3], TALK[1:], [*TALK[:4], {"role": "assistant", "content": ""}]):
        expected, found = (encode_conversation(tokenizer, talk) for tokenizer in (marked, unmarked))
        assert found.loss_mask.any() and found.token_ids.tolist() == expected.token_ids.tolist()
        assert found.loss_mask.tolist() == expected.loss_mask.tolist()
    none = encode_conversation(unmarked, TALK[:2])
    assert len(none.token_ids) == 0


@pytest.mark.scorecard("R45")
def test_blanks_are_trained_where_the_tokenizer_leaves_them_out_of_its_offsets(tiny_tokenizer):
    talk = [TALK[1], {"role": "assistant", "content": "  yes\n        x\n    y"}]
    expected = encode_conversation(tiny_tokenizer, talk)
    trims = with_template(tiny_tokenizer, UNMARKED)
    trims.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    found = encode_conversation(trims, talk)
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert found.loss_mask.tolist() == expected.loss_mask.tolist()


@pytest.mark.scorecard("R45")
def test_a_template_that_drops_what_was_thought_or_adds_a_system_turn_is_understood(tiny_tokenizer):
    thinking = (  # of earlier turns nothing is left, as with Qwen3's
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
        "{% endif %}{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    said = "yes<|im_end|><think>\n\n</think>\n\n☃ two\n\nlines, yes<|im_end|>"
    assert trained(with_template(tiny_tokenizer, thinking), TALK) == said
    in_brackets = "{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]{% else %} {{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    assert trained(with_template(tiny_tokenizer, in_brackets), TALK[1:3]) == " yes<|im_end|>"


@pytest.mark.scorecard("R45")
def test_a_template_that_does_not_show_what_the_assistant_says_is_refused_with_its_cure(tmp_path, tiny_tokenizer):
    talk = jsonl(tmp_path / "d.jsonl", [{"prompt": "hi", "response": "yes"}])
    for template in (
        UNMARKED.replace("<|im_end|>", "<end>"),  # it would not learn to stop
        UNMARKED.replace("<|im_start|>assistant", "<|im_start|>model"),  # it would be asked for what it did not learn
        UNMARKED.replace("message['content'] + '<|im_end|>' }}", "'<|im_end|>' + message['content'] }}"),
    ):
        tokenizer = with_template(tiny_tokenizer, template)
        with pytest.raises(InputError, match=r"d.jsonl:1: messages: the chat template does not show .*generation %\}"):
            read_conversations(talk, tokenizer, max_length=64)
        with pytest.raises(InputError, match="folder: the chat template does not show .* let eos_token in"):
            check_chat_template(tokenizer, "folder")
    check_chat_template(with_template(tiny_tokenizer, UNMARKED), "folder")


@pytest.mark.scorecard("R45")
def test_a_template_that_ends_the_conversation_and_not_the_turn_is_refused(tiny_tokenizer):
    """Between two turns of the assistant there is no end of its own: the user's words would be trained."""
    once = "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    tokenizer = with_template(tiny_tokenizer, UNMARKED.replace("<|im_end|>", "<end>") + once)
    assert trained(tokenizer, TALK[:3]) == "yes<end>\n<|im_end|>"
    assert trained(tokenizer, TALK[:4]) == "yes<end>\n<|im_end|>"  # the user's last word is not there
    with pytest.raises(RowError, match="does not show which tokens are the assistant's"):
        trained(tokenizer, TALK)
    with pytest.raises(InputError, match="folder: the chat template does not show"):
        check_chat_template(tokenizer, "folder")


@pytest.mark.scorecard("R45")
def test_where_the_tokenizer_and_the_template_both_add_a_start_token_there_is_one(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    start = "<|im_start|>"
    start_id = tokenizer.convert_tokens_to_ids(start)
    tokenizer.bos_token = start
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, start_id)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE.replace("<|im_start|>", "# ")
    assert tokenizer("hi")["input_ids"][0] == start_id  # it does add one to plain text
    user, said = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
    prompt = prompt_token_ids(tokenizer, [user])
    whole = encode_conversation(tokenizer, [user, said]).token_ids.tolist()
    assert prompt[0] == start_id and prompt.count(start_id) == 1 and whole.count(start_id) == 1
    assert whole[: len(prompt)] == prompt


# R46, R48


@pytest.mark.scorecard("R46")
def test_every_size_of_data_against_a_batch_is_defined(tmp_path, tiny_tokenizer):
    for rows in (0, 1, 3):
        with pytest.raises(ValueError, match=f"{rows} rows do not fill one batch of 4"):
            BatchOrder(rows, 4, seed=0)
    assert sorted(BatchOrder(4, 4, seed=0).rows(0).tolist()) == [0, 1, 2, 3]
    order = BatchOrder(9, 4, seed=0)  # two whole batches an epoch, the ninth row in another epoch
    epochs = [np.concatenate([order.rows(2 * epoch + i) for i in range(2)]) for epoch in range(12)]
    assert all(len(set(epoch.tolist())) == 8 for epoch in epochs)
    assert set(np.concatenate(epochs).tolist()) == set(range(9))
    assert BatchOrder(1, 1, seed=0).rows(5).tolist() == [0]
    stream = PromptStream(5, seed=0)
    spans = [stream.take(2) for _ in range(3)]
    assert [(span.epoch, span.start) for span in spans] == [(0, 0), (0, 2), (1, 0)]
    empty = tmp_path / "p.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(InputError, match="no prompt of at most"):
        read_prompts(empty, tiny_tokenizer, max_prompt_tokens=9)


@pytest.mark.scorecard("R46")
def test_jobs_say_how_many_rows_they_need(local_ray, tmp_path, capsys, tiny_model_dir):
    from jobs.cli import main

    data = jsonl(tmp_path / "d.jsonl", [{"prompt": f"q{n}", "response": "yes"} for n in range(3)])
    for job, key, message in (
        ("sft", "data", "batch_size=16 needs at least 16 and 1"),
        ("ppo", "prompts", "has 3 usable prompts, prompts_per_step=96 needs at least that many"),
    ):
        with pytest.raises(SystemExit) as stopped:
            more = ["reward.source=environment", "environment.name=calculator"] if job == "ppo" else []
            main([job, f"run_dir={tmp_path / job}", f"model={tiny_model_dir}", f"{key}={data}", *more])
        assert stopped.value.code == 2 and message in " ".join(capsys.readouterr().out.split())


@pytest.mark.scorecard("R48")
def test_rankings_of_every_size_have_a_rule(tmp_path, tiny_tokenizer, seen):
    nine = {"prompt": "q", "responses": [f"r{n}" for n in range(9)], "ranks": list(range(9))}
    tied = {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [0, 0, 1]}
    level = {"prompt": "q", "responses": ["a", "b"], "ranks": [3, 3]}
    data = read_rankings(jsonl(tmp_path / "r.jsonl", [nine, tied, level]), tiny_tokenizer, max_length=64)
    assert [ranking.num_pairs for ranking in data.rankings] == [36, 2]
    assert data.dropped == {"no pair with a better response": 1}
    for spoiled, message in (
        ({**nine, "responses": ["a"], "ranks": [0]}, "responses: must be a list of at least two texts"),
        ({**nine, "ranks": None}, "ranks: missing"),
        ({**nine, "ranks": [0]}, "ranks: 9 responses but 1 ranks"),
        ({"prompt": "q", "chosen": "same", "rejected": "same"}, "rejected: equal to chosen"),
    ):
        with pytest.raises(InputError, match=f"r.jsonl:1: {message}"):
            read_rankings(jsonl(tmp_path / "r.jsonl", [spoiled]), tiny_tokenizer, max_length=64)
    seen("nine make 36 pairs, a tie none between its own, all level is left out and counted; one or none is refused")
