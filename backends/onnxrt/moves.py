"""Translates the ATen operators that only move or choose values to ONNX; nothing is rounded."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from glm_core.backends.onnxrt.graph import Graph, Operand, Table, Value, refuse

TABLE = Table()
translation = TABLE.translation


@translation("clamp", "clamp_min", "clamp_max")
def clamp(
    g: Graph, out: Any, self: Value, min: Operand | None = None, max: Operand | None = None
) -> str:
    x = g.operand(self, out.dtype)
    for kind, bound in (("Max", min), ("Min", max)):
        x = x if bound is None else g.node(kind, x, g.operand(bound, out.dtype))
    return x


@translation("where")
def where(g: Graph, out: Any, condition: Value, self: Operand, other: Operand) -> str:
    return g.node("Where", condition.name, g.operand(self, out.dtype), g.operand(other, out.dtype))


@translation("clone", "alias", "detach", "lift_fresh_copy")
def same(g: Graph, out: Any, self: Value, **_: Any) -> str:
    return self.name


@translation("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze")
def view(g: Graph, out: Any, self: Value, **_: Any) -> str:
    return g.reshape(self.name, out.shape)


@translation("permute")
def permute(g: Graph, out: Any, self: Value, dims: list[int]) -> str:
    return g.node("Transpose", self.name, perm=[d % len(dims) for d in dims]) if dims else self.name


@translation("expand")
def expand(g: Graph, out: Any, self: Value, **_: Any) -> str:
    return g.expand(self.name, out.shape)


def span(size: int, start: int | None, end: int | None) -> tuple[int, int]:
    """Turns ATen's slice bounds, which may be negative or too large, into bounds within [0,
    size]."""
    first, last, _ = slice(start, end).indices(size)
    return first, max(first, last)


@translation("slice")
def slice_of(g: Graph, out: Any, self: Value, dim: int, start: int, end: int, step: int) -> str:
    return g.slice(self.name, dim, *span(self.shape[dim], start, end), step)


@translation("flip")
def flip(g: Graph, out: Any, self: Value, dims: list[int]) -> str:
    name = self.name
    for dim in dims:
        name = g.slice(name, dim, -1, -(2**31), -1)
    return name


@translation("select")
def select(g: Graph, out: Any, self: Value, dim: int, index: int) -> str:
    index %= self.shape[dim]
    return g.reshape(g.slice(self.name, dim, index, index + 1), out.shape)


@translation("split_with_sizes")
def split(g: Graph, out: Any, self: Value, split_sizes: list[int], dim: int) -> list[str]:
    ends = list(itertools.accumulate(split_sizes))
    return [g.slice(self.name, dim, e - n, e) for n, e in zip(split_sizes, ends, strict=True)]


@translation("cat")
def cat(g: Graph, out: Any, tensors: list[Value], dim: int) -> str:
    # ATen skips tensors of shape [0] whatever the others' rank, OpenVINO takes no empty ones
    parts = [g.operand(t, out.dtype) for t in tensors if t.fake.numel()]
    return g.node("Concat", *parts, axis=dim)


@translation("slice_scatter")
def slice_scatter(
    g: Graph, out: Any, self: Value, src: Value, dim: int, start: int, end: int, step: int
) -> str:
    if step != 1:
        raise refuse(f"slice_scatter with step={step}")
    first, last = span(self.shape[dim], start, end)
    before = g.slice(self.name, dim, 0, first)
    return g.node(
        "Concat", before, src.name, g.slice(self.name, dim, last, self.shape[dim]), axis=dim
    )


@translation("select_scatter")
def select_scatter(g: Graph, out: Any, self: Value, src: Value, dim: int, index: int) -> str:
    index %= self.shape[dim]
    row = [1 if d == dim % out.ndim else n for d, n in enumerate(out.shape)]
    before = g.slice(self.name, dim, 0, index)
    after = g.slice(self.name, dim, index + 1, self.shape[dim])
    return g.node("Concat", before, g.reshape(src.name, row), after, axis=dim)


@translation("sort")
def sort(g: Graph, out: Any, self: Value, dim: int = -1, descending: bool = False, **_: Any) -> Any:
    """Uses TopK over the whole length: of equal values it gives the one with the lower index first,
    as a stable sort does. OpenVINO's does not: integers are made distinct first."""
    n, x = self.shape[dim], g.operand(self, out[0].dtype)
    how = {"axis": dim, "largest": int(descending), "sorted": 1}
    if out[0].is_floating_point() or not n:
        return g.several("TopK", 2, x, g.ints([n]), **how)
    place = torch.arange(n).flip(0) if descending else torch.arange(n)
    shape = [n if d == dim % out[0].ndim else 1 for d in range(out[0].ndim)]
    distinct = g.node("Add", g.node("Mul", x, g.ints([n])), g.constant(place.view(shape)))
    order = g.several("TopK", 2, distinct, g.ints([n]), **how)[1]
    return [g.node("GatherElements", x, order, axis=dim), order]


@translation("constant_pad_nd")
def pad(g: Graph, out: Any, self: Value, pad: list[int], value: Operand) -> str:
    widths = [0] * (2 * out.ndim)
    for i in range(len(pad) // 2):
        widths[out.ndim - 1 - i], widths[2 * out.ndim - 1 - i] = pad[2 * i], pad[2 * i + 1]
    return g.node("Pad", self.name, g.ints(widths), g.operand(value, out.dtype))


@translation("full", "full_like", "scalar_tensor", "empty", "empty_permuted")
def full(g: Graph, out: Any, fill_value: Operand = 0, s: Operand | None = None, **_: Any) -> str:
    return g.expand(g.operand(fill_value if s is None else s, out.dtype), out.shape)


@translation("arange")
def arange(g: Graph, out: Any, start: int, end: int, step: int, **_: Any) -> str:
    return g.constant(torch.arange(start, end, step, dtype=out.dtype))


def strict(g: Graph, index: Value, size: int) -> str:
    """Moves negative entries of an index past the end, so that they are refused as in ATen; ONNX
    would count them from the end."""
    negative = g.node("Less", index.name, g.operand(0, index.dtype))
    return g.node("Where", negative, g.operand(size, index.dtype), index.name)


def rows(g: Graph, out: Any, table: Value, axis: int, name: str, index: Value) -> str:
    """Adds a Gather by an index (`name` in the graph) that may be a scalar."""
    gathered = g.node("Gather", table.name, name, axis=axis)
    return gathered if index.shape else g.reshape(gathered, out.shape)


@translation("embedding")
def embedding(g: Graph, out: Any, weight: Value, indices: Value, **_: Any) -> str:
    return rows(g, out, weight, 0, strict(g, indices, weight.shape[0]), indices)


@translation("index_select")
def index_select(g: Graph, out: Any, self: Value, dim: int, index: Value) -> str:
    return rows(g, out, self, dim, strict(g, index, self.shape[dim]), index)


@translation("index")
def index(g: Graph, out: Any, self: Value, indices: list[Value | None]) -> str:
    places = [(axis, i) for axis, i in enumerate(indices) if i is not None]
    if len(places) != 1 or places[0][1].dtype == torch.bool:
        raise refuse("indexing with a mask or with several tensors")
    axis, at = places[0]
    return rows(g, out, self, axis, at.name, at)


@translation("gather")
def gather(g: Graph, out: Any, self: Value, dim: int, index: Value, **_: Any) -> str:
    return g.node("GatherElements", self.name, strict(g, index, self.shape[dim]), axis=dim)
