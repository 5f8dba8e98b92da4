"""Keeps the masters of a parameter group, their gradient and so the optimizer's state in main
memory, beside a device that holds the parameters, in ZeRO 0 to 2 whole (`HostStore`) and in ZeRO 3
this rank's rows of them (`HostZero3Store`; Ren et al. 2021, ZeRO-Offload)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from glm_core.distributed.fsdp import whole
from glm_core.distributed.norm import GradientPart
from glm_core.distributed.placement import FlatStore, Select, Zero3Store
from glm_core.training.offload import has_streams, mark
from glm_core.training.optimizer import own_part


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


class HostZero3Store(Zero3Store):
    """A Zero3Store whose masters are in main memory, a plain tensor of this rank's rows for each
    parameter. The rows on the device, from which FSDP2 gathers, are float32 copies of them. FSDP2
    calls a hook for each gradient that it has reduced: it is copied to main memory at once, and
    leaves the device. With `pin` masters and gradients are page-locked where the device has
    streams, and lie one after another in one piece of memory."""

    def __init__(self, params: Sequence[nn.Parameter], *, pin: bool) -> None:
        super().__init__(params)
        rows = [own_part(p.detach()) for p in params]
        self.device = rows[0].device
        pin = pin and has_streams(self.device)
        sizes = [r.numel() for r in rows]
        masters, grads = (torch.zeros(sum(sizes), pin_memory=pin) for _ in range(2))
        self.masters = [
            nn.Parameter(m.view(r.shape)) for m, r in zip(masters.split(sizes), rows, strict=True)
        ]
        self._master = dict(zip(self.params, self.masters, strict=True))
        self._grad = {
            p: g.view(r.shape)
            for p, g, r in zip(self.params, grads.split(sizes), rows, strict=True)
        }
        self._copied: Any = None
        """the event behind the last copy of a gradient"""
        self.adopt()
        for p in self.params:
            p.register_post_accumulate_grad_hook(self._arrived)

    def master(self, param: nn.Parameter) -> nn.Parameter:
        self._wait()
        return self._master[param]

    @torch.no_grad()
    def _arrived(self, param: nn.Parameter) -> None:
        """Takes a gradient. FSDP2 calls it in the stream that reduced it."""
        assert param.grad is not None
        own, param.grad = own_part(param.grad), None
        master, kept = self._master[param], self._grad[param]
        if master.grad is None:
            master.grad = kept.copy_(own, non_blocking=kept.is_pinned())
            self._copied = mark(self.device)
        else:
            kept += own.cpu()  # waits for the copy before it, too

    def _wait(self) -> None:
        """Returns when the gradients are there."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None

    def gradient_parts(self, copies: Callable[[nn.Parameter], int]) -> list[GradientPart]:
        self._wait()
        found = []
        for p in self.params:
            assert isinstance(p, DTensor)
            grad = self._master[p].grad
            if grad is not None:
                found.append(GradientPart(grad, copies(p) // p.device_mesh.size()))
        return found

    @torch.no_grad()
    def publish(self) -> None:
        """Copies the masters to the rows on the device."""
        for p, master in self._master.items():
            own_part(p).copy_(master, non_blocking=master.is_pinned())

    @torch.no_grad()
    def adopt(self) -> None:
        """Sets the masters from the rows on the device."""
        for p, master in self._master.items():
            master.copy_(own_part(p))

    def zero_grad(self) -> None:
        super().zero_grad()
        self._wait()
        for master in self.masters:
            master.grad = None

    def full(self, param: nn.Parameter, select: Select) -> Tensor | None:
        value = select(self.master(param))
        if not isinstance(value, Tensor) or value.shape != self._master[param].shape:
            return value
        assert isinstance(param, DTensor)
        return whole(param, value).detach()
