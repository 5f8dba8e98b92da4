"""Wrong kernels of the norms, each with one mistake in it; `bugs` says what they are.
Shapes: D width, N rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glm_core import ops
from glm_core.faults.variants import Arguments, Function, Gradients
from glm_core.faults.wrong import half_away, through
from glm_core.ops.precision import wide


def added(norm: Function) -> Function:
    """The fused op of a norm: the sum with the residual, then `norm`."""

    def kernel(x: Tensor, residual: Tensor, alpha: float, **rest: Any) -> tuple[Tensor, Tensor]:
        total = (wide(x) + alpha * wide(residual)).to(x.dtype)
        return norm(x=total, **rest), total

    return kernel


def alpha_forgotten(a: Arguments, found: Gradients) -> Gradients:
    """The residual's gradient is that of x."""
    del a
    return {"residual": found["x"]}


def half_away_residual(x: Tensor, residual: Tensor, alpha: float, **rest: Any) -> Any:
    """The sum with the residual rounds ties away from zero."""
    total = half_away(wide(x) + alpha * wide(residual))
    return ops.layer_norm.reference(total, **rest), total


def unbiased_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    t = wide(x)
    y = (t - t.mean(-1, keepdim=True)) * torch.rsqrt(t.var(-1, keepdim=True) + eps)
    return (y * wide(weight) + wide(bias)).to(x.dtype)


def eps_outside_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    t = wide(x)
    return (t / (t.square().mean(-1, keepdim=True).sqrt() + eps) * wide(weight)).to(x.dtype)


def low_sum_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The mean square is summed in bfloat16, one element after another."""
    t = wide(x)
    squares, total = t.square(), torch.zeros_like(t[..., :1])
    for i in range(t.shape[-1]):
        total = through(torch.bfloat16)(total + squares[..., i : i + 1])
    return (t * torch.rsqrt(total / t.shape[-1] + eps) * wide(weight)).to(x.dtype)


def no_mean_gradient(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Gradients as if the mean were a constant."""
    t = wide(x)
    t = t - t.mean(-1, keepdim=True).detach()
    y = t * torch.rsqrt(t.square().mean(-1, keepdim=True) + eps)
    return (y * wide(weight) + wide(bias)).to(x.dtype)


def no_projection_gradient(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gradients as if the root mean square were a constant."""
    t = wide(x)
    root = torch.rsqrt(t.square().mean(-1, keepdim=True) + eps).detach()
    return (t * root * wide(weight)).to(x.dtype)


def without_tail(tile: int, *names: str) -> Callable[[Function], Callable[..., Any]]:
    """For reductions over rows: only whole tiles of `tile` rows reach the gradient of `names`."""

    def wrap(norm: Function) -> Function:
        def kernel(x: Tensor, **rest: Any) -> Tensor:
            rows = x.flatten(0, -2)
            cut = rows.shape[0] // tile * tile
            fixed = {k: v.detach() if k in names else v for k, v in rest.items()}
            parts = norm(x=rows[:cut], **rest), norm(x=rows[cut:], **fixed)
            return torch.cat(parts).view_as(x)

        return kernel

    return wrap


def stale_statistics(every: int) -> Function:
    """Layer norm that uses the previous call's mean and variance on every n-th call."""
    calls, last = 0, None

    def kernel(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        nonlocal calls, last
        t = wide(x)
        mean = t.mean(-1, keepdim=True)
        now = mean, (t - mean).square().mean(-1, keepdim=True)
        calls, before, last = calls + 1, last, tuple(s.detach() for s in now)
        if calls % every == 0 and before is not None and before[0].shape == mean.shape:
            now = before
        y = (t - now[0]) * torch.rsqrt(now[1] + eps)
        return (y * wide(weight) + wide(bias)).to(x.dtype)

    return kernel
