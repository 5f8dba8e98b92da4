"""Decides the dtypes in which a run computes and sums gradients, and how a float16 loss is
scaled."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """Dtypes of one run. Masters and the optimizer's state are always float32."""

    compute: torch.dtype = torch.float32
    """dtype of weights and activations in forward and backward"""
    reduce: torch.dtype = torch.float32
    """dtype of gradients while they are summed over ranks; sums over micro-batches are float32"""

    @property
    def low(self) -> bool:
        """Do the module's weights need float32 masters?"""
        return self.compute != torch.float32


def cast_(module: nn.Module, dtype: torch.dtype) -> None:
    """Rounds all floating-point parameters of the module to `dtype`, in place. Buffers, such as
    rotary frequencies, keep their dtype."""
    for p in module.parameters():
        if p.is_floating_point():
            p.data = p.data.to(dtype)


def cast_buffers_(module: nn.Module, dtype: torch.dtype) -> None:
    """Rounds all floating-point buffers of the module to `dtype`, in place."""
    for b in module.buffers():
        if b.is_floating_point():
            b.data = b.data.to(dtype)


def to_compute(value: Any, dtype: torch.dtype) -> Any:
    """Returns `value` with the floating-point tensors inside its lists, tuples and dicts in
    `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: to_compute(v, dtype) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_compute(v, dtype) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(to_compute(v, dtype) for v in value)
    return value
