"""Translates our ops to ONNX: one short function each, by the formulas of their references, in
float32.

Shapes: B batch, L tokens of the call, S keys including the cache's, H heads, K kv heads, E head
dim, R = H / K, D width, F output or ffn width, G sections, P pairs. A size of 0 is known only at
run time."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glm_core.dispatch import Op
from glm_core.errors import UnsupportedOpError
from glm_core.export import experts
from glm_core.export.graph import CONTRIB
from glm_core.export.value import Value
from glm_core.ops.quant import unpack

Translation = Callable[..., Any]
LEAST = torch.finfo(torch.float32).min
BLOCK = 128
"""inputs that share a scale in the file, if a whole row shares one in the model"""


def translate(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Is an interceptor (dispatch.intercept) that writes nodes instead of computing. Raises
    UnsupportedOpError for an op without a translation."""
    if op.name not in TABLE:
        raise UnsupportedOpError(
            f"op {op.name} has no translation to ONNX; add it to glm_core/export/translate.py"
        )
    bound = inspect.signature(op.reference).bind(*args, **kwargs)
    bound.apply_defaults()
    return TABLE[op.name](**bound.arguments)


def linear(x: Value, weight: Tensor, bias: Tensor | None = None) -> Value:
    """Multiplies a matrix by the weight as it is stored (the head may be the embedding), and
    tensors of more dimensions by a transposed copy."""
    g = x.graph
    shape = (*x.shape[:-1], len(weight))
    if len(x.shape) == 2:
        more = [] if bias is None else [g.tensor(bias)]
        return x.like(g.node("Gemm", x.name, g.tensor(weight), *more, transB=1), shape)
    turned = g.derived(weight, "turned", weight.t)
    y = x.like(g.node("MatMul", x.name, turned), shape)
    return y if bias is None else y + bias


def quantized_linear(
    x: Value, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int, activation_bits: int
) -> Value:
    """Uses ONNX Runtime's MatMulNBits: blocks of inputs along each row, their size a power of two,
    and unsigned codes with zero in their middle. activation_bits = 8 allows it to round activations
    to int8 in its own way (accuracy_level 4)."""
    g, width = x.graph, weight.shape[1] * 8 // bits
    groups = scale.numel() // len(scale)
    block = math.gcd(width // groups, 256) if groups > 1 else BLOCK
    if block < 16:
        raise UnsupportedOpError(
            f"quantized_linear: the weight has groups of {width // groups} inputs, but MatMulNBits "
            "takes blocks of 16, 32, 64, 128 or 256; quantize in groups of a multiple of 32"
        )
    count = -(-width // block)

    def blocks() -> Tensor:
        return packed(unpack(weight, bits), bits, count, block)

    def scales() -> Tensor:
        by_group = scale.float().reshape(len(scale), -1)  # [F, G]
        repeats = count // groups if groups > 1 else count
        return by_group.repeat_interleave(repeats, 1)  # [F, count]

    inputs = [x.name, g.derived(weight, "blocks", blocks), g.derived(weight, "scales", scales)]
    facts = {"K": width, "N": len(weight), "bits": bits, "block_size": block}
    level = {"accuracy_level": 4 if activation_bits == 8 else 1}
    name = g.node("MatMulNBits", *inputs, domain=CONTRIB, **facts, **level)
    y = x.like(name, (*x.shape[:-1], len(weight)))
    return y if bias is None else y + bias.float()


def quantized_grouped_linear(
    rows: Value, weight: Tensor, scale: Tensor, counts: Value, bits: int, activation_bits: int
) -> Value:
    """Multiplies each expert's rows as quantized_linear does."""
    parts = [(w, s) for w, s in zip(weight.unbind(), scale.unbind(), strict=True)]

    def product(part: Value, e: int) -> str:
        return quantized_linear(part, *parts[e], None, bits, activation_bits).name

    return experts.by_expert(rows, counts, weight.shape[1], product)


def packed(codes: Tensor, bits: int, count: int, block: int) -> Tensor:
    """Packs signed codes [F, D] as uint8 [F, count, block * bits / 8], 4-bit ones with the even
    element in the LOW nibble. Padding at the end of a row encodes zero."""
    zero = 1 << (bits - 1)
    rows, width = codes.shape
    shifted = torch.full((rows, count * block), zero, dtype=torch.uint8)
    shifted[:, :width] = (codes.short() + zero).to(torch.uint8)
    if bits == 4:
        shifted = shifted[:, ::2] | (shifted[:, 1::2] << 4)
    return shifted.reshape(rows, count, -1)  # [F, count, block * bits / 8]


def embedding(ids: Value, weight: Tensor, shrink: float) -> Value:
    g = ids.graph
    name = g.node("Gather", g.tensor(weight), ids.name, axis=0)
    return ids.like(name, (*ids.shape, weight.shape[1]), torch.float32)


def rms_norm(x: Value, weight: Tensor, eps: float) -> Value:
    """Follows the pattern of nodes that ONNX Runtime fuses."""
    g = x.graph
    square = g.node("Pow", x.name, g.number(2.0))
    mean = x.like(g.node("ReduceMean", square, g.ints(-1)), (*x.shape[:-1], 1))
    return x / (mean + eps).unary("Sqrt") * weight


def layer_norm(x: Value, weight: Tensor, bias: Tensor, eps: float) -> Value:
    g = x.graph
    weights = (g.tensor(t) for t in (weight, bias))
    return x.like(g.node("LayerNormalization", x.name, *weights, epsilon=eps, axis=-1), x.shape)


def add_rms_norm(
    x: Value, residual: Value, weight: Tensor, eps: float, alpha: float
) -> tuple[Value, Value]:
    total = x + (residual if alpha == 1 else residual * alpha)
    return rms_norm(total, weight, eps), total


def add_layer_norm(
    x: Value, residual: Value, weight: Tensor, bias: Tensor, eps: float, alpha: float
) -> tuple[Value, Value]:
    total = x + (residual if alpha == 1 else residual * alpha)
    return layer_norm(total, weight, bias, eps), total


def rope(x: Value, cos: Value, sin: Value, interleaved: bool) -> Value:
    sections, pairs = cos.shape[-2:]
    rotated, width = 2 * sections * pairs, x.shape[-1]
    shape = (pairs, 2) if interleaved else (2, pairs)
    axis = 5 if interleaved else 4
    head = x.narrow(3, 0, rotated)  # [B, L, H, 2GP]
    t = head.unflatten(-1, (sections, *shape))  # [B, L, H, G, 2, P] or [.., P, 2]
    a, b = (t.select(axis, i) for i in (0, 1))
    c, s = cos.unsqueeze(2), sin.unsqueeze(2)  # [B, L, 1, G, P]
    parts = [y.unsqueeze(axis).name for y in (a * c - b * s, b * c + a * s)]  # as t, with 1 for 2
    turned = x.like(x.graph.node("Concat", *parts, axis=axis), t.shape).flatten(3)  # [B, L, H, 2GP]
    if rotated == width:
        return turned
    rest = x.narrow(3, rotated, width - rotated)
    return x.like(x.graph.node("Concat", turned.name, rest.name, axis=3), x.shape)


def attention(
    q: Value,
    k: Value,
    v: Value,
    key_start: Value,
    key_end: Value,
    scale: float,
    layer_scale: float,
    pb_relax: float,
) -> Value:
    g = q.graph
    groups = k.shape[2]
    kt = k.permute(0, 2, 3, 1).unsqueeze(2)  # [B, K, 1, E, S]
    vt = v.permute(0, 2, 1, 3).unsqueeze(2)  # [B, K, 1, S, E]
    qt = q.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)  # [B, K, R, L, E]
    qt = qt * (scale / layer_scale)
    scores = qt.like(g.node("MatMul", qt.name, kt.name), (*qt.shape[:-1], 0))  # [B, K, R, L, S]
    seen = visible(k, key_start, key_end).name
    least = g.number(LEAST / max(layer_scale, pb_relax, 1.0))
    scores = scores.like(g.node("Where", seen, scores.name, least), scores.shape)
    if pb_relax:
        scores = scores / pb_relax
        most = scores.like(g.node("ReduceMax", scores.name, g.ints(-1)), (*qt.shape[:-1], 1))
        scores = (scores - most) * pb_relax
    if layer_scale != 1.0:
        scores = scores * layer_scale
    share = g.node("Where", seen, g.node("Softmax", scores.name, axis=-1), g.number(0.0))
    y = qt.like(g.node("MatMul", share, vt.name), (*qt.shape[:-1], v.shape[-1]))  # [B, K, R, L, C]
    y = y.permute(0, 3, 1, 2, 4)  # [B, L, K, R, E]
    return y.flatten(2).unflatten(2, (q.shape[2], v.shape[-1]))  # [B, L, H, C]


def visible(k: Value, key_start: Value, key_end: Value) -> Value:
    """Returns the mask, bool [B, 1, 1, L, S]. It is made once, because all layers have the same
    keys."""
    g = k.graph
    scalar = [g.tensor(torch.tensor(n)) for n in (0, 1)]
    count = g.node("Gather", g.node("Shape", k.name), scalar[1], axis=0)
    j = g.node("Range", scalar[0], count, scalar[1])
    start, end = (x.unsqueeze(2).name for x in (key_start, key_end))  # [B, L, 1]
    after = g.node("GreaterOrEqual", j, start)
    seen = k.like(g.node("And", after, g.node("Less", j, end)), (0, 0, 0), torch.bool)  # [B, L, S]
    return seen.unsqueeze(1).unsqueeze(1)  # [B, 1, 1, L, S]


def gelu(x: Value) -> Value:
    return x.like(x.graph.node("Gelu", x.name, approximate="tanh"), x.shape)


def geglu(x: Value) -> Value:
    a, b = x.split_with_sizes([x.shape[-1] // 2] * 2, -1)
    return a * b.unary("Gelu")


def swiglu(x: Value) -> Value:
    gate, u = x.split_with_sizes([x.shape[-1] // 2] * 2, -1)
    return gate * gate.unary("Sigmoid") * u


TABLE: dict[str, Translation] = {
    f.__name__: f
    for f in (
        linear,
        quantized_linear,
        embedding,
        rms_norm,
        layer_norm,
        add_rms_norm,
        add_layer_norm,
        rope,
        attention,
        gelu,
        geglu,
        swiglu,
        experts.route,
        experts.permute,
        experts.unpermute,
        experts.grouped_linear,
        quantized_grouped_linear,
    )
}
