"""Implements norms, gated activations and cross-entropy in Triton, for CUDA, ROCm and Ascend where
the compiled kernels are not built. The kernels implement the operators that csrc/ declares, so
autograd, fakes and torch.compile are the same. Needs triton; imported only by a backend that uses
it.

Shapes: N rows, D width, F inner width, V vocabulary, C chunks of rows."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

Three = tuple[Tensor, Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]

GELU, GEGLU, SWIGLU = range(3)
"""kinds of activation, numbered as in csrc/bindings"""
COLUMNS = 128
"""columns of a program that sums over rows"""
LOGITS = 4096
"""logits that a row's program reads at a time"""


@triton.jit
def norm_rows(
    x,
    residual,
    weight,
    bias,
    y,
    total,
    stats,
    rows,
    width,
    eps,
    alpha,
    ADD: tl.constexpr,
    LAYER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes y, the rounded sum, 1 / std and the mean of one row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < width
    t = tl.load(x + row * width + i, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        t += alpha * tl.load(residual + row * width + i, mask=inside, other=0.0).to(tl.float32)
        rounded = t.to(total.dtype.element_ty)
        tl.store(total + row * width + i, rounded, mask=inside)
        t = rounded.to(tl.float32)
    if LAYER:
        mean = tl.sum(t, 0) / width
        tl.store(stats + rows + row, mean)
        t = tl.where(inside, t - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(t * t, 0) / width + eps)
    tl.store(stats + row, scale)
    out = t * scale * tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    if LAYER:
        out += tl.load(bias + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + i, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_rows_backward(
    dy,
    dtotal,
    total,
    weight,
    stats,
    dx,
    dresidual,
    rows,
    width,
    alpha,
    MORE: tl.constexpr,
    LAYER: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes dx (and alpha dx) of one row: (g - mean(g) - h mean(g h)) / std with g = dy weight."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < width
    scale = tl.load(stats + row)
    t = tl.load(total + row * width + i, mask=inside, other=0.0).to(tl.float32)
    if LAYER:
        t -= tl.load(stats + rows + row)
    h = tl.where(inside, t * scale, 0.0)
    g = tl.load(dy + row * width + i, mask=inside, other=0.0).to(tl.float32)
    g *= tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    d = g - h * (tl.sum(g * h, 0) / width)
    if LAYER:
        d -= tl.sum(g, 0) / width
    d *= scale
    if MORE:
        d += tl.load(dtotal + row * width + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row * width + i, d.to(dx.dtype.element_ty), mask=inside)
    if SCALED:
        out = (alpha * d).to(dresidual.dtype.element_ty)
        tl.store(dresidual + row * width + i, out, mask=inside)


@triton.jit
def norm_columns_backward(
    dy,
    total,
    stats,
    dweight,
    dbias,
    rows,
    width,
    per_chunk,
    LAYER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes a chunk's sums of dy h and of dy for BLOCK columns."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    chunk = tl.program_id(1).to(tl.int64)
    w = tl.zeros((BLOCK,), tl.float32)
    b = tl.zeros((BLOCK,), tl.float32)
    for row in range(chunk * per_chunk, tl.minimum((chunk + 1) * per_chunk, rows)):
        d = tl.load(dy + row * width + i, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(total + row * width + i, mask=inside, other=0.0).to(tl.float32)
        if LAYER:
            t -= tl.load(stats + rows + row)
        w += d * t * tl.load(stats + row)
        b += d
    tl.store(dweight + chunk * width + i, w, mask=inside)
    if LAYER:
        tl.store(dbias + chunk * width + i, b, mask=inside)


@triton.jit
def slope(x, KIND: tl.constexpr):
    """Returns value and derivative of tanh-GELU (0), erf-GELU (1) or SiLU (2)."""
    if KIND == 1:
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        return x * cdf, cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    z = x
    dz = tl.full(x.shape, 1.0, tl.float32)
    if KIND == 0:  # x sigmoid(2z) with z = sqrt(2/pi) (x + 0.044715 x^3)
        z = x * (1.5957691216057308 + 0.07135481282052834 * x * x)
        dz = 1.5957691216057308 + 0.21406443846158502 * x * x
    s = 1.0 / (1.0 + tl.exp(-z))
    return x * s, s + x * dz * s * (1.0 - s)


@triton.jit
def activate(x, dy, y, size, width, KIND: tl.constexpr, BACK: tl.constexpr, BLOCK: tl.constexpr):
    """Writes BLOCK elements of y, or of the gradient of x. A gated row of x is [a, b]: GeGLU's gate
    is b, SwiGLU's is a."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    gate = i
    other = i
    if KIND != 0:
        gate = i // width * 2 * width + i % width
        other = gate + width
        if KIND == 1:
            other = gate
            gate = gate + width
    value, derivative = slope(tl.load(x + gate, mask=inside, other=0.0).to(tl.float32), KIND)
    o = tl.full((BLOCK,), 1.0, tl.float32)
    if KIND != 0:
        o = tl.load(x + other, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        d = tl.load(dy + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + gate, (d * o * derivative).to(y.dtype.element_ty), mask=inside)
        if KIND != 0:
            tl.store(y + other, (d * value).to(y.dtype.element_ty), mask=inside)
    else:
        tl.store(y + i, (value * o).to(y.dtype.element_ty), mask=inside)


@triton.jit
def row_losses(
    logits, labels, token_weight, loss, vocab, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes the loss of one row: maximum and sum in one pass (Milakov & Gimelshein 2018). Then
    writes the gradient over the logits."""
    row = tl.program_id(0).to(tl.int64)
    z = logits + row * vocab
    label = tl.load(labels + row)
    weight = tl.load(token_weight + row)
    hit = tl.load(z + label).to(tl.float32)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for first in range(0, vocab, BLOCK):
        i = first + tl.arange(0, BLOCK)
        part = tl.load(z + i, mask=i < vocab, other=float("-inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(part, 0))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(part - new), 0)
        top = new
    lse = top + tl.log(total)
    tl.store(loss + row, (lse - hit) * weight)
    if GRADIENT:
        for first in range(0, vocab, BLOCK):
            i = first + tl.arange(0, BLOCK)
            part = tl.load(z + i, mask=i < vocab, other=float("-inf")).to(tl.float32)
            p = tl.exp(part - lse) - tl.where(i == label, 1.0, 0.0)
            tl.store(z + i, (p * weight).to(logits.dtype.element_ty), mask=i < vocab)


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1] if x.shape[-1] else 0


def norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    alpha: float,
) -> Three:
    x, weight = x.contiguous(), weight.contiguous()
    rows, width = _rows(x), x.shape[-1]
    y = torch.empty_like(x)
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    stats = x.new_empty((1 if bias is None else 2, rows), dtype=torch.float32)
    if x.numel():
        norm_rows[(rows,)](
            x,
            None if residual is None else residual.contiguous(),
            weight,
            None if bias is None else bias.contiguous(),
            y,
            total,
            stats,
            rows,
            width,
            eps,
            alpha,
            ADD=residual is not None,
            LAYER=bias is not None,
            BLOCK=triton.next_power_of_2(width),
        )
    return y, total, stats


def norm_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    stats: Tensor,
    layer: bool,
    residual: bool,
    alpha: float,
) -> Four:
    dy, total, weight = dy.contiguous(), total.contiguous(), weight.contiguous()
    rows, width = _rows(total), total.shape[-1]
    scaled = residual and alpha != 1.0  # else the residual's gradient is dx itself
    dx = torch.empty_like(total)
    dresidual = torch.empty_like(total) if scaled else total.new_empty(0)
    per_chunk = max(16, triton.cdiv(rows, 128))
    chunks = triton.cdiv(rows, per_chunk)
    sums = stats.new_zeros((2 if layer else 1, chunks, width))
    if total.numel():
        more = None if dtotal is None else dtotal.contiguous()
        norm_rows_backward[(rows,)](
            dy,
            more,
            total,
            weight,
            stats,
            dx,
            dresidual,
            rows,
            width,
            alpha,
            MORE=more is not None,
            LAYER=layer,
            SCALED=scaled,
            BLOCK=triton.next_power_of_2(width),
        )
        norm_columns_backward[(triton.cdiv(width, COLUMNS), chunks)](
            dy, total, stats, sums[0], sums[-1], rows, width, per_chunk, LAYER=layer, BLOCK=COLUMNS
        )
    dbias = sums[1].sum(0).to(weight.dtype) if layer else weight.new_empty(0)
    return dx, dresidual, sums[0].sum(0).to(weight.dtype), dbias


def _activate(x: Tensor, dy: Tensor | None, y: Tensor, kind: int, width: int) -> Tensor:
    size = (y if dy is None else dy).numel()
    if size:
        block = 1024
        activate[(triton.cdiv(size, block),)](
            x, dy, y, size, width, KIND=kind, BACK=dy is not None, BLOCK=block
        )
    return y


def activation_forward(x: Tensor, kind: int) -> Tensor:
    width = x.shape[-1] // (1 if kind == GELU else 2)
    return _activate(x.contiguous(), None, x.new_empty((*x.shape[:-1], width)), kind, width)


def activation_backward(dy: Tensor, x: Tensor, kind: int) -> Tensor:
    x = x.contiguous()
    return _activate(x, dy.contiguous(), torch.empty_like(x), kind, dy.shape[-1])


def linear_cross_entropy_forward(
    x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor, gradients: bool
) -> Three:
    """Computes the loss in chunks of rows as csrc/bindings/cuda does. The device refuses labels
    that are out of range."""
    torch._assert_async(((labels >= 0) & (labels < len(weight))).all(), "a label is out of range")
    rows, vocab = len(x), len(weight)
    chunk = min(rows, max(128, 2**28 // (vocab * x.element_size()))) or 1
    each = token_weight.new_empty(rows)
    dx = x.new_empty(x.shape if gradients else 0)
    dweight = token_weight.new_zeros(weight.shape if gradients else 0)
    for first in range(0, rows, chunk):
        part = x[first : first + chunk]
        z = part @ weight.t()
        row_losses[(len(part),)](
            z,
            labels[first:].contiguous(),
            token_weight[first:].contiguous(),
            each[first:],
            vocab,
            GRADIENT=gradients,
            BLOCK=min(LOGITS, triton.next_power_of_2(vocab)),
        )
        if gradients:
            torch.mm(z, weight, out=dx[first : first + chunk])
            dweight += z.t() @ part
    return each.sum(dtype=torch.float64).float(), dx, dweight.to(weight.dtype)


OPERATORS = {
    f.__name__: f
    for f in (
        norm_forward,
        norm_backward,
        activation_forward,
        activation_backward,
        linear_cross_entropy_forward,
    )
}
OPS = (
    "rms_norm",
    "layer_norm",
    "add_rms_norm",
    "add_layer_norm",
    "gelu",
    "geglu",
    "swiglu",
    "linear_cross_entropy",
)
"""the ops that these operators serve"""


def register(key: str) -> Any:
    """Registers these kernels for the operators of glm_core on dispatch key `key`, CUDA or
    PrivateUse1. They stay registered as long as the returned library lives."""
    library = torch.library.Library("glm_core", "IMPL")
    for name, function in OPERATORS.items():
        library.impl(name, function, key)
    return library
