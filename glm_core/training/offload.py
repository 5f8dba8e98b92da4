"""Keeps an optimizer in main memory: masters and moments live there and the host's AdamW kernel
updates them, so that a device holds weights and gradients alone (Ren et al. 2021, ZeRO-Offload)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from glm_core import dispatch
from glm_core.backends import registry
from glm_core.config import TrainConfig
from glm_core.training.optimizer import Optimizer, own_part

HOST = "cpu"
"""the backend that updates in main memory"""
CHUNK = 2**25
"""elements that are updated together, while the gradients of the next ones are on their way"""


def make_optimizer(
    model: nn.Module, config: TrainConfig, norm: Callable[[dict[str, Tensor]], Tensor] | None = None
) -> Optimizer:
    """Makes the optimizer of a run. With `train.offload_optimizer` it is in main memory, unless the
    model is there already."""
    devices = {own_part(p).device.type for p in model.parameters() if p.requires_grad}
    offloads = config.offload_optimizer and devices != {"cpu"}
    return (OffloadedOptimizer if offloads else Optimizer)(model, config, norm)


class OffloadedOptimizer(Optimizer):
    """The optimizer with its tensors in main memory. An update copies the gradients there, runs
    AdamW there, and copies the new weights back. What is copied is page-locked where the device has
    streams: the gradients of a chunk of parameters then travel while those before are updated. The
    norm is computed on the device."""

    def _place(self) -> None:
        for table in self.master, self.low:
            table |= {n: page_locked(x, self.device) for n, x in table.items()}
        self._grads: dict[str, Tensor] = {}

    @torch.no_grad()
    def _update(
        self, names: list[str], grads: dict[str, Tensor], scale: Tensor, lr: float, decay: float
    ) -> None:
        scale = scale.cpu()
        arrivals = [(part, self._fetch(part, grads)) for part in self._chunks(names)]
        for part, arrived in arrivals:
            if arrived is not None:
                arrived.synchronize()
            outer = dispatch.session()
            with registry.use(HOST, outer.strict) as session:
                super()._update(part, self._grads, scale, lr, decay)
            outer.fallbacks.update(session.fallbacks)
            for n in part:
                source = self.low.get(n, self.master[n])
                self.named[n].copy_(source, non_blocking=source.is_pinned())

    def _chunks(self, names: list[str]) -> Iterator[list[str]]:
        part: list[str] = []
        size = 0
        for n in names:
            if part and size + self.master[n].numel() > CHUNK:
                yield part
                part, size = [], 0
            part.append(n)
            size += self.master[n].numel()
        yield part

    def _fetch(self, names: list[str], grads: dict[str, Tensor]) -> Any:
        """Begins to copy gradients to main memory. Returns the event at which they are there, None
        where they are already."""
        for n in names:
            if n not in self._grads:
                self._grads[n] = page_locked(torch.empty_like(grads[n], device="cpu"), self.device)
            self._grads[n].copy_(grads[n], non_blocking=self._grads[n].is_pinned())
        return mark(self.device)

    @property
    def device(self) -> torch.device:
        """Returns the device of the weights."""
        return next(iter(self.named.values())).device


def page_locked(x: Tensor, device: torch.device) -> Tensor:
    """Returns a copy of a tensor in main memory, page-locked where `device` has streams."""
    host = x.detach().cpu()
    return host.pin_memory() if has_streams(device) else host


def has_streams(device: torch.device) -> bool:
    """Says whether copies to and from the device may run beside its computing."""
    return device.type != "cpu" and hasattr(torch.get_device_module(device.type), "Stream")


def mark(device: torch.device) -> Any:
    """Returns an event behind the work that was submitted to the device so far; None for a device
    whose copies to the host wait for it."""
    if not has_streams(device):
        return None
    event = torch.get_device_module(device.type).Event()
    event.record()
    return event
