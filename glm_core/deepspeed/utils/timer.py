"""Times the phases of an update: forward, backward and step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager

from glm_core.deepspeed.accelerator.real_accelerator import backend


class PhaseTimer:
    """Milliseconds per phase of one update. The device's queue is emptied before and after each
    phase."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self._ms: dict[str, float] = {}

    def __call__(self, phase: str) -> contextlib.AbstractContextManager[None]:
        """Times the block as part of a phase."""
        return self._timed(phase) if self.enabled else contextlib.nullcontext()

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        backend().synchronize()
        start = time.perf_counter()
        yield
        backend().synchronize()
        self._ms[phase] = self._ms.get(phase, 0.0) + (time.perf_counter() - start) * 1e3

    def take(self) -> dict[str, float]:
        """Returns the milliseconds of each phase since the last call, and resets them."""
        taken, self._ms = self._ms, {}
        return taken
