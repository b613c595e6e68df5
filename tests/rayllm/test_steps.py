"""Labelled steps: where they end, and which rows cannot be used."""

from __future__ import annotations

import json

import pytest

from rayllm.data.steps import StepFinder, read_steps
from rayllm.errors import InputError


@pytest.fixture
def finder(tiny_tokenizer):
    return StepFinder(tiny_tokenizer, "\n")


def pieces(tokenizer, ids, ends):
    """The texts of the steps that ``ends`` cut out."""
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [tokenizer.decode(ids[a : b + 1], skip_special_tokens=True) for a, b in zip(starts, ends, strict=True)]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("one\ntwo\nthree", ["one\n", "two\n", "three"]), ("one", ["one"]), ("one\n", ["one\n"]), ("", []), ("\n\n", []),
        ("one\n\n two", ["one\n", "\n two"]), ("\none\n", ["\none\n"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stopped", [True, False])
def test_a_step_ends_at_the_separator_or_with_the_response(finder, tiny_tokenizer, text, steps, stopped):
    ids = tiny_tokenizer.encode(text) + [tiny_tokenizer.eos_token_id] * stopped
    ends = finder.ends(ids)
    assert pieces(tiny_tokenizer, ids, ends) == steps if ends else not steps


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_are_encoded_with_the_prompt_and_labels_stand_at_the_ends(tmp_path, tiny_tokenizer):
    row = {"prompt": "What colour is snow?", "completions": ["Snow is cold.", "So it is white."], "labels": [True, False]}
    path = write(
        tmp_path / "steps.jsonl", row, {**row, "completions": ["two\nlines", "b"]}, {**row, "completions": ["a", " "]},
        {**row, "prompt": "long " * 200},
    )  # fmt: skip
    data = read_steps(path, tiny_tokenizer, separator="\n", max_length=128)
    (found,) = data.rows
    assert found.labels == [True, False] and found.ends[-1] == len(found.token_ids) - 1
    assert tiny_tokenizer.decode(found.token_ids[: found.ends[0] + 1]).endswith("Snow is cold.\n")
    assert tiny_tokenizer.decode(found.token_ids).endswith("So it is white." + tiny_tokenizer.eos_token)
    assert data.dropped == {"longer than 128 tokens": 1, "a step is empty or holds the separator": 2}
    assert (data.num_steps, data.num_tokens) == (2, len(found.token_ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [True]}, r"steps.jsonl:2: labels: must be a list of 2, one a step, got \[True\]"),
        ({"labels": [True, 2]}, r"labels\[1\]: must be true or false, got 2"),
        ({"completions": "a"}, "completions: must be a list of steps"),
        ({"completions": []}, "completions: must be a list of steps"),
        ({"labels": None}, "labels: missing"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, tiny_tokenizer, change, message):
    row = {"prompt": "What?", "completions": ["a", "b"], "labels": [True, False]}
    path = write(tmp_path / "steps.jsonl", row, {**row, **change})
    with pytest.raises(InputError, match=message):
        read_steps(path, tiny_tokenizer, separator="\n", max_length=128)
