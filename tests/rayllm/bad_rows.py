"""Malformed rows of many kinds over the formats, as many as wanted, each with what a reader must say of it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


GOOD: dict[str, tuple[str, Callable[[int], Row]]] = {
    "openai": ("conversation", lambda n: {"messages": [user(f"Question {n}?"), assistant(f"Answer {n}.")]}),
    "sharegpt": (
        "conversation",
        lambda n: {"conversations": [{"from": "human", "value": f"Q {n}"}, {"from": "gpt", "value": f"A {n}"}]},
    ),
    "completion": ("conversation", lambda n: {"prompt": f"Question {n}?", "completion": f"Answer {n}."}),
    "rankings": ("ranking", lambda n: {"prompt": f"Q {n}", "responses": ["a", "b", "c"], "ranks": [0, 1, 1]}),
    "preference": ("ranking", lambda n: {"prompt": f"Q {n}", "chosen": "yes", "rejected": "no"}),
    "implicit": (
        "ranking",
        lambda n: {"chosen": [user(f"Q {n}"), assistant("yes")], "rejected": [user(f"Q {n}"), assistant("no")]},
    ),
    "hh": (
        "ranking",
        lambda n: {
            "chosen": f"\n\nHuman: Q {n}\n\nAssistant: yes", "rejected": f"\n\nHuman: Q {n}\n\nAssistant: no"
        },
    ),
    "scored": (
        "ranking",
        lambda n: {
            "instruction": f"Q {n}",
            "completions": [{"response": "a", "overall_score": 4.5}, {"response": "b", "overall_score": 3}],
        },
    ),
    "unpaired": ("feedback", lambda n: {"prompt": f"Q {n}", "completion": "yes", "label": n % 2 == 0}),
    "prompts": ("prompt", lambda n: {"prompt": f"Q {n}", "kind": "any"}),
    "gsm8k": ("prompt", lambda n: {"question": f"Q {n}", "answer": f"Because.\n#### {n}"}),
}  # fmt: skip
"""Format -> schema and its well-formed row number n."""


@dataclass(frozen=True)
class Kind:
    """One way to be malformed."""

    name: str
    format: str
    spoil: Callable[[Row], Row | str]
    """The bad row, or the raw line of it."""

    field: str
    reason: str
    """Begins so."""


def put(**columns: Any) -> Callable[[Row], Row]:
    return lambda row: {**row, **columns}


def without(*columns: str) -> Callable[[Row], Row]:
    return lambda row: {name: value for name, value in row.items() if name not in columns}


def message(index: int, **change: Any) -> Callable[[Row], Row]:
    def spoil(row: Row) -> Row:
        column = "messages" if "messages" in row else "conversations"
        turns = [dict(turn) for turn in row[column]]
        turns[index] |= change
        return {**row, column: turns}

    return spoil


KINDS = [
    Kind("half a line", "openai", lambda row: json.dumps(row)[:-3], "row", "not valid JSON"),
    Kind("a list for a row", "openai", lambda row: "[1, 2]", "row", "expected an object with columns, got a list"),
    Kind("null for a row", "openai", lambda row: "null", "row", "expected an object with columns, got a NoneType"),
    Kind("no known column", "openai", lambda row: {"body": "x"}, "messages", "missing; the row holds body"),
    Kind("an empty row", "openai", lambda row: {}, "messages", "missing; the row holds nothing"),
    Kind("messages null", "openai", put(messages=None), "messages", "missing"),
    Kind("messages a text", "openai", put(messages="hello"), "messages", "must be text or a list of messages"),
    Kind("no messages", "openai", put(messages=[]), "messages", "must be text or a list of messages, got list"),
    Kind("unknown role", "openai", message(0, role="robot"), "messages[0].role", "unknown role 'robot'; known: system"),
    Kind("role a number", "openai", message(0, role=3), "messages[0].role", "unknown role 3"),
    Kind("content null", "openai", message(1, content=None), "messages[1].content", "missing"),
    Kind("content a number", "openai", message(1, content=4), "messages[1].content", "must be text, got int 4"),
    Kind("content blank", "openai", message(1, content=" \n"), "messages[1].content", "is empty"),
    Kind("content half a character", "openai", message(1, content="a\ud800"), "messages[1].content", "holds half a char"),
    Kind(
        "an image", "openai", message(0, content=[{"type": "image_url", "image_url": "x"}]),
        "messages[0].content[0]", "only parts of type 'text' are read",
    ),
    Kind("a call of a tool", "openai", message(1, tool_calls=[{"id": "1"}]), "messages[1].tool_calls", "calls of tools"),
    Kind("a message of text", "openai", put(messages=["hello"]), "messages[0]", "a message needs 'role' and 'content'"),
    Kind("user's turn last", "openai", message(1, role="user"), "messages", "must end with the assistant's turn, got user"),
    Kind("assistant alone", "openai", put(messages=[assistant("x")]), "messages", "a prompt must end with the user's turn"),
    Kind("assistant twice", "openai", message(0, role="assistant"), "messages", "a prompt must end with the user's turn"),
    Kind("another format", "openai", lambda row: GOOD["completion"][1](1), "columns", "this row reads as prompt and compl"),
    Kind("unknown speaker", "sharegpt", message(0, **{"from": "cat"}), "conversations[0].from", "unknown speaker 'cat'"),
    Kind("value empty", "sharegpt", message(1, value=""), "conversations[1].value", "is empty"),
    Kind("OpenAI's keys", "sharegpt", put(conversations=[user("x")]), "conversations[0]", "a turn needs 'from' and 'value'"),
    Kind("no completion", "completion", without("completion"), "completion", "missing, and no 'response'; the row holds p"),
    Kind("completion a list", "completion", put(completion=[user("x")]), "completion", "must be one message of the assist"),
    Kind("prompt empty", "completion", put(prompt=""), "prompt", "is empty"),
    Kind("prompt a number", "completion", put(prompt=7), "prompt", "must be text, got int 7"),
    Kind("ranks missing", "rankings", put(ranks=None), "ranks", "missing"),
    Kind("ranks not aligned", "rankings", put(ranks=[0, 1]), "ranks", "3 responses but 2 ranks"),
    Kind("ranks of text", "rankings", put(ranks=[0, "b", 1]), "ranks[1]", "must be a whole number from 0 (best), got 'b'"),
    Kind("ranks below 0", "rankings", put(ranks=[0, 1, -1]), "ranks[2]", "must be a whole number from 0"),
    Kind("ranks true", "rankings", put(ranks=[True, 0, 1]), "ranks[0]", "must be a whole number from 0"),
    Kind("ranks broken", "rankings", put(ranks=[0.5, 0, 1]), "ranks[0]", "must be a whole number from 0"),
    Kind("one response", "rankings", put(responses=["a"], ranks=[0]), "responses", "must be a list of at least two texts"),
    Kind("response empty", "rankings", put(responses=["a", "", "c"]), "responses[1]", "is empty"),
    Kind("equal, ranked apart", "rankings", put(responses=["a", "b", "a"]), "responses[2]", "the same text as response 0"),
    Kind("ids not aligned", "rankings", put(response_ids=[[1], [2]]), "response_ids", "3 responses but 2 response_ids"),
    Kind("ids of text", "rankings", put(response_ids=[[1], ["x"], [2]]), "response_ids[1]", "must be a list of token ids"),
    Kind("score NaN", "rankings", put(scores=[1.0, float("nan"), 0]), "scores[1]", "must be a finite number, got nan"),
    Kind("score infinite", "rankings", put(scores=[1.0, float("-inf"), 0]), "scores[1]", "must be a finite number"),
    Kind("scores not aligned", "rankings", put(scores=[1.0]), "scores", "3 responses but 1 scores"),
    Kind("labeler a number", "rankings", put(labeler=3), "labeler", "must be text, got int 3"),
    Kind("chosen is rejected", "preference", put(rejected="yes"), "rejected", "equal to chosen"),
    Kind("rejected missing", "preference", without("rejected"), "rejected", "missing; the row holds chosen, prompt"),
    Kind("rejected null", "preference", put(rejected=None), "rejected", "missing"),
    Kind("chosen an object", "preference", put(chosen={"content": "x"}), "chosen", "must be text, got dict"),
    Kind("margin of text", "preference", put(margin="big"), "margin", "must be a finite number, got 'big'"),
    Kind(
        "scores the wrong way", "preference", put(score_chosen=1.0, score_rejected=2.0),
        "score_rejected", "is higher than score_chosen",
    ),
    Kind("one score", "preference", put(score_chosen=1.0), "score_rejected", "must be a finite number, got None"),
    Kind("prompt ends with the assistant", "preference", put(prompt=[user("x"), assistant("y")]), "prompt", "a prompt must"),
    Kind("no answer", "implicit", put(chosen=[user("x")], rejected=[user("x")]), "chosen", "must end with the assistant's"),
    Kind("text and messages", "implicit", put(rejected="no"), "rejected", "must be text or a list of messages, got str"),
    Kind("no transcript", "hh", put(rejected="plain"), "rejected", "must be a transcript that begins with 'Human:'"),
    Kind("transcript without an answer", "hh", put(chosen="\n\nHuman: x"), "chosen", "must end with the assistant's turn"),
    Kind(
        "transcript with nothing asked", "hh", put(chosen="\n\nHuman: \n\nAssistant: x"), "chosen", "turn 0 of the transcript"
    ),
    Kind("completions a text", "scored", put(completions="x"), "completions", "must be a list of at least two"),
    Kind("one completion", "scored", put(completions=[{"response": "a", "score": 1}]), "completions", "must be a list of"),
    Kind(
        "completion without a score", "scored", put(completions=[{"response": "a"}, {"response": "b", "score": 1}]),
        "completions[0].overall_score", "missing, and there is no other score",
    ),
    Kind(
        "completion without a response", "scored", put(completions=[{"score": 1}, {"response": "b", "score": 1}]),
        "completions[0].response", "missing",
    ),
    Kind("label a number", "unpaired", put(label=1), "label", "must be true or false, got 1"),
    Kind("label a word", "unpaired", put(label="true"), "label", "must be true or false, got 'true'"),
    Kind("completion blank", "unpaired", put(completion="  "), "completion", "is empty"),
    Kind("prompt null", "prompts", put(prompt=None), "prompt", "missing"),
    Kind("prompt of the system", "prompts", put(prompt=[{"role": "system", "content": "x"}]), "prompt", "a prompt must end"),
    Kind("token below 0", "prompts", put(prompt=[1, -2]), "prompt[1]", "a prompt of token ids holds -2"),
    Kind("token true", "prompts", put(prompt=[True, 2]), "prompt[0]", "a prompt of token ids holds True"),
    Kind("no final number", "gsm8k", put(answer="It is seven."), "answer", "must end with '#### ' and a number"),
    Kind("final words", "gsm8k", put(answer="#### seven"), "answer", "must end with '#### ' and a number"),
    Kind("question missing", "gsm8k", without("question"), "question", "missing; the row holds answer"),
]  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One line of a JSONL file; ``kind`` is None for a well-formed one."""

    text: str
    kind: Kind | None = None


def lines(count: int, *, seed: int = 0) -> Iterator[tuple[str, list[Line]]]:
    """(format, lines of a file that begins with a well-formed row): ``count`` bad rows in all, every kind in turn,
    among well-formed rows at random places."""
    rng = random.Random(seed)
    of_format: dict[str, list[Kind]] = {}
    for index in range(count):
        kind = KINDS[index % len(KINDS)]
        of_format.setdefault(kind.format, []).append(kind)
    for name, kinds in of_format.items():
        _, good = GOOD[name]
        found = [Line(json.dumps(good(0)))]
        rng.shuffle(kinds)
        for kind in kinds:
            found += [Line(json.dumps(good(rng.randrange(10**6)))) for _ in range(rng.randrange(3))]
            spoiled = kind.spoil(good(rng.randrange(10**6)))
            found.append(Line(spoiled if isinstance(spoiled, str) else json.dumps(spoiled), kind))
        yield name, found
