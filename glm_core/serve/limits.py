"""Limits of requests: API key, size of the body and number of tokens."""

from __future__ import annotations

import dataclasses
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from glm_core.serve.metrics import Metrics

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Event, Receive, Send], Awaitable[None]]

PUBLIC = {("GET", "/"), ("GET", "/health")}
"""requests that need no API key"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for."""

    max_tokens: int = 1024
    """new tokens"""
    max_body: int = 1 << 20
    """bytes"""
    token: str = ""
    """API key; empty: no key is needed"""
    origins: tuple[str, ...] = ()
    """origins whose pages may call the API (CORS); "*": all"""


def error_body(message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """Returns OpenAI's error object; half a surrogate pair in the message is escaped."""
    message = message.encode(errors="backslashreplace").decode()
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class LimitsMiddleware:
    """ASGI middleware that refuses requests without the API key (401) and bodies that are too large
    (413), before it reads them; it counts every response by path and status."""

    def __init__(self, app: App, limits: Limits, metrics: Metrics) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted_send(event: Event) -> None:
            if event["type"] == "http.response.start":
                route = scope.get("route")  # a client's own paths would fill the memory
                path = route.path if route else "other"
                self._metrics.requests.labels(path, event["status"]).inc()
            await send(event)

        headers, limits = dict(scope["headers"]), self._limits
        if limits.token and (scope["method"], scope["path"]) not in PUBLIC:
            received = headers.get(b"authorization", b"")
            if not hmac.compare_digest(received, b"Bearer " + limits.token.encode()):
                message = "authorization: wrong or missing; send the API key"
                await _refuse(counted_send, 401, message)
                return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limits.max_body:
            message = f"body: more than {limits.max_body} bytes; send less"
            await _refuse(counted_send, 413, message)
            return
        await self._app(scope, self._bounded(receive), counted_send)

    def _bounded(self, receive: Receive) -> Receive:
        """Returns a `receive` that ends a body beyond the limit, for requests that do not state its
        length. What is left is no valid JSON."""
        num_bytes = 0

        async def bounded_receive() -> Event:
            nonlocal num_bytes
            event = await receive()
            num_bytes += len(event.get("body", b""))
            if num_bytes > self._limits.max_body:
                return {"type": "http.request", "body": b"", "more_body": False}
            return event

        return bounded_receive


async def _refuse(send: Send, status: int, message: str) -> None:
    body = json.dumps(error_body(message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
