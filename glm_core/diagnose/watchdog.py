"""Ends a process that stops making progress, with a message that says where it was."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from glm_core import dispatch
from glm_core.versions import co_qualname


class _State:
    seconds = 0.0
    what = ""
    since = 0.0
    stuck_s = 0.0
    stuck_file: TextIO | int = 2


_state = _State()


def beat(what: str) -> None:
    """Reports progress: `what` begins now. Costs nothing outside of a `guard`."""
    _state.what = what
    if _state.seconds:
        _state.since = time.monotonic()
        # a call that hangs without giving the interpreter back stops every Python thread
        faulthandler.dump_traceback_later(_state.stuck_s, exit=True, file=_state.stuck_file)


def begun() -> str:
    """Returns what the last `beat` reported."""
    return _state.what


@contextmanager
def guard(
    seconds: float,
    subject: str,
    way_out: str,
    *,
    on_hang: Callable[[], str] = lambda: "",
    stuck_after_s: float | None = None,
    stuck_file: TextIO | int = 2,
) -> Iterator[None]:
    """Ends the process with exit code 1 if `seconds` pass in the block without a `beat`: a call
    that hangs in a driver cannot be interrupted. 0 guards nothing. Guards do not nest.

    on_hang: called first; its result is printed before the message. A call that never releases the
    interpreter stops even that; then all stacks are written to `stuck_file` after `stuck_after_s`
    (default: twice `seconds` plus 1)."""
    if not seconds:
        yield
        return
    done, thread = threading.Event(), threading.get_ident()
    _state.seconds, _state.stuck_file = seconds, stuck_file
    _state.stuck_s = 2 * seconds + 1 if stuck_after_s is None else stuck_after_s
    beat("start")

    def watch() -> None:
        while not done.wait(max(0.01, _state.since + seconds - time.monotonic())):
            if time.monotonic() >= _state.since + seconds:
                place = _place(thread)  # before anything else moves
                faulthandler.cancel_dump_traceback_later()
                fact = f"{_state.what}: no progress for {seconds:g} s, {place}; {way_out}"
                _end(f"{on_hang()}{subject}: {fact}")

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        _state.seconds = 0.0
        done.set()
        faulthandler.cancel_dump_traceback_later()


def _end(text: str) -> None:
    os.write(2, f"\nglm-core: {text}\n".encode())
    os._exit(1)


def _place(thread: int) -> str:
    """Returns where the thread is: the op that it runs, else its innermost function."""
    frame = innermost = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code is dispatch.run.__code__:
            return f"inside op {frame.f_locals['op'].name}"
        frame = frame.f_back
    return f"inside {co_qualname(innermost.f_code)}" if innermost else "its thread has ended"
