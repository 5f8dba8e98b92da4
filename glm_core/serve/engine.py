"""Runs concurrent requests in the slots of one KV cache (continuous batching).

One thread runs the model. `submit` returns a Ticket; the thread passes new tokens to the ticket's
`deliver` callback."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.errors import ConfigError, GlmCoreError
from glm_core.model.generate import Decoder
from glm_core.model.generation import Generation
from glm_core.model.loras import LoRAs
from glm_core.model.prompt import Prompt
from glm_core.model.runner import CHUNK, Runner
from glm_core.model.sample import Sampling, TokenLogprob
from glm_core.pretrained.chat_model import ChatModel
from glm_core.serve.metrics import Metrics


class BusyError(GlmCoreError):
    """All slots are taken and the queue is full."""


class StoppedError(GlmCoreError):
    """The engine is stopped; it completes no reply."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down; ask again when it is back")


class Event(NamedTuple):
    """New tokens of a request since the last event."""

    tokens: list[int]
    finish: str
    """empty while the request runs; see Generation.finish"""
    error: GlmCoreError | None = None
    logprobs: Sequence[TokenLogprob] = ()
    """of these tokens, where the request asks for them"""


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request in the engine."""

    prompt: Prompt
    sampling: Sampling
    deliver: Callable[[Event], None]
    arrived: float
    """time.perf_counter() at submission, seconds"""
    cancelled: bool = False
    generation: Generation | None = None
    """None while the request waits"""
    num_delivered: int = 0
    """tokens passed to `deliver`"""


class Engine:
    """Runs up to `slots` requests; at most `queue` more wait. The cache is allocated once, so
    memory is bounded by both."""

    def __init__(
        self,
        chat_model: ChatModel,
        backend: Backend,
        *,
        slots: int = 16,
        queue: int = 256,
        length: int | None = None,
        chunk: int = CHUNK,
        loras: LoRAs | None = None,
        speculate: int = 0,
        exact: bool = False,
    ) -> None:
        """length: tokens of a slot, prompt and reply together; None: the model's context. chunk:
        tokens of a prompt that are read at a time; prompts that begin alike share whole chunks.
        loras: adapters that a prompt may name. speculate: tokens that are drafted at a time for a
        request that runs alone. exact: as in `registry.use`."""
        self.chat_model, self._backend, self.queue = chat_model, backend, queue
        self._exact = exact
        self.adapters = loras.names if loras else []
        self.metrics = Metrics()
        with registry.use(backend, exact=exact):
            runner = Runner(chat_model.model, slots, length, chunk, loras, speculate)
            self._decoder = Decoder(runner, num_ids=chat_model.tokenizer.vocab, reuse=True)
        self.slots, self.length = slots, runner.length
        self.cache_bytes = runner.cache.num_bytes
        self._waiting: deque[Ticket] = deque()
        self._running: list[Ticket] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="glm-core engine", daemon=True)
        self._thread.start()

    def submit(
        self, prompt: Prompt, sampling: Sampling, deliver: Callable[[Event], None]
    ) -> Ticket:
        """Queues a request. `deliver` is called from the engine's thread. Raises PromptError for a
        prompt that leaves no room for a reply, BusyError if the queue is full, StoppedError after
        `stop`."""
        self._decoder.runner.require_room(prompt)
        ticket = Ticket(prompt, sampling, deliver, time.perf_counter())
        with self._changed:
            if self._stopping:
                raise StoppedError
            idle = self.slots - len(self._running)
            if len(self._waiting) >= self.queue + idle:
                raise BusyError(
                    f"all {self.slots} slots are taken and {self.queue} requests wait; try again "
                    "later"
                )
            self._waiting.append(ticket)
            self.metrics.waiting.set(len(self._waiting))
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Cancels a request: its slot is freed at the next step, and nothing more is delivered."""
        with self._changed:
            ticket.cancelled = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self.metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    def require_places(self, number: int) -> None:
        """Raises ConfigError for more requests at once than run and wait, however idle it is."""
        if number > self.slots + self.queue:
            raise ConfigError(
                f"n={number}: {self.slots} replies run here and {self.queue} wait; ask for "
                f"{self.slots + self.queue} at most"
            )

    @property
    def load(self) -> tuple[int, int]:
        """Numbers of requests that run and that wait."""
        return len(self._running), len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether the thread that runs the model is alive."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Ends all requests with an error at once, without waiting for the step under way, and
        takes no more. A signal handler may call it: the lock is reentrant."""
        with self._changed:
            self._stopping = True
            tickets = [*self._running, *self._waiting]
            self._changed.notify()
        for ticket in tickets:
            ticket.deliver(Event([], "error", StoppedError()))

    def close(self) -> None:
        """Stops, and waits for the thread."""
        self.stop()
        self._thread.join()

    def _run(self) -> None:
        with registry.use(self._backend, exact=self._exact):
            while not self._stopping:
                try:
                    self._step()
                except GlmCoreError as error:
                    print(f"glm-core: {error}", file=sys.stderr)
                    self._fail(error)
                except Exception as error:  # a bug must not leave all clients waiting
                    traceback.print_exc()
                    self._fail(error)

    def _step(self) -> None:
        self._admit()
        self._release_cancelled()
        begin = time.perf_counter()
        if self._decoder.step():
            self.metrics.step_seconds.observe(time.perf_counter() - begin)
        self._deliver()

    def _fail(self, error: Exception) -> None:
        """Ends all running requests with an error."""
        failure = GlmCoreError(f"generation failed: {type(error).__name__}: {error}")
        with self._changed:
            failed, self._running = self._running, []
            self.metrics.running.set(0)
        self._decoder.clear()
        for ticket in failed:
            ticket.deliver(Event([], "error", failure))

    def _admit(self) -> None:
        """Waits until there is a request, then fills free slots."""
        with self._changed:
            while not (self._waiting or self._running or self._stopping):
                self._changed.wait()
            count = min(self._decoder.free, len(self._waiting))
            tickets = [self._waiting.popleft() for _ in range(count)]
            self._running += tickets
            self.metrics.waiting.set(len(self._waiting))
        for ticket in tickets:
            ticket.generation = self._decoder.begin(ticket.prompt, ticket.sampling)

    def _release_cancelled(self) -> None:
        for ticket in self._running:
            if ticket.cancelled and ticket.generation is not None:
                self._decoder.cancel(ticket.generation)
        self._drop_finished()

    def _deliver(self) -> None:
        """Delivers new tokens."""
        for ticket in self._running:
            generation = ticket.generation
            if generation is None or ticket.cancelled:
                continue
            new = generation.tokens[ticket.num_delivered :]
            if new or generation.finish:
                if not ticket.num_delivered:
                    waited = time.perf_counter() - ticket.arrived
                    self.metrics.first_token_seconds.observe(waited)
                    self.metrics.reused_tokens.inc(generation.reused or 0)
                first, ticket.num_delivered = ticket.num_delivered, len(generation.tokens)
                self.metrics.tokens.inc(len(new))
                logprobs = generation.logprobs[first : ticket.num_delivered]
                ticket.deliver(Event(new, generation.finish, generation.error, logprobs))
        self._drop_finished()

    def _drop_finished(self) -> None:
        with self._changed:
            self._running = [t for t in self._running if not (t.generation and t.generation.finish)]
            self.metrics.running.set(len(self._running))
