"""Multiplies rows that are sorted by expert, each expert's by its own matrix in int8 or int4, in
one Triton kernel: codes are read as they are stored and become weights in registers. A weight is
rounded once to the dtype of the rows. Needs triton.

Shapes: M rows, X experts, XP the power of two that holds X, W inputs, F outputs, G groups of a
row; BM rows, BN outputs and BK inputs in a block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm_core.backends.cuda.attention_launch import family
from glm_core.backends.cuda.grouped_product import (
    DATA,
    FEW,
    Cut,
    check_counts,
    expert_of,
    padded,
    tiles,
)
from glm_core.backends.cuda.quantized import suits
from glm_core.backends.cuda.quantized_product import from_codes
from glm_core.ops.quant import round_activations

STEPS = (64, 32)
"""inputs of a step: the first that divides a group"""
CUTS: dict[str, dict[str, Cut]] = {
    "mma": {"few": Cut(16, 64, 64, 4, 3), "many": Cut(128, 64, 64, 4, 2)},
    "mfma": {"few": Cut(16, 64, 64, 4, 1), "many": Cut(128, 64, 64, 4, 1)},
    "fma": {"few": Cut(16, 32, 32, 4, 1), "many": Cut(32, 64, 32, 8, 1)},
    "vector": {"few": Cut(16, 32, 32, 4, 1), "many": Cut(32, 32, 32, 4, 1)},
}
"""kind of multiplier -> kernel -> cut, as in grouped_product.CUTS; a step is at most `inputs`"""


@triton.jit(do_not_specialize=DATA)
def multiply_codes(
    x,
    codes,
    scale,
    counts,
    y,
    rows,
    experts,
    outputs,
    width,
    group,
    groups,
    BITS: tl.constexpr,
    PAIRS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    XP: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Writes y [M, F] = x [M, W] (codes scale)[e]^T of BM rows of one expert and BN outputs; a
    scale [X, F, G] serves `group` inputs. EVEN: BK divides W."""
    e, first, end = expert_of(counts, experts, rows, tl.program_id(0), BM, XP)
    if e < XP:
        f = tl.program_id(1) * BN + tl.arange(0, BN)
        m = first + tl.arange(0, BM)
        k = tl.arange(0, BK)
        part: tl.constexpr = BK * BITS // 8
        byte = tl.arange(0, part)
        written = (m < end)[:, None] & (f < outputs)[None, :]
        at_y = y + m.to(tl.int64)[:, None] * outputs + f[None, :]
        m = tl.minimum(m, end - 1)
        row = e.to(tl.int64) * outputs + tl.minimum(f, outputs - 1)
        at_x = x + m.to(tl.int64)[:, None] * width + k[None, :]
        at_w = codes + row[:, None] * (width * BITS // 8) + byte[None, :]
        at_s = scale + row * groups
        acc = tl.zeros((BN, BM), tl.float32)
        for i in range(0, width, BK):
            factor = tl.load(at_s + i // group).to(tl.float32)
            if EVEN:
                a = tl.load(at_x + i)
                c = tl.load(at_w + i * BITS // 8)
            else:
                a = tl.load(at_x + i, mask=(k < width - i)[None, :], other=0.0)
                inside = byte < (width - i) * BITS // 8
                c = tl.load(at_w + i * BITS // 8, mask=inside[None, :], other=0)
            w = from_codes(c, factor, a.dtype, BITS, PAIRS)
            acc = tl.dot(w, tl.trans(a), acc, input_precision="ieee")
        tl.store(at_y, tl.trans(acc).to(y.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=DATA)
def multiply_codes_back(
    dy,
    codes,
    scale,
    counts,
    dx,
    rows,
    experts,
    outputs,
    width,
    group,
    groups,
    BITS: tl.constexpr,
    PAIRS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    XP: tl.constexpr,
):
    """Writes dx [M, W] = dy [M, F] (codes scale)[e] of BM rows of one expert and BN inputs, which
    lie in one group, BK outputs at a time."""
    e, first, end = expert_of(counts, experts, rows, tl.program_id(0), BM, XP)
    if e < XP:
        d = tl.program_id(1) * BN
        part: tl.constexpr = BN * BITS // 8
        byte = tl.arange(0, part)
        m = first + tl.arange(0, BM)
        k = tl.arange(0, BK)
        at = d + tl.arange(0, BN)
        written = (m < end)[:, None] & (at < width)[None, :]
        at_dx = dx + m.to(tl.int64)[:, None] * width + at[None, :]
        m = tl.minimum(m, end - 1)
        at_dy = dy + m.to(tl.int64)[:, None] * outputs + k[None, :]
        begin = e.to(tl.int64) * outputs
        here = (byte < (width - d) * BITS // 8)[None, :]
        acc = tl.zeros((BM, BN), tl.float32)
        for i in range(0, outputs, BK):
            inside = k < outputs - i
            row = begin + i + k
            factor = tl.load(scale + row * groups + d // group, mask=inside, other=0.0)
            at_w = codes + row[:, None] * (width * BITS // 8) + d * BITS // 8 + byte[None, :]
            c = tl.load(at_w, mask=inside[:, None] & here, other=0)
            a = tl.load(at_dy + i, mask=inside[None, :], other=0.0)
            w = from_codes(c, factor.to(tl.float32), a.dtype, BITS, PAIRS)
            acc = tl.dot(a, w, acc, input_precision="ieee")
        tl.store(at_dx, acc.to(dx.dtype.element_ty), mask=written)


def options(x: Tensor, experts: int, width: int, groups: int) -> tuple[Cut, int, bool]:
    """Returns how a product is cut, its step, and whether codes become weights two at a time by
    NVIDIA's instructions."""
    cut = CUTS[family(x.device, x.element_size())]["few" if len(x) <= FEW * experts else "many"]
    steps = [n for n in STEPS if n <= cut.inputs]
    step = next((n for n in steps if width // groups % n == 0), steps[-1])
    half = x.is_cuda and x.element_size() == 2 and not torch.version.hip
    return cut, step, half and suits(x.device.index or 0)


def quantized_grouped_linear_forward(
    rows: Tensor, weight: Tensor, scale: Tensor, counts: Tensor, bits: int, activation_bits: int
) -> Tensor:
    """Returns y [M, F]. Rounded activations are multiplied in float32, in which they are exact."""
    (experts, outputs, *more), width = scale.shape, rows.shape[1]
    groups = more[0] if more else 1
    check_counts(counts, len(rows), experts)
    y = rows.new_empty(len(rows), outputs)
    x = round_activations(rows.float()) if activation_bits == 8 else rows
    if y.numel():
        cut, step, pairs = options(x, experts, width, groups)
        grid = (tiles(len(x), experts, cut.rows), triton.cdiv(outputs, cut.outputs))
        with torch.cuda.device_of(x):
            multiply_codes[grid](
                *(x.contiguous(), weight.contiguous(), scale.contiguous(), counts.contiguous(), y),
                *(len(x), experts, outputs, width, width // groups, groups, bits, pairs),
                *(cut.rows, cut.outputs, step, padded(experts), width % step == 0),
                num_warps=cut.warps,
                num_stages=cut.stages,
            )
    return y


def quantized_grouped_linear_backward(
    dy: Tensor, weight: Tensor, scale: Tensor, counts: Tensor, bits: int
) -> Tensor:
    """Returns drows [M, W]."""
    (experts, outputs, *more), width = scale.shape, weight.shape[2] * 8 // bits
    groups = more[0] if more else 1
    dx = dy.new_empty(len(dy), width)
    if dx.numel():
        cut, step, pairs = options(dy, experts, width, groups)
        grid = (tiles(len(dy), experts, cut.rows), triton.cdiv(width, step))
        with torch.cuda.device_of(dy):
            multiply_codes_back[grid](
                *(dy.contiguous(), weight.contiguous(), scale.contiguous(), counts.contiguous()),
                *(dx, len(dy), experts, outputs, width, width // groups, groups, bits, pairs),
                *(cut.rows, step, cut.outputs, padded(experts)),
                num_warps=cut.warps,
                num_stages=cut.stages,
            )
    return dx
