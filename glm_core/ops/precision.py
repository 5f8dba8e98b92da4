"""Holds the dtype rule of all references: compute in float32 at least, round once to the working
dtype at the end."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Returns x in float32, or as it is if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def num_bytes(*tensors: Tensor | None) -> int:
    """Returns the bytes of all tensors together."""
    return sum(prod(t.shape) * t.element_size() for t in tensors if t is not None)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x weight^T + bias, accumulated in float32 at least and rounded once to x's dtype, the
    gradients too. On a CPU a product below float32 runs in float32: few CPUs have units for it, and
    without them torch's own takes 20 times as long."""
    linear = torch.nn.functional.linear
    if not x.is_cpu or x.dtype.itemsize >= 4:
        return linear(x, weight, bias)
    return linear(wide(x), wide(weight), None if bias is None else wide(bias)).to(x.dtype)
