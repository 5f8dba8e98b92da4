"""Translates ATen's shifts of int8 to ONNX, whose own BitShift takes only unsigned integers."""

from __future__ import annotations

from typing import Any

import torch

from glm_core.backends.onnxrt.graph import Graph, Table, Value, refuse

TABLE = Table()
translation = TABLE.translation


def _wide(g: Graph, self: Value) -> str:
    if self.dtype != torch.int8:
        raise refuse(f"a shift of {self.dtype}")
    return g.cast(self.name, torch.int32)


def _number(g: Graph, value: int) -> str:
    return g.constant(torch.tensor([value], dtype=torch.int32))


@translation("__rshift__")
def right(g: Graph, out: Any, self: Value, other: int) -> str:
    """Shifts right arithmetically, rounding down. ONNX's Mod takes the divisor's sign, its Div
    rounds to zero."""
    x, step = _wide(g, self), _number(g, 1 << other)
    whole = g.node("Sub", x, g.node("Mod", x, step))
    return g.cast(g.node("Div", whole, step), torch.int8)


@translation("__lshift__")
def left(g: Graph, out: Any, self: Value, other: int) -> str:
    """Shifts left and keeps the low eight bits, by arithmetic: ONNX does not define what Cast does
    with the others."""
    shifted = g.node("Mul", _wide(g, self), _number(g, 1 << other))
    half = g.node("Add", shifted, _number(g, 128))
    low = g.node("Sub", g.node("Mod", half, _number(g, 256)), _number(g, 128))
    return g.cast(low, torch.int8)
