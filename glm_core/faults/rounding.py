"""Rounds and sums in other ways than a reference: wrong roundings, and right sums in another
order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glm_core import ops
from glm_core.dispatch import Op
from glm_core.faults.kernels import Function, forward_only
from glm_core.ops.precision import wide

F = torch.nn.functional
Edit = Callable[[Tensor], Tensor]
Sum = Callable[[Tensor], Tensor]
"""[..., D] -> [..., 1]"""
Order = Callable[[int], Tensor]
"""n -> a permutation of 0 ... n - 1"""


# wrong roundings ----------------------------------------------------------------------


def through(dtype: torch.dtype) -> Edit:
    """Returns a function that rounds to `dtype` and back; the gradient passes."""
    return lambda x: x + (x.detach().to(dtype).to(x.dtype) - x.detach())


bf16 = through(torch.bfloat16)


def ten_bits(x: Tensor) -> Tensor:
    """Cuts float32's mantissa to TF32's 10 bits (NVIDIA A100 whitepaper); the gradient passes and
    other dtypes stay as they are."""
    if x.dtype != torch.float32:
        return x
    cut = (x.detach().view(torch.int32) & ~0x1FFF).view(torch.float32)
    return x + (cut - x).detach()


def truncated(x: Tensor) -> Tensor:
    """Cuts float32 to bfloat16, as a kernel does that stores the upper half word."""
    return (x.float().view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()


def half_away(x: Tensor) -> Tensor:
    """Rounds float32 to bfloat16, ties away from zero."""
    return truncated((x.float().view(torch.int32) + 0x8000).view(torch.float32))


def leaning(x: Tensor) -> Tensor:
    """Rounds float32 to bfloat16 at random (repeatable), up with a probability too large by
    1/16."""
    noise = torch.randint(0, 1 << 16, x.shape, generator=torch.Generator().manual_seed(1))
    bits = x.float().view(torch.int32) + (noise + (1 << 12)).clamp(max=0xFFFF).int()
    return truncated(bits.view(torch.float32))


def rough_exp(x: Tensor) -> Tensor:
    """Returns exp with a relative error of up to 1e-4, a function of the argument's binary
    fraction."""
    fraction = torch.frac(x.detach() * 1.4426950408889634)
    return torch.exp(x) * (1 + 1e-4 * torch.sin(6.283185307179586 * fraction))


def rounds(op: Op, rounding: Edit) -> Function:
    """Returns a kernel with the reference's gradients, whose results are computed in float32; where
    the working dtype is bfloat16, `rounding` brings them to it."""

    def kernel(**a: Any) -> Any:
        dtype = a[op.parameters[0]].dtype
        last = rounding if dtype == torch.bfloat16 else lambda t: t.to(dtype)
        up = {k: wide(v) if k in op.differentiable and v is not None else v for k, v in a.items()}
        y = op.reference(**up)
        return tuple(map(last, y)) if isinstance(y, tuple) else last(y)

    return forward_only(op, kernel)


def inside(op: Op, dtype: torch.dtype) -> Function:
    """Returns the reference with all arithmetic in `dtype` and the result in the caller's dtype;
    the op must have no integer tensors."""

    def kernel(**a: Any) -> Any:
        low = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in a.items()}
        with _Narrow(dtype):
            y = op.reference(**low)
        outer = a[op.parameters[0]].dtype
        return tuple(t.to(outer) for t in y) if isinstance(y, tuple) else y.to(outer)

    return kernel


class _Narrow(torch.overrides.TorchFunctionMode):
    """Makes every `.float()` inside give `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].to(self.dtype)
        return func(*args, **(kwargs or {}))


# right arithmetic in another precision or order -----------------------------------------


def double(x: Any) -> Any:
    """Returns floating-point tensors as float64, alone or in lists; anything else as it is."""
    if isinstance(x, list | tuple):
        return [double(t) for t in x]
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def precise(op: Op) -> Function:
    """Returns the reference in float64, rounded once at the end."""

    def kernel(**a: Any) -> Any:
        y = op.reference(**{k: double(v) for k, v in a.items()})
        scalar = op in (ops.linear_cross_entropy, ops.global_norm)
        return y.to(torch.float32 if scalar else a[op.parameters[0]].dtype)

    return kernel


def reversed_order(n: int) -> Tensor:
    return torch.arange(n - 1, -1, -1)


def shuffled(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(3))


def row_sum(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True)


def blocks(x: Tensor, size: int) -> list[Tensor]:
    """Returns the sums over D of blocks of this size, each [..., 1]."""
    return [row_sum(part) for part in x.split(size, -1)]


def blocked(size: int) -> Sum:
    """Returns a sum that adds block after block, as a tiled kernel does."""
    return lambda x: functools.reduce(torch.add, blocks(x, size))


def pairwise(x: Tensor) -> Tensor:
    """Sums neighbours first, then their sums."""
    while x.shape[-1] > 1:
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1))
        x = x[..., ::2] + x[..., 1::2]
    return x


def kahan(x: Tensor) -> Tensor:
    """Sums blocks of 4 with compensation (Kahan 1965)."""
    parts = blocks(x, 4)
    total, lost = parts[0], torch.zeros_like(parts[0])
    for part in parts[1:]:
        y = part - lost
        t = total + y
        total, lost = t, (t - total) - y
    return total
