"""Defines what records a device's work and replays it as one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Work = Callable[[], torch.Tensor]


class Graphs(Protocol):
    """Records the work that a function queues on a device."""

    def warm_up(self, work: Work) -> torch.Tensor:
        """Runs the work as it will be recorded, so that its kernels are compiled and loaded."""
        ...

    def record(self, work: Work) -> tuple[torch.Tensor, Callable[[], None]]:
        """Returns the work's result, filled by each call of the function returned with it. The work
        itself does not run. Raises RuntimeError where it cannot be recorded."""
        ...
