"""One request's way through the engine, seen from asyncio."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from starlette.requests import Request

from glm_core.model.prompt import Prompt
from glm_core.model.sample import Sampling
from glm_core.serve.engine import Engine, Event
from glm_core.serve.text import TextStream


class Piece(NamedTuple):
    """Some more of the answer."""

    text: str
    finish: str
    """`stop` or `length` with the last piece"""
    num_tokens: int
    """generated so far"""


class Answer:
    """A request that is queued from construction on (raises PromptError, BusyError) and leaves the
    engine when it is complete, or its client is gone, or `close` is called."""

    def __init__(
        self,
        engine: Engine,
        request: Request,
        prompt: Prompt,
        sampling: Sampling,
        stops: Sequence[str] = (),
        spoken: bool = False,
    ) -> None:
        """spoken: it is somebody's word, which whitespace does not begin."""
        self._engine, self._request = engine, request
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._text = TextStream(engine.source.tokenizer.decode, stops, spoken)
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the server's loop has ended
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._ticket = engine.submit(prompt, sampling, deliver)
        self.num_prompt_tokens = len(prompt.tokens)
        engine.measure.prompt_tokens.inc(self.num_prompt_tokens)
        self._watch = asyncio.create_task(self._until_gone())

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer as it comes; ends early if the client is gone. Raises GlmCoreError where the
        model fails."""
        num_tokens = 0
        try:
            while True:
                event = await self._events.get()
                if event.error:
                    raise event.error
                num_tokens += len(event.tokens)
                text = self._text.feed(event.tokens, last=bool(event.finish))
                finish = "stop" if self._text.stopped else event.finish
                if text or finish:
                    yield Piece(text, finish, num_tokens)
                if finish:
                    return
        finally:
            self.close()

    async def whole(self) -> Piece:
        """All of it at once."""
        parts = [piece async for piece in self.pieces()]
        return Piece("".join(p.text for p in parts), parts[-1].finish, parts[-1].num_tokens)

    def close(self) -> None:
        """Frees the slot, if it still has one."""
        self._watch.cancel()
        self._engine.cancel(self._ticket)

    async def _until_gone(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._engine.cancel(self._ticket)
        self._events.put_nowait(Event([], "cancelled"))
