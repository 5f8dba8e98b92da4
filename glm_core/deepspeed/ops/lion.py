"""DeepSpeed's Lion classes (Chen et al. 2023, arXiv:2302.06675, algorithm 2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from glm_core.deepspeed.ops.one_by_one import OneByOne


class FusedLion(OneByOne):
    """Lion: c = b1 m + (1 - b1) g;  w = (1 - lr decay) w - lr sign(c);  m = b2 m + (1 - b2) g.
    Where c is 0 the weight does not move, as in the paper; DeepSpeed's kernels move it by lr."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
    ) -> None:
        """set_grad_none has no effect: gradients are always set to None."""
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def _update(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state["exp_avg"] = torch.zeros_like(p)
        momentum = state["exp_avg"]
        p.mul_(1 - group["lr"] * group["weight_decay"])
        direction = momentum.mul(beta1).add_(p.grad, alpha=1 - beta1).sign_()
        p.add_(direction, alpha=-group["lr"])
        momentum.mul_(beta2).add_(p.grad, alpha=1 - beta2)


class DeepSpeedCPULion(FusedLion):
    """FusedLion on whatever device the weights are; nothing is offloaded here."""

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        fp32_optimizer_states: bool = True,
    ) -> None:
        """See FusedLion; some arguments have other names, as in DeepSpeed. States are float32."""
        super().__init__(model_params, lr, betas, weight_decay)
