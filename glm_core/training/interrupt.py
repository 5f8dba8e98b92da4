"""Handles Ctrl-C and SIGTERM in a run: the first one asks it to stop cleanly, the second stops
it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Yields a list to which the first SIGINT or SIGTERM is added instead of being obeyed; the
    second one acts as before. Outside the main thread, where Python takes no signals, nothing
    changes."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def record(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
        else:
            # not print: the signal may have come in the middle of one, which must not be re-entered
            os.write(2, b"\nfinishing the step, then saving; once more stops at once\n")

    before = {number: signal.signal(number, record) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
