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
