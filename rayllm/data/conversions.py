"""From a row as people write it to the internal row of its schema: pure functions, one a format.

```
conversation  {"messages": [{role, content}, ...]}                           the assistant's turn last
ranking       {"prompt": [messages], "responses": [text], "ranks": [int],    0 is best, ties share a rank
               "response_ids", "scores", "labeler", "criteria", "category"}  None where not given
feedback      {"prompt", "responses", "response_ids", "desirable": [bool]}
steps         {"prompt", "steps": [text], "labels": [bool]}                  in order
prompt        the row's own columns, and "prompt": text, [messages] or [token ids]
```

Blanks around a response are cut off: with them its first tokens would depend on what stands before. What comes
with its tokens, and conversations, are taken as they are. Conversions raise RowError for a malformed row, and
RowDropped for one that is well-formed and of no use.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

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

ABOUT = ("labeler", "criteria", "category")
"""Text about a ranking: who ranked, by what, and what kind of prompt it is."""

# conversations


def openai_conversation(row: Row) -> Row:
    messages = messages_of(row["messages"], "messages")
    last_turn(messages, "messages")
    return {"messages": messages}


def sharegpt_conversation(row: Row) -> Row:
    messages = sharegpt_messages(row["conversations"], "conversations")
    last_turn(messages, "conversations")
    return {"messages": messages}


def question_and_answer(row: Row) -> Row:
    return _answered(row, "question", "answer")


def _answered(row: Row, prompt: str, response: str) -> Row:
    said = response_of(row[response], response)
    return {"messages": [*prompt_of(row[prompt], prompt), {"role": "assistant", "content": said}]}


def prompt_and_completion(row: Row) -> Row:
    return _answered(row, "prompt", "completion" if row.get("completion") is not None else "response")


def alpaca_conversation(row: Row) -> Row:
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
    texts = {name: row[name] if isinstance(row.get(name), str) else None for name in ABOUT}
    if texts["category"] is None and isinstance(row.get("subset"), str):  # RewardBench's name
        texts["category"] = row["subset"]
    usual = {"prompt": prompt, "responses": responses, "ranks": ranks, "response_ids": None, "scores": None}
    return usual | texts | given


def responses_ranking(row: Row) -> Row:
    for name in ABOUT:
        if row.get(name) is not None:
            text_of(row[name], name)
    sampled = row.get("response_ids") is not None
    responses = _texts(row["responses"], "responses", sampled=sampled)
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


def completions_ranking(row: Row) -> Row:
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
        responses.append(response_of(completion.get("response"), f"{where}.response"))
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


def hh_pair(row: Row) -> Row:
    better, worse = (hh_messages(row[name], name) for name in ("chosen", "rejected"))
    prompt, chosen, rejected = common_prompt(better, worse)
    if not chosen or not rejected:
        raise RowDropped("an answer without words")  # people preferred silence; there is no text to learn from
    return _pair(prompt, chosen, rejected, row)


def explicit_pair(row: Row) -> Row:
    """Explicit prompt; chosen and rejected are what follows it, or whole conversations that begin with it."""
    chosen, rejected = row["chosen"], row["rejected"]
    if is_hh(chosen):
        return hh_pair(row)
    if isinstance(chosen, list) and isinstance(rejected, list) and min(len(chosen), len(rejected)) > 1:
        prompt, better, worse = common_prompt(messages_of(chosen, "chosen"), messages_of(rejected, "rejected"))
        given = prompt_of(row["prompt"], "prompt")
        if given[-1]["content"] not in [message["content"] for message in prompt]:
            raise RowError("prompt", "is not in the conversations of chosen and rejected")
        return _pair(prompt, better, worse, row)
    prompt = prompt_of(row["prompt"], "prompt")
    return _pair(prompt, response_of(chosen, "chosen"), response_of(rejected, "rejected"), row)


def implicit_pair(row: Row) -> Row:
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
    return _pair(prompt, response_of(chosen[same:], "chosen"), response_of(rejected[same:], "rejected"), row)


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


def unpaired_feedback(row: Row) -> Row:
    said = "completion" if row.get("completion") is not None else "response"
    if not isinstance(row["label"], bool):
        raise RowError("label", f"must be true or false, got {row['label']!r:.40}")
    response = response_of(row[said], said)
    prompt = prompt_of(row["prompt"], "prompt")
    return {"prompt": prompt, "responses": [response], "response_ids": None, "desirable": [row["label"]]}


def ranking_feedback(convert: Callable[[Row], Row], row: Row) -> Row:
    """The best of a ranking are desirable, the worst are not, those between say nothing."""
    ranking = convert(row)
    ranks = ranking["ranks"]
    if min(ranks) == max(ranks):
        raise RowDropped("no response better than another")
    kept = [index for index, rank in enumerate(ranks) if rank in (min(ranks), max(ranks))]
    ids = ranking["response_ids"]
    return {
        "prompt": ranking["prompt"],
        "responses": [ranking["responses"][index] for index in kept],
        "response_ids": None if ids is None else [ids[index] for index in kept],
        "desirable": [ranks[index] == min(ranks) for index in kept],
    }


# steps


def labelled_steps(row: Row) -> Row:
    steps, labels = row["completions"], row["labels"]
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) for step in steps):
        raise RowError("completions", f"must be a list of steps, each a text, got {steps!r:.60}")
    if not isinstance(labels, list) or len(labels) != len(steps):
        raise RowError("labels", f"must be a list of {len(steps)}, one a step, got {labels!r:.60}")
    for index, label in enumerate(labels):
        if not isinstance(label, bool):
            raise RowError(f"labels[{index}]", f"must be true or false, got {label!r:.40}")
    return {"prompt": prompt_of(row["prompt"], "prompt"), "steps": steps, "labels": labels}


# prompts


def plain_prompt(row: Row) -> Row:
    """Text stays text: rewards and judges see the row as it is."""
    prompt = row["prompt"]
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], dict):
        for index, token in enumerate(prompt):
            if type(token) is not int or token < 0:  # true and false are ints too
                raise RowError(f"prompt[{index}]", f"a prompt of token ids holds {token!r:.40}, expected whole numbers")
        return row
    messages = prompt_of(prompt, "prompt")
    return row if isinstance(prompt, str) and not is_hh(prompt) else {**row, "prompt": messages}


def messages_prompt(row: Row) -> Row:
    messages = messages_of(row["messages"], "messages")
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return {**row, "prompt": check_prompt(messages, "messages")}


def gsm8k_prompt(row: Row) -> Row:
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


def _texts(value: Any, field: str, *, sampled: bool) -> list[str]:
    """What was sampled may be empty: a model may say nothing."""
    if not isinstance(value, list) or len(value) < 2:
        raise RowError(field, f"must be a list of at least two texts, got {value!r:.60}")
    return [
        text if sampled and isinstance(text, str) else response_of(text, f"{field}[{index}]")
        for index, text in enumerate(value)
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


