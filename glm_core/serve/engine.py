"""Concurrent requests over the slots of one cache: who waits, who runs, who is told what.

One thread runs the model. Whoever asks gets a Ticket; tokens reach `deliver`, called from that
thread."""

from __future__ import annotations

import dataclasses
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.errors import GlmCoreError
from glm_core.model.generate import Decoder, Generation
from glm_core.model.prompt import Prompt
from glm_core.model.sample import Sampling
from glm_core.pretrained.source import Source
from glm_core.serve.measure import Measure


class BusyError(GlmCoreError):
    """All slots are taken and as many requests as may wait do wait."""


class Event(NamedTuple):
    """What happened to a request since the last event."""

    tokens: list[int]
    finish: str
    """empty while it goes on; see Generation.finish"""
    error: GlmCoreError | None = None


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request on its way."""

    prompt: Prompt
    sampling: Sampling
    deliver: Callable[[Event], None]
    arrived: float
    cancelled: bool = False
    generation: Generation | None = None
    given: int = 0
    """tokens delivered"""


class Engine:
    """`slots` requests run, at most `queue` wait. Memory is bounded by both: the cache is
    allocated once."""

    def __init__(
        self,
        source: Source,
        backend: Backend,
        *,
        slots: int = 16,
        queue: int = 256,
        length: int | None = None,
    ) -> None:
        self.source, self._backend, self.queue = source, backend, queue
        self.measure = Measure()
        with registry.use(backend):
            self._decoder = Decoder(source.model, slots, length, source.tokenizer.vocab)
        self.slots, self.length = slots, self._decoder.runner.length
        self.cache_bytes = self._decoder.runner.cache.num_bytes
        self._waiting: deque[Ticket] = deque()
        self._running: list[Ticket] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="glm-core engine", daemon=True)
        self._thread.start()

    def submit(
        self, prompt: Prompt, sampling: Sampling, deliver: Callable[[Event], None]
    ) -> Ticket:
        """Queues a request. Raises PromptError for a prompt that cannot be continued, BusyError
        where no more may wait."""
        self._decoder.runner.require_room(prompt)
        ticket = Ticket(prompt, sampling, deliver, time.perf_counter())
        with self._changed:
            idle = self.slots - len(self._running)
            if len(self._waiting) >= self.queue + idle:
                raise BusyError(
                    f"all {self.slots} slots are taken and {self.queue} requests wait; try again "
                    "later"
                )
            self._waiting.append(ticket)
            self.measure.waiting.set(len(self._waiting))
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """The request's slot becomes free at the next step; nothing more is delivered."""
        with self._changed:
            ticket.cancelled = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self.measure.waiting.set(len(self._waiting))
            self._changed.notify()

    @property
    def load(self) -> tuple[int, int]:
        """Requests that run and that wait."""
        return len(self._running), len(self._waiting)

    @property
    def alive(self) -> bool:
        """Does the thread that runs the model?"""
        return self._thread.is_alive()

    def close(self) -> None:
        """Stops the thread; requests under way are told that they were cancelled."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        with registry.use(self._backend):
            while not self._stopping:
                try:
                    self._turn()
                except Exception as error:  # a fault of ours must not leave everybody waiting
                    traceback.print_exc()
                    self._fail(error)
        for ticket in [*self._running, *self._waiting]:
            ticket.deliver(Event([], "cancelled"))

    def _turn(self) -> None:
        self._admit()
        self._release_cancelled()
        begin = time.perf_counter()
        if self._decoder.step():
            self.measure.step_seconds.observe(time.perf_counter() - begin)
        self._tell()

    def _fail(self, error: Exception) -> None:
        """Ends everything that runs with an error."""
        told = GlmCoreError(f"generation failed: {type(error).__name__}: {error}")
        with self._changed:
            failed, self._running = self._running, []
            self.measure.running.set(0)
        self._decoder.clear()
        for ticket in failed:
            ticket.deliver(Event([], "error", told))

    def _admit(self) -> None:
        """Waits for something to do; fills free slots."""
        with self._changed:
            while not (self._waiting or self._running or self._stopping):
                self._changed.wait()
            count = min(self._decoder.free, len(self._waiting))
            tickets = [self._waiting.popleft() for _ in range(count)]
            self._running += tickets
            self.measure.waiting.set(len(self._waiting))
        for ticket in tickets:
            ticket.generation = self._decoder.begin(ticket.prompt, ticket.sampling)

    def _release_cancelled(self) -> None:
        for ticket in self._running:
            if ticket.cancelled and ticket.generation is not None:
                self._decoder.cancel(ticket.generation)
        self._forget()

    def _tell(self) -> None:
        """Delivers what is new."""
        for ticket in self._running:
            g = ticket.generation
            if g is None or ticket.cancelled:
                continue
            new = g.tokens[ticket.given :]
            if new or g.finish:
                if not ticket.given:
                    waited = time.perf_counter() - ticket.arrived
                    self.measure.first_token_seconds.observe(waited)
                ticket.given += len(new)
                self.measure.tokens.inc(len(new))
                ticket.deliver(Event(new, g.finish, g.error))
        self._forget()

    def _forget(self) -> None:
        with self._changed:
            self._running = [t for t in self._running if not (t.generation and t.generation.finish)]
            self.measure.running.set(len(self._running))
