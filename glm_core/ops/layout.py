"""Lays out the arguments of samples in memory in ways that a kernel must cope with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from glm_core.spec import Draw, Maker, realize


def gapped(args: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the same arguments, each tensor as a view whose elements lie two apart. A kernel that
    ignores strides reads the zeros between them."""
    return {k: _gapped(v) for k, v in args.items()}


def _gapped(value: Any) -> Any:
    if isinstance(value, list):
        return [_gapped(v) for v in value]
    if not callable(value):
        return value
    maker: Maker = value

    def make(draw: Draw) -> Tensor:
        x: Tensor = realize(maker, draw)
        return torch.stack((x, torch.zeros_like(x)), -1)[..., 0]

    return make
