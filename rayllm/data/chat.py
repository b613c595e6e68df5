"""Conversations as token ids, with a mask on what the assistant says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

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


class TurnFrame:
    """Encodes what stands between two turns of the assistant, in the chat template's own frame.

    It continues conversations that are kept as token ids: earlier turns are never rendered or encoded again. The frame
    is found by rendering a fixed conversation with the new messages behind it and cutting off what was there before.

    Args:
        where: of the tokenizer, for messages.

    Raises:
        InputError: no template, or one that renders the assistant's turn otherwise once the conversation goes on, or a
            tokenizer that encodes what follows a turn otherwise when the turn stands before it.
    """

    _SAID: ClassVar[list[Message]] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]

    def __init__(self, tokenizer: Any, where: Path | str) -> None:
        if not tokenizer.chat_template:
            raise InputError(f"{where}: the tokenizer has no chat template; add chat_template.jinja to the folder")
        self._tokenizer = tokenizer
        self._where = where
        self.end_of_turn = int(tokenizer.eos_token_id)
        """The token that the assistant's turn must end with for the conversation to go on."""
        self._before = self._render(self._SAID[:1]) + self._SAID[1]["content"] + tokenizer.eos_token
        frame = self.encode(self._SAID[:1])
        joined = tokenizer.encode(self._render([*self._SAID, *self._SAID[:1]]), add_special_tokens=False)
        if joined[-len(frame) - 1 :] != [self.end_of_turn, *frame]:
            raise InputError(f"{where}: the tokenizer encodes what follows {tokenizer.eos_token!r} not by itself")

    def encode(self, messages: list[Message]) -> list[int]:
        """From behind the assistant's end-of-turn token, through ``messages``, to the start of its next turn.

        Raises:
            InputError: the template puts these messages not behind an unchanged conversation.
        """
        text = self._render([*self._SAID, *messages])
        if not text.startswith(self._before):
            raise InputError(
                f"{self._where}: the chat template does not keep a conversation's start as it was when it goes on: "
                f"expected {self._before!r} first, got {text!r}"
            )
        return list(self._tokenizer.encode(text.removeprefix(self._before), add_special_tokens=False))

    def _render(self, messages: list[Message]) -> str:
        return str(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


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


def prompt_problem(prompt: Any, *, vocab_size: int) -> str | None:
    """What keeps ``prompt`` from being text, messages, or token ids below ``vocab_size``; or None."""
    if not isinstance(prompt, list) or not prompt or not isinstance(prompt[0], int):
        return messages_problem(prompt)
    for token in prompt:
        if type(token) is not int:  # true and false are ints too
            return f"a prompt of token ids holds {token!r:.60}, expected integers only"
        if not 0 <= token < vocab_size:
            return f"the prompt has token {token}, outside the tokenizer's vocabulary of {vocab_size}"
    return None


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
