"""Translates the ATen operators that compute to ONNX; results are rounded to their dtype (see
graph.inside)."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from glm_core.backends.onnxrt.graph import (
    Graph,
    Number,
    Operand,
    Table,
    Translation,
    Value,
    inside,
    refuse,
)

TABLE = Table()
translation = TABLE.translation

UNARY = {
    "neg": "Neg",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "erf": "Erf",
    "abs": "Abs",
    "sin": "Sin",
    "cos": "Cos",
    "reciprocal": "Reciprocal",
    "floor": "Floor",
    "ceil": "Ceil",
    "round": "Round",
    "sign": "Sign",
    "relu": "Relu",
    "tan": "Tan",
    "sinh": "Sinh",
    "cosh": "Cosh",
    "asin": "Asin",
    "acos": "Acos",
    "atan": "Atan",
}
BINARY = {"mul": "Mul", "div": "Div", "pow": "Pow", "maximum": "Max", "minimum": "Min"}
LOGICAL = {"and": "And", "or": "Or", "xor": "Xor"}
COMPARE = {
    "eq": "Equal",
    "lt": "Less",
    "le": "LessOrEqual",
    "gt": "Greater",
    "ge": "GreaterOrEqual",
}
REDUCE = {
    "sum": "ReduceSum",
    "mean": "ReduceMean",
    "amax": "ReduceMax",
    "amin": "ReduceMin",
    "prod": "ReduceProd",
}


def unary(kind: str) -> Translation:
    return lambda g, out, self: g.node(kind, g.operand(self, out.dtype))


def binary(kind: str) -> Translation:
    def make(g: Graph, out: Any, self: Operand, rounding_mode: Any = None, **other: Operand) -> str:
        if rounding_mode is not None:
            raise refuse(f"division with rounding_mode={rounding_mode!r}")
        return g.node(kind, *(g.operand(x, out.dtype) for x in (self, *other.values())))

    return make


def logical(kind: str) -> Translation:
    def make(g: Graph, out: Any, self: Value, other: Value) -> str:
        if self.dtype != torch.bool or other.dtype != torch.bool:
            raise refuse(f"bitwise {kind} of integers")
        return g.node(kind, self.name, other.name)

    return make


def compare(kind: str) -> Translation:
    def make(g: Graph, out: Any, self: Value, other: Operand) -> str:
        wide = self.dtype
        if not isinstance(other, Number):
            wide = torch.result_type(self.fake, other.fake if isinstance(other, Value) else other)
        return g.node(kind, g.operand(self, wide), g.operand(other, wide))

    return make


def reduce(kind: str) -> Translation:
    def make(
        g: Graph, out: Any, self: Value, dim: Any = None, keepdim: bool = False, **_: Any
    ) -> str:
        name = g.operand(self, out.dtype)
        dims = [dim] if isinstance(dim, int) else dim or range(len(self.shape))
        if not self.shape:
            return name
        # the runtime adds up one element after another, and of a whole tensor's loses small ones
        last_first = sorted((d % len(self.shape) for d in dims), reverse=True)
        for part in [[d] for d in last_first] if kind == "ReduceSum" else [dims]:
            name = g.node(kind, name, g.ints(part), keepdims=int(keepdim or not out.shape))
        return name if out.shape else g.reshape(name, out.shape)

    return make


TABLE.update({name: unary(kind) for name, kind in UNARY.items()})
TABLE.update({name: binary(kind) for name, kind in BINARY.items()})
TABLE.update({name: compare(kind) for name, kind in COMPARE.items()})
TABLE.update({name: reduce(kind) for name, kind in REDUCE.items()})
TABLE.update(
    {f"{p}_{name}": logical(k) for name, k in LOGICAL.items() for p in ("bitwise", "logical")}
)


@translation("ne")
def ne(g: Graph, out: Any, self: Value, other: Operand) -> str:
    return g.node("Not", TABLE["eq"](g, out, self, other))


@translation("bitwise_not", "logical_not")
def logical_not(g: Graph, out: Any, self: Value) -> str:
    return g.node("Not", g.operand(self, torch.bool))


@translation("isnan")
def isnan(g: Graph, out: Any, self: Value) -> str:
    return g.node("IsNaN", self.name)


@translation("isinf")
def isinf(g: Graph, out: Any, self: Value) -> str:
    return g.node("IsInf", self.name)


@translation("any")
def any_of(g: Graph, out: Any, self: Value, dim: Any = None, keepdim: bool = False) -> str:
    ones = Value(g.cast(g.operand(self, torch.bool), torch.int32), self.fake.int())
    most = reduce("ReduceMax")(g, out.int(), ones, dim, keepdim)
    return g.cast(most, torch.bool)


@translation("fmod")
def fmod(g: Graph, out: Any, self: Operand, other: Operand) -> str:
    return g.node("Mod", *(g.operand(x, out.dtype) for x in (self, other)), fmod=1)


@translation("expm1")
def expm1(g: Graph, out: Any, self: Value) -> str:
    """Computes 2 t / (1 - t) with t = tanh(x / 2), or exp(x) - 1 for |x| > 1, where that does not
    cancel."""
    x, one, two = (g.operand(v, out.dtype) for v in (self, 1.0, 2.0))
    t = tanh(g, out, Value(g.node("Div", x, two), self.fake.to(inside(out.dtype))))
    near = g.node("Div", g.node("Mul", two, t), g.node("Sub", one, t))
    far = g.node("Greater", g.node("Abs", x), one)
    return g.node("Where", far, g.node("Sub", g.node("Exp", x), one), near)


@translation("var_mean")
def var_mean(
    g: Graph, out: Any, self: Value, dim: Any, correction: Any, keepdim: bool
) -> list[str]:
    kept = self.fake.float().var(dim=dim, keepdim=True)
    mean = reduce("ReduceMean")(g, kept, self, dim, True)
    centred = g.node("Sub", g.operand(self, out[0].dtype), mean)
    count = self.fake.numel() // max(out[0].numel(), 1) - (1 if correction is None else correction)
    square = Value(g.node("Mul", centred, centred), self.fake.to(inside(out[0].dtype)))
    total = reduce("ReduceSum")(g, out[0], square, dim, keepdim)
    variance = g.node("Div", total, g.operand(float(count), out[0].dtype))
    return [variance, mean if keepdim else g.reshape(mean, out[1].shape)]


@translation("var")
def var(g: Graph, out: Any, self: Value, dim: Any, correction: Any, keepdim: bool) -> str:
    return str(var_mean(g, (out, out), self, dim, correction, keepdim)[0])


@translation("cumsum")
def cumsum(g: Graph, out: Any, self: Value, dim: int, **_: Any) -> str:
    return g.node("CumSum", g.operand(self, out.dtype), g.constant(torch.tensor(dim)))


@translation("log1p")
def log1p(g: Graph, out: Any, self: Value) -> str:
    """Computes log(u) x / (u - 1) with u = 1 + x as rounded (Kahan), and x itself where u is 1."""
    x, one = g.operand(self, out.dtype), g.operand(1.0, out.dtype)
    u = g.node("Add", x, one)
    scale = g.node("Div", x, g.node("Sub", u, one))
    log = g.node("Log", u)
    far = g.node("Greater", x, g.operand(1e6, out.dtype))  # the scale is 1, or inf / inf
    exact = g.node("Where", far, log, g.node("Mul", log, scale))
    return g.node("Where", g.node("Equal", u, one), x, exact)


def sum_of(kind: str) -> Translation:
    def make(g: Graph, out: Any, self: Operand, other: Operand, alpha: Operand = 1) -> str:
        a, b = (g.operand(x, out.dtype) for x in (self, other))
        if alpha != 1:
            b = g.node("Mul", b, g.operand(alpha, out.dtype))
        return g.node(kind, a, b)

    return make


TABLE.update({"add": sum_of("Add"), "sub": sum_of("Sub")})


@translation("rsqrt")
def rsqrt(g: Graph, out: Any, self: Value) -> str:
    return g.node("Reciprocal", g.node("Sqrt", g.operand(self, out.dtype)))


@translation("sigmoid")
def sigmoid(g: Graph, out: Any, self: Value) -> str:
    # not Sigmoid: ONNX Runtime's is a rational approximation that ends at |x| = 18
    decay = g.node("Exp", g.node("Neg", g.operand(self, out.dtype)))
    return g.node("Reciprocal", g.node("Add", decay, g.operand(1.0, out.dtype)))


@translation("tanh")
def tanh(g: Graph, out: Any, self: Value) -> str:
    """Computes 1 - 2 / (1 + exp(2|x|)) with x's sign; for |x| < 1/2, Lambert's continued fraction
    up to 7. ONNX Runtime's own Tanh errs by up to 4.5 ulp, nine times as much as torch's."""
    x = g.operand(self, out.dtype)
    one, two = g.operand(1.0, out.dtype), g.operand(2.0, out.dtype)
    size = g.node("Abs", x)
    grown = g.node("Add", g.node("Exp", g.node("Mul", size, two)), one)
    far = g.node("Mul", g.node("Sign", x), g.node("Sub", one, g.node("Div", two, grown)))
    square = g.node("Mul", x, x)
    near = g.operand(7.0, out.dtype)
    for odd in (5.0, 3.0, 1.0):
        near = g.node("Add", g.node("Div", square, near), g.operand(odd, out.dtype))
    below = g.node("Less", size, g.operand(0.5, out.dtype))
    return g.node("Where", below, g.node("Div", x, near), far)


@translation("gelu")
def gelu(g: Graph, out: Any, self: Value, approximate: str) -> str:
    def scaled(x: str, factor: float) -> str:
        return g.node("Mul", x, g.operand(factor, out.dtype))

    x = g.operand(self, out.dtype)
    if approximate == "none":
        bent = g.node("Erf", scaled(x, math.sqrt(0.5)))
    else:
        cubic = scaled(g.node("Mul", x, g.node("Mul", x, x)), 0.044715)
        u = scaled(g.node("Add", x, cubic), math.sqrt(2 / math.pi))
        bent = tanh(g, out, Value(u, self.fake.to(inside(out.dtype))))
    return g.node("Mul", scaled(x, 0.5), g.node("Add", bent, g.operand(1.0, out.dtype)))


@translation("_to_copy")
def to_copy(g: Graph, out: Any, self: Value, **_: Any) -> str:
    return g.operand(self, out.dtype)


@translation("copy")
def copy(g: Graph, out: Any, self: Value, src: Value, **_: Any) -> str:
    name = g.operand(src, out.dtype)
    return name if src.shape == self.shape else g.expand(name, out.shape)


@translation("mm", "bmm", "mv", "dot")
def matmul(g: Graph, out: Any, self: Value, **other: Value) -> str:
    """Splits the long sums of a small result into up to 8 parts, as torch's library does. ONNX
    Runtime adds the terms one after another, with twice the error (measured for 7x1000 times
    1000x16)."""
    (right,) = other.values()
    a, b = (g.operand(x, out.dtype) for x in (self, right))
    length = self.shape[-1]
    if not out.shape or length < 512 or out.numel() > 4096:
        product = g.node("MatMul", a, b)
        return product if out.shape else g.reshape(product, out.shape)
    part = max(256, -(-length // 8))
    axes = len(self.shape) - 1, max(len(right.shape) - 2, 0)

    def partial(start: int) -> str:
        end = min(start + part, length)
        return g.node(
            "MatMul", *(g.slice(x, axis, start, end) for x, axis in zip((a, b), axes, strict=True))
        )

    return functools.reduce(lambda x, y: g.node("Add", x, y), map(partial, range(0, length, part)))


@translation("_softmax")
def softmax(g: Graph, out: Any, self: Value, dim: int, half_to_float: bool) -> str:
    return g.node("Softmax", g.operand(self, out.dtype), axis=dim)


@translation("_log_softmax")
def log_softmax(g: Graph, out: Any, self: Value, dim: int, half_to_float: bool) -> str:
    return g.node("LogSoftmax", g.operand(self, out.dtype), axis=dim)


@translation("linalg_vector_norm")
def vector_norm(
    g: Graph, out: Any, self: Value, ord: float, dim: Any, keepdim: bool, **_: Any
) -> str:
    if ord not in (1, 2):
        raise refuse(f"vector_norm of order {ord}")
    x = g.operand(self, out.dtype)
    return str(
        reduce("ReduceL1" if ord == 1 else "ReduceL2")(g, out, Value(x, self.fake), dim, keepdim)
    )


@translation("index_put")
def index_put(
    g: Graph, out: Any, self: Value, indices: list[Value | None], values: Value, accumulate: bool
) -> str:
    at = indices[0]
    if len(indices) != 1 or at is None or at.dtype == torch.bool:
        raise refuse("index_put with a mask or with several tensors")
    if not at.fake.numel():
        return g.operand(self, out.dtype)
    shape = [*at.shape, *out.shape[1:]]  # [..., D]
    rows = [math.prod(at.shape), *out.shape[1:]]  # [N, D]
    each = g.reshape(at.name, [rows[0], *[1] * (out.ndim - 1)])  # [N, 1]
    updates = g.reshape(g.expand(g.operand(values, out.dtype), shape), rows)  # [N, D]
    # not ScatterND: ONNX Runtime adds its duplicates in an order that depends on its threads
    how = {"reduction": "add"} if accumulate else {}
    return g.node("ScatterElements", self.name, g.expand(each, rows), updates, axis=0, **how)


def scattered(**reduction: str) -> Translation:
    def make(g: Graph, out: Any, self: Value, dim: int, index: Value, **source: Operand) -> str:
        (updates,) = source.values()  # ATen calls it src or value
        name = g.operand(updates, out.dtype)
        if isinstance(updates, Value):  # ATen reads only the part of src that the index covers
            for axis, size in enumerate(index.shape):
                name = g.slice(name, axis, 0, size)
        else:
            name = g.expand(name, index.shape)
        return g.node("ScatterElements", self.name, index.name, name, axis=dim, **reduction)

    return make


TABLE.update({"scatter": scattered(), "scatter_add": scattered(reduction="add")})
