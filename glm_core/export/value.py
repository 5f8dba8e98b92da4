"""Stands in for tensors when the model's forward is exported: each operation on a Value adds the
ONNX node for it. The model can use only the operations defined here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from glm_core.errors import UnsupportedOpError
from glm_core.export.graph import ELEMENT, Graph

Index = int | slice | EllipsisType | None


class Value:
    """A tensor of the graph. A size of 0 is known only at run time; such sizes, B and L, must stay
    in front, where ONNX's Reshape copies them."""

    device = torch.device("cpu")

    def __init__(
        self, graph: Graph, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> None:
        self.graph, self.name, self.shape, self.dtype = graph, name, tuple(shape), dtype

    def like(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Value:
        """Returns another value of the same graph, by default with this one's dtype."""
        return Value(self.graph, name, shape, dtype or self.dtype)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Value:
        """Translates the functions of torch that the model calls with values."""
        if function not in _FUNCTIONS:
            raise UnsupportedOpError(
                f"export: torch.{function.__name__} has no translation to ONNX; add it to "
                "glm_core/export/value.py"
            )
        return _FUNCTIONS[function](*args, **(kwargs or {}))

    def reshape(self, *shape: int) -> Value:
        """Returns the value in another shape. A size of 0 is copied from the same place of this
        shape."""
        return self.like(self.graph.node("Reshape", self.name, self.graph.ints(*shape)), shape)

    def unflatten(self, dim: int, sizes: Sequence[int]) -> Value:
        """Splits a dimension; one size may be -1."""
        dim %= len(self.shape)
        known = math.prod(n for n in sizes if n != -1)
        whole = [self.shape[dim] // known if n == -1 else n for n in sizes]
        return self.reshape(*self.shape[:dim], *whole, *self.shape[dim + 1 :])

    def flatten(self, start: int, end: int = -1) -> Value:
        """Joins the dimensions from `start` to `end`."""
        start, end = start % len(self.shape), end % len(self.shape)
        joined = self.shape[start : end + 1]
        shape = (*self.shape[:start], math.prod(joined), *self.shape[end + 1 :])
        if all(joined):
            return self.reshape(*shape)
        sizes = self.graph.ints(*self.shape[:start], -1, *self.shape[end + 1 :])
        return self.like(self.graph.node("Reshape", self.name, sizes), shape)

    def view_as(self, other: Value) -> Value:
        """Returns the value in the shape of another one."""
        shape = self.graph.node("Shape", other.name)
        return self.like(self.graph.node("Reshape", self.name, shape), other.shape)

    def split_with_sizes(self, sizes: Sequence[int], dim: int) -> list[Value]:
        """Returns consecutive parts along a dimension."""
        dim %= len(self.shape)
        g = self.graph
        names = g.nodes("Split", len(sizes), self.name, g.ints(*sizes), axis=dim)
        shapes = [(*self.shape[:dim], n, *self.shape[dim + 1 :]) for n in sizes]
        return [self.like(*pair) for pair in zip(names, shapes, strict=True)]

    def transpose(self, a: int, b: int) -> Value:
        """Swaps two dimensions."""
        order = list(range(len(self.shape)))
        order[a], order[b] = order[b], order[a]
        return self.permute(*order)

    def permute(self, *order: int) -> Value:
        """Reorders all dimensions."""
        name = self.graph.node("Transpose", self.name, perm=list(order))
        return self.like(name, [self.shape[i] for i in order])

    def unsqueeze(self, dim: int) -> Value:
        """Inserts a dimension of 1 before `dim`."""
        dim %= len(self.shape) + 1
        name = self.graph.node("Unsqueeze", self.name, self.graph.ints(dim))
        return self.like(name, (*self.shape[:dim], 1, *self.shape[dim:]))

    def select(self, dim: int, index: int) -> Value:
        """Returns one entry of a dimension, without that dimension."""
        name = self.graph.node(
            "Gather", self.name, self.graph.tensor(torch.tensor(index)), axis=dim
        )
        return self.like(name, (*self.shape[:dim], *self.shape[dim + 1 :]))

    def narrow(self, dim: int, start: int, length: int) -> Value:
        """Returns entries [start, start + length) of a dimension of known size."""
        g, end = self.graph, start + length
        if (start, end) == (0, self.shape[dim]):
            return self
        name = g.node("Slice", self.name, *(g.ints(x) for x in (start, end, dim)))
        return self.like(name, (*self.shape[:dim], length, *self.shape[dim + 1 :]))

    def __getitem__(self, key: Index | tuple[Index, ...]) -> Value:
        items = list(key) if isinstance(key, tuple) else [key]
        value, dim = self, 0
        for item in items:
            if item is Ellipsis:
                dim = len(value.shape) - (len(items) - 1 - items.index(item)) + items.count(None)
            elif item is None:
                value, dim = value.unsqueeze(dim), dim + 1
            elif isinstance(item, slice):
                if item != slice(None):
                    value = value.narrow(dim, *_span(item, value.shape[dim]))
                dim += 1
            else:
                value = value.select(dim, int(item))
        return value

    def to(self, dtype: torch.dtype) -> Value:
        """Casts to another dtype."""
        if dtype == self.dtype:
            return self
        name = self.graph.node("Cast", self.name, to=ELEMENT[dtype])
        return self.like(name, self.shape, dtype)

    def float(self) -> Value:
        return self.to(torch.float32)

    def contiguous(self) -> Value:
        return self

    def cos(self) -> Value:
        return self.unary("Cos")

    def sin(self) -> Value:
        return self.unary("Sin")

    def unary(self, kind: str) -> Value:
        """Adds a node that changes neither shape nor dtype."""
        return self.like(self.graph.node(kind, self.name), self.shape)

    def binary(self, kind: str, other: Operand, dtype: torch.dtype | None = None) -> Value:
        """Adds a node that broadcasts its two inputs."""
        name = self.graph.node(kind, self.name, operand(self, other))
        shape = other.shape if isinstance(other, Value | Tensor) else ()
        return self.like(name, _broadcast(self.shape, tuple(shape)), dtype)

    def __add__(self, other: Operand) -> Value:
        return self.binary("Add", other)

    def __sub__(self, other: Operand) -> Value:
        return self.binary("Sub", other)

    def __mul__(self, other: Operand) -> Value:
        return self.binary("Mul", other)

    __rmul__ = __mul__

    def __truediv__(self, other: Operand) -> Value:
        return self.binary("Div", other)


Operand = Value | Tensor | int | float


def operand(like: Value, x: Operand) -> str:
    """Returns the name of `x` in the graph; numbers take the dtype of `like`."""
    if isinstance(x, Value):
        return x.name
    value = x if isinstance(x, Tensor) else torch.tensor(x, dtype=like.dtype)
    return like.graph.tensor(value)


def _joined(parts: Sequence[Value], dim: int) -> Value:
    """Returns the parts one after the other along a dimension of known size."""
    first = parts[0]
    shape = list(first.shape)
    shape[dim] = sum(p.shape[dim] for p in parts)
    return first.like(first.graph.node("Concat", *(p.name for p in parts), axis=dim), shape)


def _by_head(equation: str, x: Value, weight: Tensor) -> Value:
    """Multiplies each head of x [B, L, H, D] by its own matrix, as latent attention does."""
    forms = {"blhe,hec->blhc": weight, "blhc,huc->blhu": weight.transpose(1, 2)}
    if equation not in forms:
        raise UnsupportedOpError(
            f"export: torch.einsum({equation!r}) has no translation to ONNX; add it to "
            "glm_core/export/value.py"
        )
    by_head, matrices = x.transpose(1, 2), forms[equation]  # [B, H, L, D], [H, D, F]
    name = x.graph.node("MatMul", by_head.name, x.graph.tensor(matrices))
    return x.like(name, (*by_head.shape[:-1], matrices.shape[-1])).transpose(1, 2)


_FUNCTIONS: dict[Any, Callable[..., Value]] = {torch.cat: _joined, torch.einsum: _by_head}


def _span(item: slice, size: int) -> tuple[int, int]:
    start, end, _ = item.indices(size)
    return start, end - start


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the broadcast shape; a size that is not known wins over 1."""
    n = max(len(a), len(b))
    pairs = zip((1,) * (n - len(a)) + a, (1,) * (n - len(b)) + b, strict=True)
    return tuple(y if x == 1 else x for x, y in pairs)
