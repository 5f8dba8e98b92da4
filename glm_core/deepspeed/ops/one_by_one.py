"""The base of optimizers that update their parameters one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class OneByOne(torch.optim.Optimizer):
    """An optimizer whose subclass updates one parameter in `_update`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient. Returns the closure's loss, if there is
        one."""
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
        """Runs before the first parameter of a step."""

    def _update(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError
