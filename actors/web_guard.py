"""Stands before the web app of a served model: which paths there are, who may ask, and how much.

vLLM's app has more routes than a client needs, and its own key guards some of them only. Here everything that is not
listed is not there, the key is asked on every path but the health check, requests are bounded, and where no key is set
no web page may ask: browsers can be made to reach a server on their own machine, and they then say whose page it is.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any
from urllib.parse import urlsplit

from rayllm.config.serve import is_loopback

OPEN_PATHS = ("/health",)
SERVED_PATHS = ("/health", "/metrics", "/ping", "/version", "/tokenize", "/detokenize")
SERVED_BELOW = "/v1/"
MAX_BODY_BYTES = 8 << 20
"""Of one request: some millions of tokens."""


class Guard:
    """An ASGI app around another.

    Args:
        app: what it guards.
        sha256: of the API key (`key_digest`), so that the key itself shows in no log, dashboard or checkpoint; None
            lets everyone in who is not a web page of elsewhere.
        local: the server listens on this machine only, so that another name for it in a request is a trick (DNS
            rebinding). Of no account with a key.
    """

    def __init__(self, app: Any, *, sha256: str | None, local: bool) -> None:
        self._app, self._sha256, self._local = app, sha256, local

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        refused = self._refused(scope["path"], dict(scope["headers"]))
        if refused is None and scope["type"] == "http":
            return await self._bounded(scope, receive, send)
        if refused is None:
            return await self._app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        await _answer(send, *refused)

    def _refused(self, path: str, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        """Status and reason, or None to go on."""
        if path in OPEN_PATHS:
            return None
        if self._sha256 is not None:
            if not self._has_key(headers):
                return 401, "Missing or wrong API key"
        elif not self._is_own_page(headers):
            return 403, "No other web page may ask here; set api_key_file to serve others"
        if path not in SERVED_PATHS and not path.startswith(SERVED_BELOW):
            return 404, "Nothing is served here"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            return _TOO_LARGE
        return None

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key_digest(token.strip()), self._sha256 or "")

    def _is_own_page(self, headers: dict[bytes, bytes]) -> bool:
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin.decode("latin-1")).netloc != host:
            return False
        return not self._local or is_loopback(urlsplit(f"//{host}").hostname or "")

    async def _bounded(self, scope: Any, receive: Any, send: Any) -> None:
        """The app's answer; a body that says nothing of its length and becomes too long is cut off."""
        received, started = 0, False

        async def counted() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise _TooLarge
            return message

        async def noted(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, counted, noted)
        except _TooLarge:
            if not started:
                await _answer(send, *_TOO_LARGE)


class _TooLarge(Exception):
    pass


_TOO_LARGE = 413, f"A request has at most {MAX_BODY_BYTES} bytes"


def key_digest(key: bytes) -> str:
    """Hex SHA-256 of an API key."""
    return hashlib.sha256(key).hexdigest()


async def _answer(send: Any, status: int, message: str) -> None:
    error = {"message": message, "type": "invalid_request_error", "code": status}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
