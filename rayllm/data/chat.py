"""Conversations as token ids, with a mask on what the assistant says."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError

from rayllm.data.messages import Message, first_user_turn, messages_of, text_of
from rayllm.data.rows import Row, RowDropped, RowError
from rayllm.data.sources import Origins, Paths, Reader
from rayllm.errors import InputError

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # not `add_generation_prompt`, which every template has

_SAID: list[Message] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


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
    """Raise InputError unless there is a template by which the assistant's tokens can be told."""
    try:
        _mask_turns(tokenizer, [*_SAID, *_SAID])
    except RowError as error:
        raise InputError(f"{where}: {error.reason}") from None


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

    def __init__(self, tokenizer: Any, where: Path | str) -> None:
        _check_has_template(tokenizer, where)
        self._tokenizer = tokenizer
        self._where = where
        self.end_of_turn = int(tokenizer.eos_token_id)
        """The token that the assistant's turn must end with for the conversation to go on."""
        self._before = self._render(_SAID[:1]) + _SAID[1]["content"] + tokenizer.eos_token
        frame = self.encode(_SAID[:1])
        joined = tokenizer.encode(self._render([*_SAID, *_SAID[:1]]), add_special_tokens=False)
        if joined[-len(frame) - 1 :] != [self.end_of_turn, *frame]:
            raise InputError(f"{where}: the tokenizer encodes what follows {tokenizer.eos_token!r} not by itself")

    def encode(self, messages: list[Message]) -> list[int]:
        """From behind the assistant's end-of-turn token, through ``messages``, to the start of its next turn.

        Raises:
            InputError: the template puts these messages not behind an unchanged conversation.
        """
        text = self._render([*_SAID, *messages])
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
        RowError: the chat template refuses the conversation, such as two turns of the user in a row; or it does not
            show which tokens are the assistant's.
        InputError: there is no template.
    """
    token_ids, mask = _mask_turns(tokenizer, messages)
    end = int(mask.nonzero()[0][-1]) + 1 if mask.any() else 0
    return ChatExample(token_ids[:end], mask[:end])


def _mask_turns(tokenizer: Any, messages: list[Message]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of all turns (T,) int64, and which are the assistant's (T,) bool: those within the template's
    ``{% generation %}`` blocks. Where it has none, as most do: from behind the generation prompt to the first
    ``eos_token``, that one included."""
    _check_has_template(tokenizer, tokenizer.name_or_path)
    try:
        if _MARKS.search(str(tokenizer.chat_template)):
            encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            return np.asarray(encoded["input_ids"], dtype=np.int64), np.asarray(encoded["assistant_masks"], dtype=bool)
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        if last is None:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool)
        text = tokenizer.apply_chat_template(messages[: last + 1], tokenize=False)
        spans = _find_turns(tokenizer, text, messages)
    except TemplateError as error:
        raise RowError("messages", f"the chat template refuses them: {error}") from None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # A token of blanks may have its end alone as its place.
    mask = [any(start <= a and start < b <= end for start, end in spans) for a, b in encoded["offset_mapping"]]
    return np.asarray(encoded["input_ids"], dtype=np.int64), np.asarray(mask, dtype=bool)


def _find_turns(tokenizer: Any, text: str, messages: list[Message]) -> list[tuple[int, int]]:
    """Where in ``text``, which ends with the last of them, the assistant's turns stand."""
    eos = tokenizer.eos_token
    spans: list[tuple[int, int]] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, tokenize=False)
        start, end = len(before), text.find(eos, len(before)) + len(eos)
        apart = not spans or spans[-1][1] <= start
        if not (apart and text.startswith(before) and end > start and message["content"].strip() in text[start:end]):
            raise RowError(
                "messages",
                f"the chat template does not show which tokens are the assistant's: expected {before!r}, what it says "
                f"and eos_token {eos!r} in {text!r}; wrap them in {{% generation %}} ... {{% endgeneration %}}, or let "
                "eos_token in tokenizer_config.json be the token that ends a turn",
            )
        spans.append((start, end))
    return spans


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
