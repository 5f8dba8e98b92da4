"""What optimizers whose parameters are updated one by one have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class OneByOne(torch.optim.Optimizer):
    """A subclass says in `_update` what happens to one parameter that has a gradient."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._begin()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _begin(self) -> None:
        """Before the first parameter."""

    def _update(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError
