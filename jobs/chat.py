"""Talk to a served model in the terminal, or ask it one thing.

Reads messages line by line. When standard input is not a terminal, no prompts are printed and the first error
ends the job, so that ``echo hello | rayllm chat`` prints the answer alone. Answers are printed as plain text
without control characters: a model cannot move the cursor, recolour the terminal or be taken for markup.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TextIO
from urllib.parse import urlsplit

import httpx2
import openai
from rich.console import Console

from rayllm.config.base import Loaded
from rayllm.config.chat import ChatConfig
from rayllm.config.serve import is_loopback
from rayllm.errors import InputError
from rayllm.report.terminal import printable

HELP = """\
/clear            forget the conversation
/system TEXT      set the system message and start again; /system alone removes it
/temperature X    0 always takes the most likely token, 1 samples
/help             this text
/quit             leave, as Ctrl-D does; Ctrl-C stops an answer"""

@dataclass
class Conversation:
    """What has been said, and how answers are sampled."""

    model: str
    temperature: float
    max_tokens: int | None
    system: str | None
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        """The turns, after the system message if there is one."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + self.turns


def run(loaded: Loaded[ChatConfig], console: Console, *, verbose: bool = False) -> None:
    """The `chat` job: chat until /quit, Ctrl-D or the end of the input; with ``config.prompt`` answer that and return.

    Raises:
        InputError: the server cannot be reached, refuses the key, lacks the model or refuses a message.
    """
    config = loaded.config
    with suppress(AttributeError):  # a replaced stdout may not have it
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    with _client(config) as client:
        model = _choose_model(client, config)
        conversation = Conversation(model, config.temperature, config.max_tokens, config.system)
        if config.prompt is None:
            _talk(client, conversation, config.url)
            return
        with _clear_errors(config.url):
            ask(client, conversation, config.prompt, sys.stdout)


def _client(config: ChatConfig) -> openai.OpenAI:
    key = "none"  # the library wants one; a server without a key takes any
    if config.api_key_file is not None:
        try:
            key = config.api_key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"api_key_file: cannot read {config.api_key_file}: {error}") from None
    host = urlsplit(config.url).hostname or ""
    http_client = httpx2.Client(
        trust_env=not is_loopback(host),  # no proxy between this machine and itself
        timeout=httpx2.Timeout(config.timeout_s, connect=10),
    )
    return openai.OpenAI(base_url=config.url, api_key=key, max_retries=0, http_client=http_client)


def _choose_model(client: openai.OpenAI, config: ChatConfig) -> str:
    with _clear_errors(config.url):
        names = [model.id for model in client.models.list().data]
    if not names:
        raise InputError(f"url: the server at {config.url} lists no model")
    if config.model is None:
        return names[0]
    if config.model not in names:
        raise InputError(f"model: {config.url} has no model {config.model!r}; it has: {', '.join(names)}")
    return config.model


@contextmanager
def _clear_errors(url: str) -> Iterator[None]:
    """Turn the client library's exceptions into an InputError of one line."""
    try:
        yield
    except openai.APITimeoutError:
        raise InputError(f"url: {url} does not answer within timeout_s; it may be busy or loading") from None
    except openai.APIConnectionError:
        raise InputError(
            f"url: no server at {url}; start one with `rayllm serve model=FOLDER`, or set url to the address "
            "that it shows"
        ) from None
    except openai.AuthenticationError:
        raise InputError(
            f"api_key_file: the server at {url} wants another key; give the file that it was started with"
        ) from None
    except openai.APIStatusError as error:
        raise InputError(f"{url}: {_server_message(error)} (HTTP {error.status_code})") from None
    except (openai.APIError, httpx2.HTTPError) as error:
        raise InputError(f"{url}: the answer broke off: {error}") from None


def _server_message(error: openai.APIStatusError) -> str:
    body: Any = error.body
    message = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(message or error.response.text or "no reason given").split())[:500]


def ask(client: openai.OpenAI, conversation: Conversation, text: str, out: TextIO) -> str | None:
    """Send ``text``, write the answer to ``out`` as it comes, and add both to the conversation.

    A request that fails leaves no trace in the conversation; Ctrl-C keeps what came so far and goes on up.

    Returns:
        Why the answer ended: "stop" or "length".
    """
    limit: dict[str, Any] = {} if conversation.max_tokens is None else {"max_tokens": conversation.max_tokens}
    user: Any = {"role": "user", "content": text}
    messages: Any = [*conversation.messages(), user]
    stream: Any = client.chat.completions.create(
        model=conversation.model,
        messages=messages,
        temperature=conversation.temperature,
        stream=True,
        **limit,
    )
    pieces: list[str] = []
    try:
        with stream:
            reason = _copy(stream, pieces, out)
    except KeyboardInterrupt:
        conversation.turns += [user, {"role": "assistant", "content": "".join(pieces)}]
        raise
    finally:
        out.write("\n")
        out.flush()
    conversation.turns += [user, {"role": "assistant", "content": "".join(pieces)}]
    return reason


def _copy(stream: Iterable[Any], pieces: list[str], out: TextIO) -> str | None:
    reason = None
    for chunk in stream:
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            reason = choice.finish_reason or reason
            out.write(printable(pieces[-1]))
            out.flush()
    return reason


def _talk(client: openai.OpenAI, conversation: Conversation, url: str) -> None:
    interactive = sys.stdin.isatty()
    console = Console(stderr=not interactive, highlight=False)  # piped: only answers go to stdout
    if interactive:
        greeting = f"Talking to {conversation.model}. /help lists the commands."
        console.print(greeting, style="dim", markup=False)
    for line in _lines(interactive):
        if line.startswith("/"):
            if not _command(line, conversation, console):
                return
            continue
        if not interactive:
            with _clear_errors(url):
                ask(client, conversation, line, sys.stdout)
            continue
        _ask_kindly(client, conversation, line, url, console)


def _ask_kindly(
    client: openai.OpenAI, conversation: Conversation, line: str, url: str, console: Console
) -> None:
    """Ask; an error or Ctrl-C ends the answer, not the conversation."""
    try:
        with _clear_errors(url):
            reason = ask(client, conversation, line, sys.stdout)
    except KeyboardInterrupt:
        console.print("(stopped)", style="dim")
    except InputError as error:
        console.print(f"{error}\n/clear forgets the conversation.", style="red", markup=False)
    else:
        if reason == "length":
            console.print("(cut off: out of tokens)", style="dim")


def _lines(interactive: bool) -> Iterator[str]:
    """Lines of standard input that are not blank, up to Ctrl-D or the end."""
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input())
    while True:
        try:
            line = input("\n> ") if interactive else _read_line()
        except EOFError:
            if interactive:
                print()
            return
        if line.strip():
            yield line.strip()


def _read_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _command(line: str, conversation: Conversation, console: Console) -> bool:
    """Carry out a line that begins with "/"; False means leave."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    note = ""
    if name in ("/quit", "/exit"):
        return False
    if name == "/clear":
        conversation.turns.clear()
        note = "Forgotten."
    elif name == "/system":
        conversation.system = argument or None
        conversation.turns.clear()
        note = "System message set." if argument else "No system message."
    elif name == "/temperature":
        note = _set_temperature(argument, conversation)
    elif name == "/help":
        note = HELP
    else:
        note = f"{name}: no such command.\n{HELP}"
    console.print(note, style="dim", markup=False)
    return True


def _set_temperature(argument: str, conversation: Conversation) -> str:
    try:
        value = float(argument)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        return f"/temperature {argument}: expected a number >= 0; it stays {conversation.temperature:g}"
    conversation.temperature = value
    return f"Temperature {value:g}."


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("chat")
