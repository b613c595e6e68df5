"""Conversations as token ids, with a mask on what the assistant says."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jinja2 import TemplateError

from rayllm.data.messages import Message, first_user_turn, messages_of, text_of
from rayllm.data.rows import Row, RowDropped, RowError
from rayllm.data.sources import Origins, Paths, Reader
from rayllm.errors import InputError

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # not `add_generation_prompt`, which every template has


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

    origins: Origins = field(default_factory=Origins)

    @property
    def num_tokens(self) -> int:
        return sum(len(e.token_ids) for e in self.examples)

    @property
    def num_loss_tokens(self) -> int:
        return sum(int(e.loss_mask.sum()) for e in self.examples)


def check_chat_template(tokenizer: Any, where: Path | str) -> None:
    """Raise InputError unless the template exists and marks the assistant's tokens."""
    _check_has_template(tokenizer, where)
    if not _MARKS.search(str(tokenizer.chat_template)):
        raise InputError(
            f"{where}: the chat template does not mark the assistant's tokens; wrap them in "
            "{% generation %} ... {% endgeneration %} so that the loss falls on them only"
        )


def _check_has_template(tokenizer: Any, where: Path | str) -> None:
    if not tokenizer.chat_template:
        raise InputError(f"{where}: the tokenizer has no chat template; add chat_template.jinja to the folder")


def prompt_token_ids(tokenizer: Any, messages: list[Message]) -> list[int]:
    """The conversation so far, ready for the assistant's turn.

    Raises:
        RowError: the chat template refuses the conversation, or makes nothing of it.
        InputError: there is no template.
    """
    _check_has_template(tokenizer, tokenizer.name_or_path)
    try:
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    except (TemplateError, OverflowError) as error:  # the sandbox's word for a loop without end
        raise RowError("prompt", f"the chat template refuses it: {error}") from None
    if not encoded["input_ids"]:
        raise RowError("prompt", "the chat template makes nothing of it")
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
        _check_has_template(tokenizer, where)
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
    with its end-of-turn token.

    Raises:
        RowError: the chat template refuses the conversation, such as two turns of the user in a row.
        InputError: there is no template, or it does not mark what the assistant says.
    """
    check_chat_template(tokenizer, tokenizer.name_or_path)
    try:
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    except TemplateError as error:
        raise RowError("messages", f"the chat template refuses them: {error}") from None
    mask = np.asarray(encoded["assistant_masks"], dtype=bool)
    end = int(mask.nonzero()[0][-1]) + 1 if mask.any() else 0
    return ChatExample(np.asarray(encoded["input_ids"], dtype=np.int64)[:end], mask[:end])


def read_conversations(paths: Paths, tokenizer: Any, *, max_length: int, max_bad_rows: int = 0) -> ChatData:
    """Demonstrations; conversations over ``max_length`` tokens are dropped and counted.

    Raises:
        InputError: more malformed rows than ``max_bad_rows``, by file, line, field and reason.
    """

    def encode(row: Row) -> tuple[ChatExample, str]:
        example = encode_conversation(tokenizer, row["messages"])
        if len(example.token_ids) > max_length:
            raise RowDropped("longer than max_length")
        if not example.loss_mask.any():
            raise RowDropped("no assistant tokens")
        return example, first_user_turn(row["messages"])

    reader = Reader(paths, "conversation", max_bad_rows=max_bad_rows)
    examples, origins = reader.collect(encode)
    return ChatData(examples, dict(reader.dropped), origins)


def prompt_messages(prompt: str | list[Message]) -> list[Message]:
    """A prompt given as text is one user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def messages_problem(messages: Any) -> str | None:
    """What keeps ``messages`` from being text or a list of role and content, or None."""
    try:
        if isinstance(messages, str):
            text_of(messages, "the prompt")
        else:
            messages_of(messages, "messages")
    except RowError as error:
        return str(error)
    return None
