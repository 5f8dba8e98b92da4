"""Lays out the arguments of samples in memory in ways that a kernel must cope with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from glm_core.errors import NoRoomError
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


FAR = 2**31
"""elements: one more than a 32-bit index can count"""


def far(args: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns the same arguments, the tensor `name` as a view whose last row begins past FAR
    elements. Only its rows are touched: a CPU gives the memory between them no pages. Making it
    raises NoRoomError where there is no room."""
    maker: Maker = args[name]

    def make(draw: Draw) -> Tensor:
        x: Tensor = realize(maker, draw)
        stride = FAR // (len(x) - 1) + x[0].numel()
        span = stride * (len(x) - 1) + x[0].numel()
        try:
            room = torch.empty(span, dtype=x.dtype, device=x.device)
        except RuntimeError:  # torch's own out-of-memory errors are of this class
            size = f"{span * x.element_size() / 1e9:.1f} GB"
            raise NoRoomError(
                f"{name}: {size} do not fit on {x.device}; use a larger device"
            ) from None
        packed = x.contiguous()
        return room.as_strided(x.shape, (stride, *packed.stride()[1:])).copy_(packed)

    return {**args, name: make}
