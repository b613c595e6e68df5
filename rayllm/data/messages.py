"""Messages: what people write as a conversation, checked and brought to one form, a list of role and content."""

from __future__ import annotations

import re
from typing import Any

from rayllm.data.rows import RowDropped, RowError

Message = dict[str, str]

ROLES = ("system", "user", "assistant", "tool")

SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "model": "assistant", "tool": "tool", "observation": "tool", "function": "tool",
}  # fmt: skip

_HH_TURN = re.compile(r"(?:^|\r?\n\r?\n)(Human|Assistant):")


def text_of(value: Any, field: str) -> str:
    """``value`` if it is text that says something. Raises RowError."""
    if value is None:
        raise RowError(field, "missing")
    if not isinstance(value, str):
        raise RowError(field, f"must be text, got {_named(value)}")
    if not value.strip():
        raise RowError(field, "is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(field, f"holds half a character ({value[error.start]!r}): not valid Unicode") from None
    return value


def messages_of(value: Any, field: str) -> list[Message]:
    """OpenAI's messages with role and content alone, content as one text. Raises RowError."""
    if not isinstance(value, list) or not value:
        raise RowError(field, f"must be text or a list of messages, got {_named(value)}")
    messages = []
    for index, message in enumerate(value):
        where = f"{field}[{index}]"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise RowError(where, f"a message needs 'role' and 'content', got {_named(message)}")
        role = message["role"]
        if role not in ROLES:
            raise RowError(f"{where}.role", f"unknown role {role!r:.40}; known: {', '.join(ROLES)}")
        if message.get("tool_calls"):
            raise RowError(f"{where}.tool_calls", "calls of tools are not read; write them into the content")
        messages.append({"role": role, "content": _content(message["content"], f"{where}.content")})
    return messages


def sharegpt_messages(value: Any, field: str) -> list[Message]:
    """ShareGPT's list of from and value. Raises RowError."""
    if not isinstance(value, list) or not value:
        raise RowError(field, f"must be a list of turns, got {_named(value)}")
    messages = []
    for index, turn in enumerate(value):
        where = f"{field}[{index}]"
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise RowError(where, f"a turn needs 'from' and 'value', got {_named(turn)}")
        role = SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            raise RowError(f"{where}.from", f"unknown speaker {turn['from']!r:.40}; known: {', '.join(SHAREGPT_ROLES)}")
        messages.append({"role": role, "content": text_of(turn["value"], f"{where}.value")})
    return messages


def is_hh(value: Any) -> bool:
    """Whether this is a transcript as Anthropic writes it."""
    return isinstance(value, str) and value.lstrip().startswith("Human:")


def hh_messages(value: Any, field: str) -> list[Message]:
    """Anthropic's transcript: a blank line and "Human:" or "Assistant:" begin a turn.

    Where one speaker's turns follow each other they are one turn. The assistant's last turn may be empty.

    Raises:
        RowError: no transcript, or an empty turn of the user.
        RowDropped: another turn of the assistant is empty.
    """
    if not is_hh(value):
        raise RowError(field, f"must be a transcript that begins with 'Human:', got {_named(value)}")
    text_of(value, field)
    pieces = _HH_TURN.split(value.strip())
    messages: list[Message] = []
    for speaker, said in zip(pieces[1::2], pieces[2::2], strict=True):
        role, content = ("user" if speaker == "Human" else "assistant"), said.strip()
        if messages and messages[-1]["role"] == role:
            content = f"{messages.pop()['content']}\n\n{content}".strip()
        messages.append({"role": role, "content": content})
    for index, message in enumerate(messages):
        if not message["content"] and message["role"] == "user":
            raise RowError(field, f"turn {index} of the transcript is empty")
        if not message["content"] and index < len(messages) - 1:
            raise RowDropped("the assistant once said nothing")
    return messages


def prompt_of(value: Any, field: str) -> list[Message]:
    """A prompt that is text, a transcript as Anthropic writes it, or messages. Raises RowError."""
    if is_hh(value):
        messages = hh_messages(value, field)
        if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
            messages.pop()
    elif isinstance(value, list):
        messages = messages_of(value, field)
    else:
        messages = [{"role": "user", "content": text_of(value, field)}]
    return check_prompt(messages, field)


def check_prompt(messages: list[Message], field: str) -> list[Message]:
    """``messages`` if it is the assistant's turn after them. Raises RowError."""
    if not messages or messages[-1]["role"] in ("assistant", "system"):
        last = messages[-1]["role"] if messages else "nothing"
        raise RowError(field, f"a prompt must end with the user's turn, got {last}")
    if not any(message["role"] == "user" for message in messages):
        raise RowError(field, "a prompt needs a turn of the user")
    return messages


def last_turn(messages: list[Message], field: str) -> tuple[list[Message], str]:
    """(prompt, response without blanks around it) of a conversation that ends with the assistant's turn.

    Raises RowError.
    """
    if messages[-1]["role"] != "assistant":
        raise RowError(field, f"must end with the assistant's turn, got {messages[-1]['role']}")
    return check_prompt(messages[:-1], field), messages[-1]["content"].strip()


def response_of(value: Any, field: str) -> str:
    """A response that is text, or one message of the assistant, without blanks around it. Raises RowError."""
    if not isinstance(value, list):
        return text_of(value, field).strip()
    messages = messages_of(value, field)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages)
        raise RowError(field, f"must be one message of the assistant behind the prompt, got {roles}")
    return messages[0]["content"].strip()


def common_prompt(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], str, str]:
    """(prompt, better response, worse response) of two conversations that share all but the last turn.

    Raises:
        RowError: one of them does not end with the assistant's turn.
        RowDropped: they part before the last turn.
    """
    prompt, better = last_turn(chosen, "chosen")
    other, worse = last_turn(rejected, "rejected")
    if prompt != other:
        raise RowDropped("chosen and rejected part before the last turn")
    return prompt, better, worse


def first_user_turn(messages: list[Message]) -> str:
    """What tells prompts apart when data is split: blanks count for nothing."""
    said = next((message["content"] for message in messages if message["role"] == "user"), messages[0]["content"])
    return " ".join(said.split())


def _content(value: Any, field: str) -> str:
    if not isinstance(value, list):
        return text_of(value, field)
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RowError(f"{field}[{index}]", f"only parts of type 'text' are read, got {_named(part)}")
    return text_of("".join(text_of(part.get("text"), field) for part in value), field)


def _named(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r:.60}"
