"""Kernels that are right up to the last step and cut off instead of rounding to nearest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm_core.dispatch import Op
from glm_core.faults.mutant import Kernel, mutant
from glm_core.ops import (
    add_layer_norm,
    add_rms_norm,
    attention,
    geglu,
    gelu,
    layer_norm,
    linear,
    quantized_linear,
    rms_norm,
    rope,
    swiglu,
)

OPS = (
    add_layer_norm,
    add_rms_norm,
    attention,
    geglu,
    gelu,
    layer_norm,
    linear,
    quantized_linear,
    rms_norm,
    rope,
    swiglu,
)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _cut(y: Tensor, dtype: torch.dtype) -> Tensor:
    """The float32 result's upper half, which is bfloat16, where that is the working dtype."""
    if dtype != torch.bfloat16:
        return y.to(dtype)
    upper = (y.detach().contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32)
    return (y + (upper - y).detach()).to(dtype)


def _cutting(op: Op) -> Kernel:
    def truncated(**a: Any) -> Any:
        dtype = next(v.dtype for v in a.values() if isinstance(v, Tensor))
        y = op.reference(**{k: _widened(v) for k, v in a.items()})
        return tuple(_cut(t, dtype) for t in y) if isinstance(y, tuple) else _cut(y, dtype)

    return truncated


for _op in OPS:
    mutant(_op, wrong="bfloat16 results are cut off, not rounded")(_cutting(_op))
