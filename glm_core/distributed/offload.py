"""Keeps the masters of a parameter group, their gradient and so the optimizer's state in main
memory, beside a device that holds the parameters (Ren et al. 2021, ZeRO-Offload)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glm_core.distributed.placement import FlatStore
from glm_core.training.offload import has_streams, mark


class HostStore(FlatStore):
    """A FlatStore whose masters are in main memory. Each bucket's gradient is copied there as soon
    as it is reduced, in ZeRO 2 during the backward; `publish` copies rounded masters back, a bucket
    at a time. With `pin` both are page-locked where the device has streams: copies do not wait."""

    def __init__(
        self, params: Sequence[nn.Parameter], *args: Any, pin: bool, **kwargs: Any
    ) -> None:
        """See Shards."""
        self._pin = pin
        self._written: set[int] = set()
        """where buckets begin whose gradient is there"""
        self._low: Tensor | None = None
        """the masters, rounded to the parameters' dtype"""
        super().__init__(params, *args, **kwargs)
        self._grad = self._empty(len(self.master)).zero_()

    def _empty(self, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=self._pin and has_streams(self.device))

    def _keep(self, own: Tensor, place: slice) -> None:
        self.master.grad = self._grad
        if place.start in self._written:
            self._grad[place] += own.cpu()  # waits for the copy before it, too
        else:
            self._grad[place].copy_(own, non_blocking=self._grad.is_pinned())
            self._written.add(place.start)

    def backward_done(self, last: bool) -> None:
        super().backward_done(last)
        arrived = mark(self.device) if last else None
        if arrived is not None:
            arrived.synchronize()

    def zero_grad(self) -> None:
        super().zero_grad()
        self._written.clear()

    def _rounded(self, flat: Tensor, place: slice, dtype: torch.dtype) -> Tensor:
        if flat.data_ptr() != self.master.data_ptr() or dtype == flat.dtype:
            return flat[place].to(self.device, dtype)
        if self._low is None:
            self._low = self._empty(len(flat), dtype)
        low = self._low[place].copy_(flat[place])
        return low.to(self.device, non_blocking=low.is_pinned())
