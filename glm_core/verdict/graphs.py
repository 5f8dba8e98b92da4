"""Decides how programs are handled that run whole graphs: operators that are captured into a CUDA
graph have no values yet, its replay runs kernels that no dispatcher sees, and a compiler's kernels
are judged by the loss of a run without it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def eager() -> Any:
    """Returns a context in which compiled functions run without the compiler: the second curve of
    `--curve N --with glm_core.verdict:eager`."""
    return torch.compiler.set_stance("force_eager")


def captured(device_type: str) -> bool:
    """Says whether operators on this device are captured into a graph now."""
    module: Any = getattr(torch, device_type, None)
    is_capturing = getattr(module, "is_current_stream_capturing", None)
    return is_capturing is not None and bool(is_capturing())


@contextmanager
def replays(notice: Callable[[], None]) -> Iterator[None]:
    """Returns a context in which `notice` is called before each replay of a CUDA graph."""
    graph: Any = getattr(sys.modules.get("torch.cuda.graphs"), "CUDAGraph", None)
    plain = graph.__dict__.get("replay") if graph is not None else None
    if plain is None:
        yield
        return

    def replay(self: Any) -> Any:
        notice()
        return plain(self)

    graph.replay = replay
    try:
        yield
    finally:
        graph.replay = plain
