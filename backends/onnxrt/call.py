"""What one call of an op is, apart from its values: the key under which models are kept."""

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
"""onnx.TensorProto's numbers, here so that a model from the disk runs without importing onnx"""
SCALAR = (1,)
"""the shape that scalars have inside a graph: OpenVINO takes none without dimensions"""
NBITS_BLOCK = 32
"""inputs that share a scale in MatMulNBits; those of rows and of larger groups are repeated"""
SEPARATOR = "\n"
"""between the arguments of a layout; strings may hold anything else"""


class BranchesOnNumberError(UnsupportedOpError):
    """The reference decides by a number that should stay an input of the graph."""


class Call(NamedTuple):
    """One op, one direction, one set of shapes, dtypes and constants."""

    op: Op
    direction: Direction
    layout: str
    numbers: tuple[float, ...] | None
    """baked into the graph; None = inputs of the graph"""
    tensors: tuple[tuple[torch.dtype, torch.Size], ...]


def by_nbits(call: Call, provider: str) -> bool:
    """Whether ONNX Runtime's MatMulNBits computes it, in place of the translated reference."""
    chosen = ("quantized_linear", "forward", "CPUExecutionProvider")
    if (call.op.name, call.direction, provider) != chosen or call.numbers is None:
        return False
    (dtype, x), _, (kind, scale) = call.tensors[:3]
    groups = 1 if len(scale) == 1 else scale[1]
    fits = groups == 1 or (x[-1] // groups) % NBITS_BLOCK == 0
    return math.prod(x) > 0 and dtype != torch.float64 and kind == torch.float16 and fits


def flatten(arguments: Iterable[Any]) -> tuple[str, list[Tensor], list[float]]:
    """(layout, tensors, numbers) of arguments; the layout has, per argument, T, N, a list's length
    or the constant itself. Plain enough for torch.compile to trace."""
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


def strange(arguments: Iterable[Any]) -> str:
    """Why `flatten` cannot describe these arguments; empty where it can."""
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
    """The arguments that `flatten` described."""
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
    """Where in the flat list the tensors of these parameters stand."""
    found: list[int] = []
    start = 0
    for name, kind in zip(op.parameters, layout.split(SEPARATOR), strict=False):
        width = int(kind) if kind.isdigit() else int(kind == "T")
        if name in parameters:
            found.extend(range(start, start + width))
        start += width
    return found
