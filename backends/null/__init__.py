"""Shapes only: the reference ops on meta tensors. Memory and FLOPs without arithmetic."""

from __future__ import annotations

import torch

from glm_core.backends.base import Backend


class NullBackend(Backend):
    def synchronize(self) -> None:
        """Nothing runs, so nothing is waited for."""

    def rng_state(self) -> torch.Tensor:
        """Empty: nothing is drawn."""
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Nothing is drawn."""

    def memory_peak_bytes(self) -> int:
        """Zero: meta tensors hold no memory."""
        return 0


backend = NullBackend(
    name="null", device_type="meta", verified="shapes only, by design", references_only=True
)
