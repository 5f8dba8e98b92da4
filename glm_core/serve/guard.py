"""What a request must satisfy before it is read: its size, and who sends it."""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from glm_core.serve.measure import Measure

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN = {("GET", "/"), ("GET", "/health")}
"""what needs no token"""


def problem(message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class Guard:
    """ASGI: refuses bodies over `max_body` bytes (413, before they are read whole) and, with a
    token, requests without it (401); counts every response by path and status."""

    def __init__(self, app: App, max_body: int, token: str, measure: Measure) -> None:
        self._app, self._max_body, self._token, self._measure = app, max_body, token, measure

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = scope.get("route") is not None
                path = scope["path"] if known else "other"  # what people invent is not kept
                self._measure.requests.labels(path, message["status"]).inc()
            await send(message)

        headers = dict(scope["headers"])
        if self._token and (scope["method"], scope["path"]) not in OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._token.encode()):
                await _refuse(counted, 401, "authorization: wrong or missing; send the API key")
                return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body:
            await self._too_large(counted)
            return
        await self._app(scope, self._bounded(receive), counted)

    def _bounded(self, receive: Receive) -> Receive:
        """For bodies that do not say their length: what is too much is cut off, and so is no valid
        JSON."""
        seen = 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_body:
                return {"type": "http.request", "body": b"", "more_body": False}
            return message

        return bounded

    async def _too_large(self, send: Send) -> None:
        await _refuse(send, 413, f"body: more than {self._max_body} bytes; send less")


async def _refuse(send: Send, status: int, message: str) -> None:
    body = json.dumps(problem(message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
