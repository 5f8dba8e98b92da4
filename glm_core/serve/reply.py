"""A request on its way through the engine, seen from asyncio: the reply as a stream of text."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from starlette.requests import Request

from glm_core.errors import GlmCoreError
from glm_core.model.prompt import Prompt
from glm_core.model.sample import Sampling, TokenLogprob
from glm_core.serve.detokenizer import Detokenizer
from glm_core.serve.engine import Engine, Event


class Chunk(NamedTuple):
    """The next part of a reply."""

    text: str
    finish_reason: str
    """`stop` or `length` in the last chunk, else empty"""
    num_tokens: int
    """tokens generated so far"""
    logprobs: tuple[TokenLogprob, ...] = ()
    """of the tokens since the last chunk, where the request asks for them"""


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

    @property
    def num_reused_tokens(self) -> int:
        """Tokens of the prompt that an earlier one had left in the cache; 0 before it is read."""
        generation = self._ticket.generation
        return (generation and generation.reused) or 0

    async def chunks(self) -> AsyncIterator[Chunk]:
        """Yields the reply as it is generated, fewer chunks if the client is gone. Raises
        GlmCoreError if the model fails."""
        num_tokens, logprobs = 0, list[TokenLogprob]()
        try:
            while True:
                event = await self._events.get()
                if event.error:
                    raise event.error
                num_tokens += len(event.tokens)
                logprobs += event.logprobs
                text = self._detokenizer.feed(event.tokens, last=bool(event.finish))
                finish = "stop" if self._detokenizer.stopped else event.finish
                if text or finish:
                    yield Chunk(text, finish, num_tokens, tuple(logprobs))
                    logprobs.clear()
                if finish:
                    return
        finally:
            self.close()

    async def whole(self) -> Chunk:
        """Returns the complete reply as one chunk. Raises GlmCoreError if the model fails."""
        chunks = [chunk async for chunk in self.chunks()]
        text, logprobs = "".join(c.text for c in chunks), [p for c in chunks for p in c.logprobs]
        return Chunk(text, chunks[-1].finish_reason, chunks[-1].num_tokens, tuple(logprobs))

    def close(self) -> None:
        """Takes the request out of the engine, if it is still there."""
        self._disconnect_watch.cancel()
        self._engine.cancel(self._ticket)

    async def _cancel_on_disconnect(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._engine.cancel(self._ticket)
        self._events.put_nowait(Event([], "cancelled"))


class Choices:
    """The replies to one request, each drawn with a seed of its own. All are queued, or none
    (raises PromptError, BusyError)."""

    def __init__(self, make: Callable[[int], Reply], number: int) -> None:
        """make: queues the reply of this index."""
        self.replies: list[Reply] = []
        try:
            for index in range(number):
                self.replies.append(make(index))
        except GlmCoreError:
            self.close()
            raise

    @property
    def prompt_tokens(self) -> tuple[int, int]:
        """Tokens of the prompt, which all replies share, and how many of them were in the cache
        when the first reply began."""
        return self.replies[0].num_prompt_tokens, self.replies[0].num_reused_tokens

    async def whole(self) -> list[Chunk]:
        """Returns all complete replies. Raises GlmCoreError if the model fails."""
        try:
            return await asyncio.gather(*(reply.whole() for reply in self.replies))
        finally:
            self.close()

    async def chunks(self) -> AsyncIterator[tuple[int, Chunk]]:
        """Yields the chunks of all replies as they come, each with the index of its reply. Raises
        GlmCoreError if the model fails."""
        queue: asyncio.Queue[tuple[int, Chunk | GlmCoreError | None]] = asyncio.Queue()

        async def pass_on(index: int, reply: Reply) -> None:
            try:
                async for chunk in reply.chunks():
                    queue.put_nowait((index, chunk))
                queue.put_nowait((index, None))
            except GlmCoreError as error:
                queue.put_nowait((index, error))

        tasks = [asyncio.create_task(pass_on(i, r)) for i, r in enumerate(self.replies)]
        running = len(tasks)
        try:
            while running:
                index, item = await queue.get()
                if isinstance(item, GlmCoreError):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield index, item
        finally:
            for task in tasks:
                task.cancel()
            self.close()

    def close(self) -> None:
        """Takes the request out of the engine."""
        for reply in self.replies:
            reply.close()
