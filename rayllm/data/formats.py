"""The formats that people have, told by a row's columns, and what each becomes: one internal row a schema.

```
conversation  {"messages": [{role, content}, ...]}                           the assistant's turn last
ranking       {"prompt": [messages], "responses": [text], "ranks": [int],    0 is best, ties share a rank
               "response_ids", "scores", "labeler", "criteria", "category"}  None where not given
feedback      {"prompt": [messages], "responses": [text], "desirable": [bool]}
prompt        the row's own columns, and "prompt": text, [messages] or [token ids]
```

Conversions are pure functions on rows. They raise RowError for a malformed row, and RowDropped for one that is
well-formed and of no use.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from rayllm.data.messages import (
    Message,
    check_prompt,
    common_prompt,
    hh_messages,
    is_hh,
    last_turn,
    messages_of,
    prompt_of,
    response_of,
    sharegpt_messages,
    text_of,
)
from rayllm.data.rows import Row, RowDropped, RowError

SchemaName = Literal["conversation", "ranking", "feedback", "prompt"]


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write a row of a schema."""

    name: str
    columns: tuple[str, ...]
    """All of them must hold a value; "a|b" is one of two."""

    convert: Callable[[Row], Row]
    fits: Callable[[Row], bool] = lambda row: True
    """What tells it from another format with the same columns."""

    def missing(self, row: Row) -> list[str]:
        """Columns that the row lacks."""
        return [c for c in self.columns if all(row.get(name) is None for name in c.split("|"))]


def detect(row: Row, schema: SchemaName, *, near: Format | None = None) -> Format:
    """The format of a row: the first of the schema whose columns it holds.

    Raises:
        RowError: none; it names the column that is missing from ``near``, or from the nearest.
    """
    formats = FORMATS[schema]
    for candidate in formats:
        if not candidate.missing(row) and candidate.fits(row):
            return candidate
    held = ", ".join(sorted(name for name, value in row.items() if value is not None)) or "nothing"
    nearest = near or max(formats, key=lambda f: (len(f.columns) - len(f.missing(row)), -len(f.missing(row))))
    if near is None and len(nearest.missing(row)) == len(nearest.columns):
        known = "; ".join(dict.fromkeys(", ".join(f.columns) for f in formats))
        raise RowError("columns", f"no format is known by {held}; a {schema} row needs one of: {known}")
    lacking, *others = (nearest.missing(row) or nearest.columns)[0].split("|")
    either = "".join(f", and no {other!r}" for other in others)
    raise RowError(lacking, f"missing{either}; the row holds {held} (read as {nearest.name})")


# conversations


def _conversation(messages: list[Message], field: str) -> Row:
    last_turn(messages, field)
    return {"messages": messages}


def _answered(row: Row, prompt: str, response: str) -> Row:
    said = response_of(row[response], response)
    return {"messages": [*prompt_of(row[prompt], prompt), {"role": "assistant", "content": said}]}


def _prompt_and_completion(row: Row) -> Row:
    return _answered(row, "prompt", "completion" if row.get("completion") is not None else "response")


def _alpaca(row: Row) -> Row:
    prompt = text_of(row["instruction"], "instruction")
    if row.get("input"):
        prompt += "\n\n" + text_of(row["input"], "input")
    return _answered({"prompt": prompt, "output": row["output"]}, "prompt", "output")


# rankings


def _ranking(prompt: list[Message], responses: list[str], ranks: list[int], row: Row, **given: Any) -> Row:
    """Checks what all formats share: equal responses have equal ranks."""
    first: dict[str, int] = {}
    for index, response in enumerate(responses):
        same = first.setdefault(response, index)
        if ranks[same] != ranks[index]:
            raise RowError(f"responses[{index}]", f"the same text as response {same}, ranked apart")
    texts = {name: _optional_text(row, name) for name in ("labeler", "criteria", "category")}
    texts["category"] = texts["category"] or _optional_text(row, "subset")  # RewardBench's name
    usual = {"prompt": prompt, "responses": responses, "ranks": ranks, "response_ids": None, "scores": None}
    return usual | texts | given


def _our_ranking(row: Row) -> Row:
    sampled = row.get("response_ids") is not None
    responses = _texts(row["responses"], "responses", may_be_empty=sampled)  # a model may say nothing
    count = len(responses)
    scores = None if row.get("scores") is None else _numbers(row["scores"], "scores", count)
    if row.get("ranks") is None:
        ranks = ranks_of(scores or [])
    else:
        ranks = _aligned(row["ranks"], "ranks", count)
        for index, rank in enumerate(ranks):
            if type(rank) is not int or rank < 0:  # true and false are ints too
                raise RowError(f"ranks[{index}]", f"must be a whole number from 0 (best), got {rank!r:.40}")
    ids = _aligned(row["response_ids"], "response_ids", count) if sampled else None
    for index, tokens in enumerate(ids or []):
        if not isinstance(tokens, list) or not tokens or not all(type(t) is int and t >= 0 for t in tokens):
            raise RowError(f"response_ids[{index}]", f"must be a list of token ids, got {tokens!r:.60}")
    return _ranking(prompt_of(row["prompt"], "prompt"), responses, ranks, row, response_ids=ids, scores=scores)


def _scored_completions(row: Row) -> Row:
    """UltraFeedback: a list of completions, each with its score."""
    asked = "prompt" if row.get("prompt") is not None else "instruction"
    completions = row["completions"]
    if not isinstance(completions, list) or len(completions) < 2:
        raise RowError("completions", f"must be a list of at least two, got {completions!r:.60}")
    responses, scores = [], []
    for index, completion in enumerate(completions):
        where = f"completions[{index}]"
        if not isinstance(completion, dict):
            raise RowError(where, f"must hold 'response' and a score, got {completion!r:.60}")
        responses.append(text_of(completion.get("response"), f"{where}.response"))
        scores.append(_score(completion, where))
    return _ranking(prompt_of(row[asked], asked), responses, ranks_of(scores), row, scores=scores)


def _score(completion: Row, where: str) -> float:
    """The overall score, else the fine-grained one, else the mean of the annotations' ratings."""
    for name in ("overall_score", "fine-grained_score", "score"):
        if completion.get(name) is not None:
            return _number(completion[name], f"{where}.{name}")
    annotations = completion.get("annotations")
    found = (
        [a.get("Rating") for a in annotations.values() if isinstance(a, dict)] if isinstance(annotations, dict) else []
    )
    ratings = [float(str(r)) for r in found if re.fullmatch(r"\d+(\.\d+)?", str(r))]
    if not ratings:
        raise RowError(f"{where}.overall_score", "missing, and there is no other score")
    return sum(ratings) / len(ratings)


def _hh_pair(row: Row) -> Row:
    better, worse = (hh_messages(row[name], name) for name in ("chosen", "rejected"))
    prompt, chosen, rejected = common_prompt(better, worse)
    if not chosen or not rejected:
        raise RowDropped("an answer without words")  # people preferred silence; there is no text to learn from
    return _pair(prompt, chosen, rejected, row)


def _preference(row: Row) -> Row:
    """Explicit prompt; chosen and rejected are what follows it, or whole conversations that begin with it."""
    chosen, rejected = row["chosen"], row["rejected"]
    if is_hh(chosen):
        return _hh_pair(row)
    if isinstance(chosen, list) and isinstance(rejected, list) and min(len(chosen), len(rejected)) > 1:
        prompt, better, worse = common_prompt(messages_of(chosen, "chosen"), messages_of(rejected, "rejected"))
        given = prompt_of(row["prompt"], "prompt")
        if given[-1]["content"] not in [message["content"] for message in prompt]:
            raise RowError("prompt", "is not in the conversations of chosen and rejected")
        return _pair(prompt, better, worse, row)
    prompt = prompt_of(row["prompt"], "prompt")
    return _pair(prompt, response_of(chosen, "chosen"), response_of(rejected, "rejected"), row)


def _implicit_preference(row: Row) -> Row:
    """The prompt is what chosen and rejected begin with: of texts, up to the last blank before they part."""
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list) or isinstance(rejected, list):
        return _pair(*common_prompt(messages_of(chosen, "chosen"), messages_of(rejected, "rejected")), row)
    chosen, rejected = text_of(chosen, "chosen"), text_of(rejected, "rejected")
    if chosen == rejected:
        raise RowError("rejected", "equal to chosen")
    same = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    while same and not chosen[same - 1].isspace():
        same -= 1
    if not chosen[:same].strip():
        raise RowError("chosen", "does not begin as rejected does, and there is no prompt")
    prompt = [{"role": "user", "content": chosen[:same].strip()}]
    return _pair(prompt, text_of(chosen[same:], "chosen"), text_of(rejected[same:], "rejected"), row)


def _pair(prompt: list[Message], chosen: str, rejected: str, row: Row) -> Row:
    if chosen == rejected:
        raise RowError("rejected", "equal to chosen")
    scores = None
    if row.get("score_chosen") is not None or row.get("score_rejected") is not None:
        scores = [_number(row.get(name), name) for name in ("score_chosen", "score_rejected")]
        if scores[0] < scores[1]:
            raise RowError("score_rejected", f"is higher than score_chosen: {scores[1]:g} against {scores[0]:g}")
    elif row.get("margin") is not None:
        scores = [_number(row["margin"], "margin"), 0.0]
    return _ranking(prompt, [chosen, rejected], [0, 1], row, scores=scores)


# feedback


def _unpaired(row: Row) -> Row:
    said = "completion" if row.get("completion") is not None else "response"
    if not isinstance(row["label"], bool):
        raise RowError("label", f"must be true or false, got {row['label']!r:.40}")
    response = response_of(row[said], said)
    return {"prompt": prompt_of(row["prompt"], "prompt"), "responses": [response], "desirable": [row["label"]]}


def _unpair(convert: Callable[[Row], Row], row: Row) -> Row:
    """The best of a ranking are desirable, the worst are not, those between say nothing."""
    ranking = convert(row)
    ranks = ranking["ranks"]
    if min(ranks) == max(ranks):
        raise RowDropped("no response better than another")
    kept = [
        (text, rank) for text, rank in zip(ranking["responses"], ranks, strict=True) if rank in (min(ranks), max(ranks))
    ]
    return {
        "prompt": ranking["prompt"],
        "responses": [text for text, _ in kept],
        "desirable": [rank == min(ranks) for _, rank in kept],
    }


# prompts


def _prompt(row: Row) -> Row:
    """Text stays text: rewards and judges see the row as it is."""
    prompt = row["prompt"]
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], dict):
        for index, token in enumerate(prompt):
            if type(token) is not int or token < 0:  # true and false are ints too
                raise RowError(f"prompt[{index}]", f"a prompt of token ids holds {token!r:.40}, expected whole numbers")
        return row
    messages = prompt_of(prompt, "prompt")
    return row if isinstance(prompt, str) and not is_hh(prompt) else {**row, "prompt": messages}


def _asked(row: Row) -> Row:
    messages = messages_of(row["messages"], "messages")
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return {**row, "prompt": check_prompt(messages, "messages")}


def _gsm8k(row: Row) -> Row:
    """`answer` becomes the number behind ####, without commas; the worked answer is kept as `solution`."""
    worked = text_of(row["answer"], "answer")
    _, mark, final = worked.rpartition("####")
    number = final.strip().replace(",", "").removeprefix("$")
    if not mark or not re.fullmatch(r"-?\d+(\.\d+)?", number):
        raise RowError(
            "answer", "must end with '#### ' and a number; where it is plain, name the other column 'prompt'"
        )
    return {**row, "prompt": text_of(row["question"], "question"), "answer": number, "solution": worked}


# checks


def ranks_of(scores: list[float]) -> list[int]:
    """0 for the highest score, ties share a rank."""
    order = sorted(set(scores), reverse=True)
    return [order.index(score) for score in scores]


def _texts(value: Any, field: str, *, may_be_empty: bool) -> list[str]:
    if not isinstance(value, list) or len(value) < 2:
        raise RowError(field, f"must be a list of at least two texts, got {value!r:.60}")
    return [
        "" if may_be_empty and text == "" else text_of(text, f"{field}[{index}]") for index, text in enumerate(value)
    ]


def _aligned(value: Any, field: str, count: int) -> list[Any]:
    if not isinstance(value, list):
        raise RowError(field, f"must be a list, got {value!r:.60}")
    if len(value) != count:
        raise RowError(field, f"{count} responses but {len(value)} {field}")
    return value


def _numbers(value: Any, field: str, count: int) -> list[float]:
    return [_number(item, f"{field}[{index}]") for index, item in enumerate(_aligned(value, field, count))]


def _number(value: Any, field: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:  # so no NaN
        return float(value)
    raise RowError(field, f"must be a finite number, got {value!r:.40}")


def _optional_text(row: Row, field: str) -> str | None:
    return None if row.get(field) is None else text_of(row[field], field)


_RANKINGS = (
    Format("rankings", ("prompt", "responses", "ranks"), _our_ranking),
    Format("scored responses", ("prompt", "responses", "scores"), _our_ranking),
    Format("preference pairs", ("prompt", "chosen", "rejected"), _preference),
    Format("Anthropic HH", ("chosen", "rejected"), _hh_pair, fits=lambda row: is_hh(row["chosen"])),
    Format("preference pairs, implicit prompt", ("chosen", "rejected"), _implicit_preference),
    Format("scored completions", ("prompt|instruction", "completions"), _scored_completions),
)

FORMATS: dict[SchemaName, tuple[Format, ...]] = {
    "conversation": (
        Format(
            "OpenAI messages",
            ("messages",),
            lambda row: _conversation(messages_of(row["messages"], "messages"), "messages"),
        ),
        Format(
            "ShareGPT",
            ("conversations",),
            lambda row: _conversation(sharegpt_messages(row["conversations"], "conversations"), "conversations"),
        ),
        Format("prompt and completion", ("prompt", "completion|response"), _prompt_and_completion),
        Format("Alpaca", ("instruction", "output"), _alpaca),
        Format("question and answer", ("question", "answer"), lambda row: _answered(row, "question", "answer")),
    ),
    "ranking": _RANKINGS,
    "feedback": (
        Format("unpaired feedback", ("prompt", "completion|response", "label"), _unpaired),
        *(replace(f, convert=partial(_unpair, f.convert)) for f in _RANKINGS),
    ),
    "prompt": (
        Format("prompts", ("prompt",), _prompt),
        Format("OpenAI messages", ("messages",), _asked),
        Format("GSM8K", ("question", "answer"), _gsm8k),
    ),
}
"""Schema -> its formats; where a row has the columns of several, the first is meant."""
