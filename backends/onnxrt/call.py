"""Describes one call of an op apart from its values; an exported model is stored under this."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from glm_core.dispatch import Op
from glm_core.errors import UnsupportedOpError

Direction = Literal["forward", "vjp", "update"]
ELEMENT = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}
"""dtype -> its number in onnx.TensorProto; listed here so that a stored model runs without
importing onnx"""
SCALAR = (1,)
"""the shape of scalars inside a graph: OpenVINO takes no tensor without dimensions"""
NBITS_BLOCK = 32
"""inputs that share a scale in MatMulNBits; scales of whole rows or larger groups are repeated"""
SEPARATOR = "\n"
"""separates the arguments of a layout; string arguments may not contain it"""


class BranchesOnNumberError(UnsupportedOpError):
    """The reference branches on a number that should stay an input of the graph."""


class Call(NamedTuple):
    """One op, one direction, one set of shapes, dtypes and constants."""

    op: Op
    direction: Direction
    layout: str
    numbers: tuple[float, ...] | None
    """numbers that are constants of the graph; None: numbers are inputs of the graph"""
    tensors: tuple[tuple[torch.dtype, torch.Size], ...]


def by_nbits(call: Call, provider: str) -> bool:
    """Returns whether ONNX Runtime's MatMulNBits computes this call, instead of the translated
    reference."""
    chosen = ("quantized_linear", "forward", "CPUExecutionProvider")
    if (call.op.name, call.direction, provider) != chosen or call.numbers is None:
        return False
    (dtype, x), _, (kind, scale) = call.tensors[:3]
    groups = 1 if len(scale) == 1 else scale[1]
    fits = groups == 1 or (x[-1] // groups) % NBITS_BLOCK == 0
    return math.prod(x) > 0 and dtype != torch.float64 and kind == torch.float16 and fits


def flatten(arguments: Iterable[Any]) -> tuple[str, list[Tensor], list[float]]:
    """Splits arguments into (layout, tensors, numbers). The layout has an entry for each argument:
    T, N, a list's length or the constant itself. Simple enough for torch.compile to trace."""
    layout: list[str] = []
    tensors: list[Tensor] = []
    numbers: list[float] = []
    for x in arguments:
        if isinstance(x, Tensor):
            layout.append("T")
            tensors.append(x)
        elif isinstance(x, (list, tuple)):
            layout.append(str(len(x)))
            tensors.extend(x)
        elif x is None or isinstance(x, (bool, str)):
            layout.append(f"={x}" if isinstance(x, str) else str(x))
        else:
            layout.append("N")
            numbers.append(x)
    return SEPARATOR.join(layout), tensors, numbers


def export_obstacle(arguments: Iterable[Any]) -> str:
    """Says why `flatten` cannot describe these arguments; '' where it can."""
    for x in arguments:
        items = x if isinstance(x, (list, tuple)) else [x]
        if x is not items and (x is None or isinstance(x, (bool, str, int, float))):
            continue
        for item in items:
            if not isinstance(item, Tensor):
                return f"cannot export an argument of type {type(item).__name__}"
            if item.device.type != "cpu":
                return f"takes tensors on the CPU, received one on {item.device}"
            if item.dtype not in ELEMENT or item.layout != torch.strided:
                return f"cannot hold a tensor of {item.dtype}, {item.layout}"
    return ""


def unflatten(layout: str, tensors: Sequence[Any], numbers: Sequence[Any]) -> list[Any]:
    """Rebuilds the arguments from what `flatten` returned."""
    constants = {"None": None, "True": True, "False": False}
    arguments: list[Any] = []
    t, n = iter(tensors), iter(numbers)
    for kind in layout.split(SEPARATOR):
        if kind == "T":
            arguments.append(next(t))
        elif kind == "N":
            arguments.append(next(n))
        elif kind.isdigit():
            arguments.append([next(t) for _ in range(int(kind))])
        else:
            arguments.append(kind[1:] if kind.startswith("=") else constants[kind])
    return arguments


def positions(op: Op, layout: str, parameters: Sequence[str]) -> list[int]:
    """Returns the indices of these parameters' tensors in the flat list."""
    indices: list[int] = []
    start = 0
    for name, kind in zip(op.parameters, layout.split(SEPARATOR), strict=False):
        width = int(kind) if kind.isdigit() else int(kind == "T")
        if name in parameters:
            indices.extend(range(start, start + width))
        start += width
    return indices
