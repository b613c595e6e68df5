"""What people have becomes one schema: rows by hand, bad rows by file, line, field and reason."""

from __future__ import annotations

import random

import pytest

from rayllm.data.files import iter_rows
from rayllm.data.formats import detect
from rayllm.data.preferences import read_feedback, read_rankings
from rayllm.data.rows import RowDropped, RowError
from rayllm.data.sources import Reader
from rayllm.errors import InputError
from tests.rayllm.bad_rows import GOOD, KINDS, assistant, lines, user


def convert(row, schema):
    found = detect(row, schema)
    return found.name, found.convert(row)


SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    ("row", "name", "messages"),
    [
        ({"messages": [SYSTEM, user("a"), assistant("b")]}, "OpenAI messages", [SYSTEM, user("a"), assistant("b")]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": None}, assistant("b")]},
            "OpenAI messages",
            [user("a"), assistant("b")],
        ),
        (
            {"id": 1, "conversations": [
                {"from": "system", "value": "Be kind."}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
            ]},
            "ShareGPT",
            [SYSTEM, user("a"), assistant("b")],
        ),
        ({"prompt": "a", "completion": "b"}, "prompt and completion", [user("a"), assistant("b")]),
        ({"prompt": "a", "response": "b", "completion": None}, "prompt and completion", [user("a"), assistant("b")]),
        (
            {"prompt": [SYSTEM, user("a")], "completion": [assistant("b")]},
            "prompt and completion",
            [SYSTEM, user("a"), assistant("b")],
        ),
        ({"instruction": "a", "input": "x", "output": "b"}, "Alpaca", [user("a\n\nx"), assistant("b")]),
        ({"instruction": "a", "input": "", "output": "b"}, "Alpaca", [user("a"), assistant("b")]),
        ({"question": "a", "answer": "b"}, "question and answer", [user("a"), assistant("b")]),
    ],
)  # fmt: skip
def test_conversations(row, name, messages):
    assert convert(row, "conversation") == (name, {"messages": messages})


TALK = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
TALKED = [user("a"), assistant("b"), user("c")]


@pytest.mark.parametrize(
    ("row", "name", "prompt", "responses", "ranks", "scores"),
    [
        ({"prompt": "a", "responses": ["x", "y", "z"], "ranks": [1, 0, 1]}, "rankings",
         [user("a")], ["x", "y", "z"], [1, 0, 1], None),
        ({"prompt": "a", "responses": ["x", "y", "z"], "scores": [1, 2.5, 1]}, "scored responses",
         [user("a")], ["x", "y", "z"], [1, 0, 1], [1.0, 2.5, 1.0]),
        ({"prompt": "a", "chosen": " x", "rejected": "y\n", "margin": 0.5}, "preference pairs",
         [user("a")], ["x", "y"], [0, 1], [0.5, 0.0]),
        ({"prompt": [user("a")], "chosen": [assistant("x")], "rejected": [assistant("y")]}, "preference pairs",
         [user("a")], ["x", "y"], [0, 1], None),
        # binarised UltraFeedback: the prompt's text, and whole conversations with their scores
        ({"prompt": "a", "chosen": [user("a"), assistant("x")], "rejected": [user("a"), assistant("y")],
          "messages": [user("a"), assistant("x")], "score_chosen": 8.5, "score_rejected": 8.5}, "preference pairs",
         [user("a")], ["x", "y"], [0, 1], [8.5, 8.5]),
        ({"chosen": [*TALKED, assistant("x")], "rejected": [*TALKED, assistant("y")]}, "preference pairs, implicit prompt",
         TALKED, ["x", "y"], [0, 1], None),
        # the texts part inside a word: the prompt ends before it
        ({"chosen": "The sky is blue.", "rejected": "The sky is black."}, "preference pairs, implicit prompt",
         [user("The sky is")], ["blue.", "black."], [0, 1], None),
        ({"chosen": TALK + "x", "rejected": TALK + "y"}, "Anthropic HH", TALKED, ["x", "y"], [0, 1], None),
        # one speaker's turns that follow each other are one
        ({"chosen": TALK + "x\n\nAssistant: z", "rejected": TALK + "y"}, "Anthropic HH",
         TALKED, ["x\n\nz", "y"], [0, 1], None),
        ({"chosen": " " + TALK.strip().replace("\n", "\r\n") + " x", "rejected": TALK.lstrip() + "y"}, "Anthropic HH",
         TALKED, ["x", "y"], [0, 1], None),
        ({"prompt": TALK, "chosen": "x", "rejected": "y"}, "preference pairs", TALKED, ["x", "y"], [0, 1], None),
        ({"instruction": "a", "completions": [
            {"response": "x", "overall_score": 2.0, "fine-grained_score": 5.0}, {"response": "y", "overall_score": 7},
            {"response": "z", "overall_score": 2}]}, "scored completions",
         [user("a")], ["x", "y", "z"], [1, 0, 1], [2.0, 7.0, 2.0]),
        ({"prompt": "a", "completions": [
            {"response": "x", "annotations": {"honesty": {"Rating": "4"}, "truthfulness": {"Rating": "N/A"},
                                              "helpfulness": {"Rating": "1"}}},
            {"response": "y", "fine-grained_score": 4.25}]}, "scored completions",
         [user("a")], ["x", "y"], [1, 0], [2.5, 4.25]),
    ],
)  # fmt: skip
def test_rankings(row, name, prompt, responses, ranks, scores):
    found, ranking = convert(row, "ranking")
    assert found == name
    assert (ranking["prompt"], ranking["responses"], ranking["ranks"]) == (prompt, responses, ranks)
    assert ranking["scores"] == scores


@pytest.mark.scorecard("S23")
def test_what_is_known_of_a_ranking_is_kept():
    row = {"prompt": "a", "responses": ["", " "], "ranks": [0, 1], "response_ids": [[2], [5, 2]], "labeler": "ana",
           "criteria": "honest", "subset": "chat", "scores": None, "seconds": 3}  # fmt: skip
    _, ranking = convert(row, "ranking")
    assert ranking == {
        "prompt": [user("a")], "responses": ["", " "], "ranks": [0, 1], "response_ids": [[2], [5, 2]], "labeler": "ana",
        "criteria": "honest", "category": "chat", "scores": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": TALK, "rejected": TALK + "y"}, "an answer without words"),
        ({"chosen": TALK.replace(" b", " ") + "x", "rejected": TALK.replace(" b", " ") + "y"}, "once said nothing"),
        ({"chosen": TALK + "x", "rejected": "\n\nHuman: a\n\nAssistant: z"}, "part before the last turn"),
        (
            {"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("y")]},
            "part before the last turn",
        ),
    ],
)
@pytest.mark.scorecard("R48")
def test_a_pair_that_is_no_use_is_dropped_and_not_bad(row, reason):
    with pytest.raises(RowDropped, match=reason):
        convert(row, "ranking")


def test_feedback_single_and_of_rankings():
    row = {"prompt": "a", "completion": [assistant("x")], "label": False}
    assert convert(row, "feedback")[1] == {
        "prompt": [user("a")], "responses": ["x"], "response_ids": None, "desirable": [False]
    }  # fmt: skip
    row = {"prompt": "a", "responses": ["x", "y", "z", ""], "ranks": [1, 0, 2, 0], "response_ids": [[4], [5], [6], [7]]}
    found = convert(row, "feedback")[1]
    assert (found["responses"], found["desirable"]) == (["y", "z", ""], [True, False, True])
    assert found["response_ids"] == [[5], [6], [7]]
    row = {"chosen": TALK + "x", "rejected": TALK + "y"}
    name, found = convert(row, "feedback")
    assert name == "Anthropic HH" and (found["prompt"], found["desirable"]) == (TALKED, [True, False])


@pytest.mark.parametrize(
    ("answer", "number"), [("2*2=4\n#### 4", "4"), ("#### 1,250", "1250"), ("x ####-3.50 ", "-3.50"), ("#### $7", "7")]
)
def test_gsm8k_rows_are_prompts_with_a_final_number(answer, number):
    name, row = convert({"question": "How many?", "answer": answer, "id": 3}, "prompt")
    expected = {"prompt": "How many?", "question": "How many?", "answer": number, "solution": answer, "id": 3}
    assert (name, row) == ("GSM8K", expected)


def test_prompts_keep_their_columns():
    assert convert({"prompt": "a", "answer": "b"}, "prompt") == ("prompts", {"prompt": "a", "answer": "b"})
    assert convert({"prompt": TALK, "k": 1}, "prompt")[1] == {"prompt": TALKED, "k": 1}
    row = {"messages": [*TALKED, assistant("x")], "k": 1}
    assert convert(row, "prompt") == ("OpenAI messages", {**row, "prompt": TALKED})


def test_a_row_that_no_format_knows_is_told_what_is_known():
    with pytest.raises(RowError, match="columns: no format is known by body, id; a ranking row needs one of: prompt, "):
        detect({"body": "x", "id": 3, "prompt": None}, "ranking")


def check(path, found, schema):
    """Every bad row is named, every other one is read."""
    reader = Reader(path, schema, max_bad_rows=len(found))
    assert len(list(reader.rows(lambda row: row))) == sum(line.kind is None for line in found)
    spoiled = [(number, line.kind) for number, line in enumerate(found, start=1) if line.kind]
    assert len(reader.bad.found) == len(spoiled)
    for bad, (number, kind) in zip(reader.bad.found, spoiled, strict=True):
        assert bad.place == (path, number, "line"), kind.name
        assert bad.field == kind.field, kind.name
        assert bad.reason.startswith(kind.reason), (kind.name, bad.reason)
        assert str(bad).startswith(f"{path}:{number}: {kind.field}: {kind.reason}")
    return len(spoiled)


@pytest.mark.scorecard("R39")
def test_every_bad_row_of_a_thousand_is_named(tmp_path):
    assert len(KINDS) >= 25
    total = 0
    for name, found in lines(1000, seed=0):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(line.text + "\n" for line in found))
        total += check(path, found, GOOD[name][0])
        with pytest.raises(InputError) as error:  # the same file with the usual bound
            list(Reader(path, GOOD[name][0]).rows(lambda row: row))
        first = next(number for number, line in enumerate(found, start=1) if line.kind)
        assert str(error.value).startswith(f"{path}:{first}: ")
    assert total == 1000


WICKED = [None, True, 0, -1, 10**400, 1e308, float("nan"), "", " ", "\ud800", "Human:", "x" * 9, [], [[]], {}, [{}], [None], [0]]


def spoiled(value, rng):
    """``value`` with something wicked at a random depth."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        return {**value, key: spoiled(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        index = rng.randrange(len(value))
        return [spoiled(item, rng) if at == index else item for at, item in enumerate(value)]
    return rng.choice(WICKED)


@pytest.mark.scorecard("R39")
def test_whatever_a_row_holds_it_is_read_or_refused_by_name():
    rng = random.Random(0)
    refused = 0
    for index in range(6_000):
        schema, good = GOOD[sorted(GOOD)[index % len(GOOD)]]
        row = good(index)
        for _ in range(rng.randrange(1, 4)):
            row = {**row, (key := rng.choice(list(row))): spoiled(row[key], rng)}
        extra = rng.choice(["prompt", "chosen", "scores", "margin", "labeler", "input", "response_ids", "subset"])
        row = {**row, extra: rng.choice(WICKED)} if rng.random() < 0.3 else row
        try:
            _, found = convert(row, schema)
            messages = found["messages"] if schema == "conversation" else found["prompt"]
            assert all(m["content"].strip() for m in messages if isinstance(m, dict))
            assert all(type(token) is int for token in messages if not isinstance(token, str | dict))
        except RowError as error:
            refused += 1
            assert error.field and len(str(error)) < 400
        except RowDropped:
            pass
    assert refused > 3_000


@pytest.mark.scorecard("R39")
def test_one_bad_row_too_many_ends_the_reading_and_names_the_first(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = ['{"prompt": "a", "completion": "b"}'] + ['{"prompt": "a", "completion": ""}'] * 8
    path.write_text("\n".join(rows))
    reader = Reader(path, "conversation", max_bad_rows=8)
    assert len(list(reader.rows(lambda row: row))) == 1
    facts = reader.facts()
    assert facts["bad_rows"] == 8 and len(facts["first_bad_rows"]) == 5
    assert facts["first_bad_rows"][0] == f"{path}:2: completion: is empty"
    with pytest.raises(InputError, match=r"more than max_bad_rows=6 bad rows:\n.*d.jsonl:2: completion: is empty\n(.*\n)*and 2 more"):
        list(Reader(path, "conversation", max_bad_rows=6).rows(lambda row: row))


@pytest.mark.scorecard("R39")
def test_bad_rows_of_csv_parquet_and_json_are_named_too(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    csv = tmp_path / "d.csv"
    csv.write_bytes(
        b'prompt,completion,label\na,"two\nlines",true\nb,c\nd,,true\ne,\xff,False\nf,g,1\nh,i,yes\nj,k,FALSE\n'
    )
    reader = Reader(csv, "feedback", max_bad_rows=9)
    rows = [row for _, row in reader.rows(lambda row: row)]
    assert [row["responses"] for row in rows] == [["two\nlines"], ["k"]]
    assert [str(bad).removeprefix(f"{csv}:") for bad in reader.bad.found] == [
        "4: row: 2 cells under 3 columns",
        "5: completion: missing, and no 'response'; the row holds label, prompt (read as unpaired feedback)",
        "6: completion: holds half a character ('\\udcff'): not valid Unicode",
        "7: label: must be true or false, got 1",
        "8: label: not valid JSON in this cell: Expecting value: line 1 column 1 (char 0)",
    ]
    parquet = tmp_path / "d.parquet"
    pq.write_table(pa.table({"prompt": ["a", None, "c"], "completion": ["x", "y", " "]}), parquet)
    reader = Reader(parquet, "conversation", max_bad_rows=2)
    assert len(list(reader.rows(lambda row: row))) == 1
    assert [(bad.place.number, bad.place.unit, bad.field) for bad in reader.bad.found] == [
        (1, "row", "prompt"), (2, "row", "completion")
    ]  # fmt: skip
    broken = pa.Array.from_buffers(pa.string(), 2, [None, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff")])
    with pa.ipc.new_file(str(tmp_path / "d.arrow"), pa.schema([("prompt", pa.string())])) as file:
        file.write_batch(pa.record_batch([broken], names=["prompt"]))
    found = [row for _, row in iter_rows(tmp_path / "d.arrow")]
    assert found[0] == {"prompt": "a"} and str(found[1]).startswith("prompt: not valid UTF-8")
    whole = tmp_path / "d.json"
    whole.write_text('[{"prompt": "a", "completion": "b"}, {"prompt": "a"}]')
    reader = Reader(whole, "conversation", max_bad_rows=1)
    assert len(list(reader.rows(lambda row: row))) == 1 and str(reader.bad.found[0]).startswith(f"{whole}: row 1: completion")


STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_conversation_that_the_template_forbids_is_a_bad_row(tmp_path, tiny_tokenizer):
    import copy
    import json

    from rayllm.data.chat import read_conversations
    from rayllm.data.prompts import read_prompts

    strict = copy.deepcopy(tiny_tokenizer)
    strict.chat_template = STRICT
    path = tmp_path / "d.jsonl"
    twice = {"messages": [user("a"), user("b"), assistant("c")]}
    path.write_text(json.dumps({"messages": [user("a"), assistant("c")]}) + "\n" + json.dumps(twice) + "\n")
    assert len(read_conversations(path, tiny_tokenizer, max_length=64).examples) == 2
    with pytest.raises(InputError, match=r"d.jsonl:2: messages: the chat template refuses them: roles must alternate"):
        read_conversations(path, strict, max_length=64)
    with pytest.raises(InputError, match=r"d.jsonl:2: prompt: the chat template refuses it: roles must alternate"):
        read_prompts(path, strict, max_prompt_tokens=64)


def test_rankings_and_feedback_encode_to_the_same_tokens(tmp_path, tiny_tokenizer):
    import json

    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"chosen": TALK + "x", "rejected": TALK + "y" * 200}) + "\n")
    rankings = read_rankings(path, tiny_tokenizer, max_length=512)
    feedback = read_feedback(path, tiny_tokenizer, max_length=512)
    (ranking,) = rankings.rankings
    assert [e.sequence.tolist() for e in feedback.examples] == [s.tolist() for s in ranking.sequences]
    assert [e.desirable for e in feedback.examples] == [True, False]
    prompt = tiny_tokenizer.decode(ranking.sequences[0][: ranking.num_prompt_tokens])
    assert prompt.endswith("user\nc<|im_end|>\n<|im_start|>assistant\n")
    assert {e.num_prompt_tokens for e in feedback.examples} == {ranking.num_prompt_tokens}
    assert feedback.origins.prompts == ["a", "a"] and rankings.origins.prompts == ["a"]
    short = read_feedback(path, tiny_tokenizer, max_length=80)
    assert [e.desirable for e in short.examples] == [True] and short.dropped == {"response longer than max_length": 1}
    assert len(short.origins.prompts) == 1
    assert read_rankings(path, tiny_tokenizer, max_length=80).dropped == {
        "response longer than max_length": 1, "no pair with a better response": 1
    }  # fmt: skip
