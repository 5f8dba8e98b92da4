"""Keeps the experts of a mixture evenly loaded by their routers' biases, without a loss.

Shapes: X experts, R sparse layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from glm_core.model.glm import Router
from glm_core.training.optimizer import Optimizer

Counts = dict[str, Tensor]
"""by the router's bias: rows that each expert of a layer took [X], float32"""


def moved_bias(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """Returns the router's bias [X] after a step in which the experts took `counts` [X] rows. It is
    raised by `rate` for experts with fewer rows than the mean, and lowered by it for those with
    more. The counts are those of the whole global batch, over all micro-batches and processes.
    Source: Wang et al. 2024 (loss-free balancing), algorithm 1."""
    load = counts.to(bias.dtype)
    return bias + rate * torch.sign(load.mean() - load)


class Balance:
    """Counts the rows that the experts take in a step, and moves the biases after it. A router
    whose bias is frozen is left alone. The biases are among the optimizer's weights, so that a
    checkpoint holds them."""

    counts: Tensor
    """rows that each expert took since they were last cleared [R, X], float32. A block that is
    computed again in the backward pass counts twice, in all its experts alike"""

    def __init__(self, model: nn.Module, optimizer: Optimizer, rate: float) -> None:
        self.optimizer, self.rate = optimizer, rate
        name_of = {id(p): name for name, p in optimizer.trained.items()}
        routers = [m for m in model.modules() if isinstance(m, Router) and id(m.bias) in name_of]
        self.names = [name_of[id(m.bias)] for m in routers]
        width, device = (len(routers[0].bias), routers[0].bias.device) if routers else (0, None)
        self.counts = torch.zeros(len(routers), width, device=device)
        for router, row in zip(routers, self.counts, strict=True):
            router.register_forward_hook(_counter(row))

    def loads(self, sum_over_processes: Callable[[Counts], Counts]) -> list[list[float]]:
        """Adds up the counts of all processes, and returns those of all layers of the model over
        their layer's mean."""
        whole = sum_over_processes(dict(zip(self.names, self.counts, strict=True)))
        for name, counts in zip(self.names, self.counts, strict=True):
            counts.copy_(whole[name])
        return [[round(x, 4) for x in (c / c.mean()).tolist()] for c in whole.values() if c.any()]

    @torch.no_grad()
    def move_biases(self) -> None:
        """Moves every bias by the counts; a rate of 0 leaves them."""
        if not self.rate:
            return
        for name, counts in zip(self.names, self.counts, strict=True):
            master = self.optimizer.master[name]
            master.copy_(moved_bias(master, counts.to(master.device), self.rate))
            self.optimizer.named[name].copy_(master)


def _counter(row: Tensor) -> Callable[..., None]:
    """Returns a hook on a router that adds to its row of the counts."""

    def count(router: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        chosen = output[0].detach().flatten()
        row.index_add_(0, chosen, row.new_ones(1).expand(len(chosen)))

    return count
