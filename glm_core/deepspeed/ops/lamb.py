"""DeepSpeed's LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from glm_core.deepspeed.ops.one_by_one import OneByOne
from glm_core.errors import ConfigError


class FusedLamb(OneByOne):
    """LAMB: u = m / (sqrt(v) + eps) + decay w;  w -= lr' r u, with the trust ratio r = |w| / |u|
    clamped to [min_coeff, max_coeff], Adam's m and v, and lr' = lr sqrt(1 - b2^t) / (1 - b1^t). As
    in DeepSpeed's kernel (csrc/lamb, 0.19.8) the bias is corrected outside the trust ratio. Norms
    are of whole parameters, so the optimizer's parameters must be whole, or DTensors."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
    ) -> None:
        """Raises ConfigError for amsgrad, and for max_grad_norm, in whose place the engine has
        gradient_clipping."""
        if amsgrad or max_grad_norm:
            raise ConfigError(
                "FusedLamb: amsgrad and max_grad_norm are not supported; remove them, and set "
                "gradient_clipping in the config"
            )
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
        }
        super().__init__(params, defaults)
        self.eps_inside_sqrt = eps_inside_sqrt
        self.lamb_coeffs: list[torch.Tensor] = []

    def get_lamb_coeffs(self) -> list[float]:
        """Returns the last step's trust ratios, by parameter."""
        return [float(c) for c in self.lamb_coeffs]

    def _begin(self) -> None:
        self.lamb_coeffs.clear()

    def _update(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        state, (beta1, beta2), eps = self.state[p], group["betas"], group["eps"]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        mean = state["exp_avg"].mul_(beta1).add_(p.grad, alpha=1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        scale = (square + eps).sqrt() if self.eps_inside_sqrt else square.sqrt() + eps
        update = (mean / scale).add_(p, alpha=group["weight_decay"])
        ratio = p.norm() / update.norm()
        ratio = torch.where(
            torch.isfinite(ratio) & (ratio > 0),
            ratio.clamp(group["min_coeff"], group["max_coeff"]),
            torch.ones_like(ratio),
        )
        self.lamb_coeffs.append(ratio)
        rate = group["lr"]
        if group["bias_correction"]:
            rate *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        p.sub_(update.mul_(ratio * rate))
