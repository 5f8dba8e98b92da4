"""`torch.sim`: what PyTorch and glm_core ask of a device module."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch

_calls = torch.ops.sim


def is_available() -> bool:
    """Always: the device is this process's own."""
    return True


def device_count() -> int:
    """One."""
    return 1


def current_device() -> int:
    """The only one."""
    return 0


def set_device(index: int) -> None:
    """Raises ValueError for any other than device 0."""
    if index != 0:
        raise ValueError(f"sim:{index}: no such device; this machine has sim:0 only")


def device(_: object) -> contextlib.nullcontext[None]:
    """`with torch.sim.device(0):`, which needs no switching."""
    return contextlib.nullcontext()


def is_initialized() -> bool:
    """Always: importing vendor_sim starts the device."""
    return True


def _is_in_bad_fork() -> bool:
    return False  # a forked process is refused by the driver, with its own message


def synchronize(device: object = None) -> None:
    """Returns when the queue is empty. Raises what a kernel raised, and torch.AcceleratorError
    where the device is lost or the queue not empty after the timeout."""
    _calls.synchronize()


def set_timeout(seconds: float) -> None:
    """How long any wait may take before the device counts as lost (default 30 s)."""
    _calls.set_timeout(seconds)


def pending() -> int:
    """Kernels queued or running."""
    return _calls.pending()


def memory_allocated(device: object = None) -> int:
    """Bytes of device memory in use."""
    return _calls.memory()[0]


def max_memory_allocated(device: object = None) -> int:
    """Most bytes in use since the start, or since `reset_peak_memory_stats`."""
    return _calls.memory()[1]


def reset_peak_memory_stats(device: object = None) -> None:
    """The peak starts anew from what is in use now."""
    _calls.reset_peak()


def mem_get_info(device: object = None) -> tuple[int, int]:
    """Free and total bytes."""
    allocated, _, limit = _calls.memory()
    return limit - allocated, limit


def empty_cache() -> None:
    """Nothing is cached: freed memory is free at once."""


def get_rng_state(device: object = None) -> torch.Tensor:
    """The generator's seed and offset, 16 bytes."""
    return _calls.rng_state()


def set_rng_state(state: torch.Tensor, device: object = None) -> None:
    """Restores what `get_rng_state` returned."""
    _calls.set_rng_state(state)


def manual_seed(seed: int) -> None:
    """Seeds the device's generator; torch.manual_seed does so too."""
    _calls.manual_seed(seed)


manual_seed_all = manual_seed


def get_amp_supported_dtype() -> list[torch.dtype]:
    """Dtypes of torch.autocast."""
    return [torch.bfloat16, torch.float16]


class HostRun(NamedTuple):
    """What one op cost that the runtime sent to the host."""

    calls: int
    seconds: float
    """copies there and back included, waiting for the queue not"""
    bytes: int
    """copied there and back"""


def fallbacks() -> dict[str, HostRun]:
    """The aten ops that this runtime has run on the host instead of the device, by name."""
    table = _calls.fallbacks()
    return {op: HostRun(int(c), s, int(b)) for op, (c, s, b) in sorted(table.items())}


def fallback_counts() -> dict[str, int]:
    """The calls alone."""
    return {op: run.calls for op, run in fallbacks().items()}


def reset_fallbacks() -> None:
    """Forgets them."""
    _calls.reset_fallbacks()
