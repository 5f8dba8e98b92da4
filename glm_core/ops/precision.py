"""The dtype rule of all references: arithmetic in float32 at least, one rounding to the working
dtype at the end."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """float32, or float64 where the input is."""
    return x if x.dtype == torch.float64 else x.float()


def num_bytes(*tensors: Tensor | None) -> int:
    """Bytes of the tensors, each counted once."""
    return sum(prod(t.shape) * t.element_size() for t in tensors if t is not None)
