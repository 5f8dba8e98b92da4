"""What a GPU that torch calls `cuda` can tell of itself: NVIDIA's, and AMD's and Hygon's through
HIP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from glm_core.backends.base import Backend, Peak
from glm_core.backends.cuda import peaks


class GpuBackend(Backend):
    """Work is queued on torch's current stream of the tensors' device, our kernels too, so
    torch.cuda.stream, events and graphs hold for them."""

    def peak(self, dtype: torch.dtype) -> Peak | None:
        """By the device's name, from the vendor's data sheet."""
        return peaks.peak(torch.cuda.get_device_name(self.device()), dtype)

    def memory_peak_bytes(self) -> int:
        """The most that tensors held since the start, without the allocator's own reserve."""
        return int(torch.cuda.max_memory_allocated(self.device()))

    def elapsed_ms(self, work: Callable[[], Any]) -> float:
        """Device time of `work` between two events of the current stream."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))
