"""Splits a step's time by the profiler: matmul, attention, other, communication, bubble, data,
host."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from glm_core.backends.base import Backend

PARTS = ("matmul", "attention", "other", "communication", "bubble", "data", "host")
DATA = "glm_core: data"
MATMUL = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "linear",
    "_scaled_mm",
    "linear_few",
    "quantized_linear",
    "mkldnn_linear",
    "matmul_backward",
    "linear_backward",
)
LIBRARIES = ("c10d::", "_c10d_functional::", "nccl:", "gloo:", "hccl:", "record_param_comms")
WAITING = ("recv", "irecv", "wait_tensor")
"""operators in which a stage of a pipeline waits for its neighbour"""

UNLIKE = 1.25
"""largest ratio of a profiled step to the median step of which it is still typical"""


class Event(NamedTuple):
    """The time of one operator without its children."""

    name: str
    seconds: float


def loading() -> AbstractContextManager[Any]:
    """Marks a block as data loading."""
    return record_function(DATA)


def part_of(name: str) -> str | None:
    """Returns the part that an operator belongs to; None for events that are not operators."""
    plain = name.rsplit("::", 1)[-1].lower()
    if name.startswith(LIBRARIES):
        return "bubble" if any(w in plain for w in WAITING) else "communication"
    if name == DATA:
        return "data"
    if "::" not in name or name.startswith(("autograd::", "torch::")):
        return None
    if plain in MATMUL:
        return "matmul"
    return "attention" if "attention" in plain else "other"


def shares(events: Iterable[Event], wall_s: float) -> dict[str, float]:
    """Returns the seconds by part. `host` is the wall time in which no operator ran: Python,
    dispatch, autograd's bookkeeping. Where operators overlap, the parts are scaled to the wall
    time."""
    parts = dict.fromkeys(PARTS, 0.0)
    for event in events:
        if part := part_of(event.name):
            parts[part] += event.seconds
    total = sum(parts.values())
    if total > wall_s:
        return {k: v * wall_s / total for k, v in parts.items()}
    return parts | {"host": wall_s - total}


def measure(step: Callable[[], Any], backend: Backend, rounds: int = 3) -> dict[str, float]:
    """Returns the seconds of one step by part, of the fastest of `rounds`, since a slow spell of
    the machine would count as the step's. The profiler itself slows the host part."""
    step()
    profiles = [_profiled(step, backend) for _ in range(rounds)]
    return min(profiles, key=lambda parts: sum(parts.values()))


def _profiled(step: Callable[[], Any], backend: Backend) -> dict[str, float]:
    on_device = backend.device_type != "cpu"
    activities = [ProfilerActivity.CPU]
    if on_device:
        activities += [a for a in torch.profiler.supported_activities() if a not in activities]
    with profile(activities=activities) as profiler:
        begin = time.perf_counter()
        step()
        if on_device:
            backend.synchronize()
        wall_s = time.perf_counter() - begin
    field = "self_device_time_total" if on_device else "self_cpu_time_total"
    events = [Event(e.key, getattr(e, field) / 1e6) for e in profiler.key_averages()]
    return shares(events, wall_s)


def note(parts: dict[str, float], median_s: float) -> list[str]:
    """Returns a note where the profiled step took much longer or shorter than the measured ones."""
    ratio = sum(parts.values()) / median_s
    if 1 / UNLIKE < ratio < UNLIKE:
        return []
    return [f"the split is of a profiled step that took {ratio:.1f} times the median"]
