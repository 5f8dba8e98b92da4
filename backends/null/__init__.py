"""Declares the backend that computes shapes only: the reference ops on meta tensors. It measures
memory and FLOPs without arithmetic."""

from __future__ import annotations

import torch

from glm_core.backends.base import Backend


class NullBackend(Backend):
    def synchronize(self) -> None:
        """Returns at once: nothing runs."""

    def rng_state(self) -> torch.Tensor:
        """Returns an empty state: no random numbers are drawn."""
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Ignores the state: no random numbers are drawn."""

    def memory_peak_bytes(self) -> int:
        """Returns zero: meta tensors hold no memory."""
        return 0


backend = NullBackend(
    name="null", device_type="meta", verified="shapes only, by design", references_only=True
)
