"""A request on its way through the engine, seen from asyncio: the reply as a stream of text."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from starlette.requests import Request

from glm_core.model.prompt import Prompt
from glm_core.model.sample import Sampling
from glm_core.serve.detokenizer import Detokenizer
from glm_core.serve.engine import Engine, Event


class Chunk(NamedTuple):
    """The next part of a reply."""

    text: str
    finish_reason: str
    """`stop` or `length` in the last chunk, else empty"""
    num_tokens: int
    """tokens generated so far"""


class Reply:
    """The reply to a request, which is queued at construction (raises PromptError, BusyError). The
    request leaves the engine when it is complete, its client is gone, or `close` is called."""

    def __init__(
        self,
        engine: Engine,
        request: Request,
        prompt: Prompt,
        sampling: Sampling,
        stop_strings: Sequence[str] = (),
        strip_start: bool = False,
    ) -> None:
        """stop_strings, strip_start: see Detokenizer."""
        self._engine, self._request = engine, request
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        decode = engine.chat_model.tokenizer.decode
        self._detokenizer = Detokenizer(decode, stop_strings, strip_start)
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the server's loop has ended
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._ticket = engine.submit(prompt, sampling, deliver)
        self.num_prompt_tokens = len(prompt.tokens)
        engine.metrics.prompt_tokens.inc(self.num_prompt_tokens)
        self._disconnect_watch = asyncio.create_task(self._cancel_on_disconnect())

    async def chunks(self) -> AsyncIterator[Chunk]:
        """Yields the reply as it is generated, fewer chunks if the client is gone. Raises
        GlmCoreError if the model fails."""
        num_tokens = 0
        try:
            while True:
                event = await self._events.get()
                if event.error:
                    raise event.error
                num_tokens += len(event.tokens)
                text = self._detokenizer.feed(event.tokens, last=bool(event.finish))
                finish = "stop" if self._detokenizer.stopped else event.finish
                if text or finish:
                    yield Chunk(text, finish, num_tokens)
                if finish:
                    return
        finally:
            self.close()

    async def whole(self) -> Chunk:
        """Returns the complete reply as one chunk. Raises GlmCoreError if the model fails."""
        chunks = [chunk async for chunk in self.chunks()]
        return Chunk(
            "".join(c.text for c in chunks), chunks[-1].finish_reason, chunks[-1].num_tokens
        )

    def close(self) -> None:
        """Takes the request out of the engine, if it is still there."""
        self._disconnect_watch.cancel()
        self._engine.cancel(self._ticket)

    async def _cancel_on_disconnect(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._engine.cancel(self._ticket)
        self._events.put_nowait(Event([], "cancelled"))
