"""Implements `torch.sim`: the functions that PyTorch and glm_core call on a device module."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch

_calls = torch.ops.sim


def is_available() -> bool:
    """Returns True: every process has its own device."""
    return True


def device_count() -> int:
    """Returns one."""
    return 1


def current_device() -> int:
    """Returns 0, the only device."""
    return 0


def set_device(index: int) -> None:
    """Raises ValueError for any device but 0."""
    if index != 0:
        raise ValueError(f"sim:{index}: no such device; this machine has sim:0 only")


def device(_: object) -> contextlib.nullcontext[None]:
    """Serves `with torch.sim.device(0):`; there is nothing to switch."""
    return contextlib.nullcontext()


def is_initialized() -> bool:
    """Returns True: importing vendor_sim starts the device."""
    return True


def _is_in_bad_fork() -> bool:
    return False  # a forked process is refused by the driver, with its own message


def synchronize(device: object = None) -> None:
    """Waits until the queue is empty. Raises the error of a kernel, or torch.AcceleratorError where
    the device is lost or the queue is not empty after the timeout."""
    _calls.synchronize()


class Event:
    """A point in the device's queue."""

    def record(self, stream: Stream | None = None) -> None:
        """Marks what is queued now; the queue has one order, so waiting for all of it will do."""

    def wait(self, stream: Stream | None = None) -> None:
        """Does nothing: what is queued later runs later."""

    def synchronize(self) -> None:
        """Waits on the host."""
        synchronize()


class Stream:
    """The device's one queue, under as many names as a program makes."""

    stream_id = 0
    device_index = 0
    device_type = int(torch._C._autograd.DeviceType.PrivateUse1)
    """torch's number of the device; FSDP asks for these three from 2.15 on"""

    def __init__(self, device: object = None, priority: int = 0) -> None:
        """Takes what a stream of other devices takes; neither makes a difference."""

    def record_event(self, event: Event | None = None) -> Event:
        """Returns an event behind what is queued now."""
        return event or Event()

    def wait_event(self, event: Event) -> None:
        """Does nothing: what is queued later runs later."""

    def wait_stream(self, stream: Stream) -> None:
        """Does nothing: it is the same queue."""

    def synchronize(self) -> None:
        """Waits on the host."""
        synchronize()


def current_stream(device: object = None) -> Stream:
    """Returns the queue."""
    return Stream()


default_stream = current_stream


def stream(_: object) -> contextlib.nullcontext[None]:
    """Serves `with torch.sim.stream(s):`; there is nothing to switch."""
    return contextlib.nullcontext()


def set_timeout(seconds: float) -> None:
    """Sets how long a wait may take before the device counts as lost (default 30 s)."""
    _calls.set_timeout(seconds)


def pending() -> int:
    """Returns the number of kernels that are queued or running."""
    return _calls.pending()


def memory_allocated(device: object = None) -> int:
    """Returns the bytes of device memory in use."""
    return _calls.memory()[0]


def max_memory_allocated(device: object = None) -> int:
    """Returns the most bytes in use since the start, or since `reset_peak_memory_stats`."""
    return _calls.memory()[1]


def reset_peak_memory_stats(device: object = None) -> None:
    """Sets the peak to the memory in use now."""
    _calls.reset_peak()


def mem_get_info(device: object = None) -> tuple[int, int]:
    """Returns free and total bytes."""
    allocated, _, limit = _calls.memory()
    return limit - allocated, limit


def empty_cache() -> None:
    """Does nothing: freed memory is never cached."""


def get_rng_state(device: object = None) -> torch.Tensor:
    """Returns the generator's seed and offset, 16 bytes."""
    return _calls.rng_state()


def set_rng_state(state: torch.Tensor, device: object = None) -> None:
    """Restores what `get_rng_state` returned."""
    _calls.set_rng_state(state)


def manual_seed(seed: int) -> None:
    """Seeds the device's generator; torch.manual_seed does so too."""
    _calls.manual_seed(seed)


manual_seed_all = manual_seed


def get_amp_supported_dtype() -> list[torch.dtype]:
    """Returns the dtypes that torch.autocast may use."""
    return [torch.bfloat16, torch.float16]


class HostRun(NamedTuple):
    """The cost of one op that the runtime sent to the host."""

    calls: int
    seconds: float
    """includes copies there and back, not waiting for the queue"""
    bytes: int
    """copied there and back"""


def fallbacks() -> dict[str, HostRun]:
    """Returns the aten ops that this runtime has run on the host instead of the device, by name."""
    table = _calls.fallbacks()
    return {op: HostRun(int(c), s, int(b)) for op, (c, s, b) in sorted(table.items())}


def fallback_counts() -> dict[str, int]:
    """Returns only the number of calls, by aten op."""
    return {op: run.calls for op, run in fallbacks().items()}


def reset_fallbacks() -> None:
    """Sets all these counts to zero."""
    _calls.reset_fallbacks()
