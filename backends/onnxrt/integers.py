"""ATen operators on the bits of int8, in ONNX: whose BitShift takes unsigned integers alone."""

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
    """Arithmetic: rounds down. ONNX's Mod takes the divisor's sign, its Div rounds to zero."""
    x, step = _wide(g, self), _number(g, 1 << other)
    whole = g.node("Sub", x, g.node("Mod", x, step))
    return g.cast(g.node("Div", whole, step), torch.int8)


@translation("__lshift__")
def left(g: Graph, out: Any, self: Value, other: int) -> str:
    """The low eight bits, by arithmetic: what Cast makes of the others is not defined."""
    shifted = g.node("Mul", _wide(g, self), _number(g, 1 << other))
    half = g.node("Add", shifted, _number(g, 128))
    low = g.node("Sub", g.node("Mod", half, _number(g, 256)), _number(g, 128))
    return g.cast(low, torch.int8)
