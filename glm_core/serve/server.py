"""Runs the HTTP API until a signal ends it: replies under way end with an error that says so."""

from __future__ import annotations

import contextlib
import ipaddress
import signal
import socket
from collections.abc import Iterator
from types import FrameType

import uvicorn

from glm_core.serve import api
from glm_core.serve.engine import Engine
from glm_core.serve.limits import Limits

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """uvicorn's server, which ends all replies at a signal instead of waiting for them."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        settings = uvicorn.Config(
            api.app(engine, limits), log_level="warning", timeout_graceful_shutdown=5
        )
        super().__init__(settings)
        self._engine = engine

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles signals while the server runs. uvicorn's own raises them again at the end, which
        prints a traceback or kills the process before the engine is closed."""
        before = {s: signal.signal(s, self.handle_exit) for s in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ends the replies under way and the server."""
        self._engine.stop()
        super().handle_exit(sig, frame)


def is_open(listening: socket.socket, limits: Limits) -> bool:
    """Whether other machines may reach this socket, and need no key."""
    address = ipaddress.ip_address(listening.getsockname()[0].partition("%")[0])
    return not address.is_loopback and not limits.token
