"""Conversations as token ids, with a mask on what the assistant says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayllm.data.files import Row, read_rows
from rayllm.errors import InputError

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class ChatExample:
    """One conversation; the loss falls where ``loss_mask`` is True."""

    token_ids: np.ndarray  # (T,) int64
    loss_mask: np.ndarray  # (T,) bool


@dataclass(frozen=True, slots=True)
class ChatData:
    examples: list[ChatExample]
    dropped: dict[str, int]
    """Reason -> rows left out."""

    @property
    def num_tokens(self) -> int:
        return sum(len(e.token_ids) for e in self.examples)

    @property
    def num_loss_tokens(self) -> int:
        return sum(int(e.loss_mask.sum()) for e in self.examples)


def check_chat_template(tokenizer: Any, where: Path | str) -> None:
    """Raise InputError unless the template exists and marks the assistant's tokens."""
    if not tokenizer.chat_template:
        raise InputError(f"{where}: the tokenizer has no chat template; add chat_template.jinja to the folder")
    if "generation" not in str(tokenizer.chat_template):
        raise InputError(
            f"{where}: the chat template does not mark the assistant's tokens; wrap them in "
            "{% generation %} ... {% endgeneration %} so that the loss falls on them only"
        )


def prompt_token_ids(tokenizer: Any, messages: list[Message]) -> list[int]:
    """The conversation so far, ready for the assistant's turn."""
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def encode_conversation(tokenizer: Any, messages: list[Message]) -> ChatExample:
    """The conversation up to the end of the assistant's last turn; all of the assistant's turns are trained, each
    with its end-of-turn token."""
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    mask = np.asarray(encoded["assistant_masks"], dtype=bool)
    end = int(mask.nonzero()[0][-1]) + 1 if mask.any() else 0
    return ChatExample(np.asarray(encoded["input_ids"], dtype=np.int64)[:end], mask[:end])


def read_conversations(path: Path, tokenizer: Any, *, max_length: int) -> tuple[ChatData, list[str]]:
    """Demonstrations and, for each kept row, the text of its first turn, by which data is split.

    A row holds `messages`, or `prompt` (text or messages) and `response`.

    Raises:
        InputError: a malformed row, by its line.
    """
    examples, first_turns = [], []
    dropped = {"longer than max_length": 0, "no assistant tokens": 0}
    for row in read_rows(path, [], check=conversation_problem):
        messages = to_messages(row)
        example = encode_conversation(tokenizer, messages)
        if len(example.token_ids) > max_length:
            dropped["longer than max_length"] += 1
        elif not example.loss_mask.any():
            dropped["no assistant tokens"] += 1
        else:
            examples.append(example)
            first_turns.append(messages[0]["content"])
    return ChatData(examples, {reason: count for reason, count in dropped.items() if count}), first_turns


def to_messages(row: Row) -> list[Message]:
    """The row's conversation, whatever its columns."""
    if row.get("messages") is not None:
        return list(row["messages"])
    return [*prompt_messages(row["prompt"]), {"role": "assistant", "content": row["response"]}]


def prompt_messages(prompt: str | list[Message]) -> list[Message]:
    """A prompt given as text is one user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def conversation_problem(row: Row) -> str | None:
    """What keeps the row from being a demonstration, or None."""
    if row.get("messages") is None and (row.get("prompt") is None or row.get("response") is None):
        return f"needs 'messages', or 'prompt' and 'response'; the row holds {sorted(row)}"
    if row.get("messages") is None and not isinstance(row["response"], str):
        return f"'response' must be a string, got {type(row['response']).__name__}"
    problem = messages_problem(row["messages"] if row.get("messages") is not None else row["prompt"])
    if problem is None and row.get("messages") is not None and row["messages"][-1]["role"] != "assistant":
        return "'messages' must end with the assistant's turn"
    return problem


def messages_problem(messages: Any) -> str | None:
    """What keeps ``messages`` from being text or a list of role and content, or None."""
    if isinstance(messages, str):
        return None if messages.strip() else "the prompt is empty"
    if not isinstance(messages, list) or not messages:
        return f"expected text or a list of messages, got {messages!r:.60}"
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            return f"a message needs 'role' and 'content', got {message!r:.60}"
        if message["role"] not in ("system", "user", "assistant", "tool"):
            return f"unknown role {message['role']!r}; known: system, user, assistant, tool"
        if not isinstance(message["content"], str) or not message["content"].strip():
            return f"empty or non-text content in a {message['role']} message"
    return None
