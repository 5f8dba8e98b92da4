"""Multiplies rows that are sorted by expert, each expert's by its own matrix, in one Triton kernel
whatever the counts are: forward, and the gradients of rows and weights. The counts stay on the
device, every sum has one order, and an expert without rows costs no product. Needs triton.

Shapes: M rows, X experts, XP the power of two that holds X, W inputs of a product, F outputs; BM
rows, BN outputs and BK inputs in a block."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm_core.backends.cuda.attention_launch import family
from glm_core.errors import ShapeError

Two = tuple[Tensor, Tensor]
DATA = ["rows", "experts"]
"""arguments whose values must not cause another compilation"""
FEW = 32
"""rows of an expert, on average, up to which a block is cut for few"""


class Cut(NamedTuple):
    """How a kernel is cut: rows, outputs and inputs of a block, warps, loads in flight."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


CUTS: dict[str, dict[str, Cut]] = {
    "mma": {
        "few": Cut(16, 64, 128, 4, 3),
        "many": Cut(128, 128, 64, 8, 3),
        "weight": Cut(128, 128, 32, 8, 3),
    },
    "mfma": {
        "few": Cut(16, 64, 64, 4, 1),
        "many": Cut(128, 64, 32, 4, 1),
        "weight": Cut(64, 64, 32, 4, 1),
    },
    "fma": {
        "few": Cut(16, 32, 32, 4, 2),
        "many": Cut(64, 64, 16, 8, 2),
        "weight": Cut(64, 64, 16, 8, 2),
    },
    "vector": {
        "few": Cut(16, 32, 32, 4, 1),
        "many": Cut(32, 32, 16, 4, 1),
        "weight": Cut(32, 32, 16, 4, 1),
    },
}
"""kind of multiplier (attention_launch.family) -> kernel -> cut. Chosen by what compiles without
spills, not by speed: no GPU has run them"""


@triton.jit
def expert_of(counts, experts, rows, tile, BM: tl.constexpr, XP: tl.constexpr):
    """Returns the expert of a tile of BM rows, the tile's first row, and the end of the expert's
    rows. The expert is XP where there is no such tile."""
    x = tl.arange(0, XP)
    count = tl.load(counts + x, mask=x < experts, other=0).to(tl.int32)
    tiles = (count + BM - 1) // BM
    e = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    begin = tl.sum(tl.where(x < e, count, 0), 0)
    end = tl.minimum(begin + tl.sum(tl.where(x == e, count, 0), 0), rows)
    first = begin + (tile - tl.sum(tl.where(x < e, tiles, 0), 0)) * BM
    return tl.where(first < end, e, XP), first, end


@triton.jit(do_not_specialize=DATA)
def multiply_rows(
    x,
    weight,
    counts,
    y,
    rows,
    experts,
    outputs,
    width,
    w_x,
    w_f,
    w_w,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    XP: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Writes y [M, F] = x [M, W] weight[e]^T of BM rows of one expert and BN outputs; the weight
    [X, F, W] has strides w_x, w_f, w_w. Programs that read the same weights follow each other.
    EVEN: BK divides W."""
    e, first, end = expert_of(counts, experts, rows, tl.program_id(0), BM, XP)
    if e < XP:
        f = tl.program_id(1) * BN + tl.arange(0, BN)
        m = first + tl.arange(0, BM)
        k = tl.arange(0, BK)
        written = (m < end)[:, None] & (f < outputs)[None, :]
        at_y = y + m.to(tl.int64)[:, None] * outputs + f[None, :]
        m = tl.minimum(m, end - 1)
        at_x = x + m.to(tl.int64)[:, None] * width + k[None, :]
        at_w = weight + e.to(tl.int64) * w_x
        at_w += f.to(tl.int64)[None, :] * w_f + k.to(tl.int64)[:, None] * w_w
        known = (f < outputs)[None, :]
        acc = tl.zeros((BM, BN), tl.float32)
        for i in range(0, width, BK):
            if EVEN:
                a = tl.load(at_x)
                b = tl.load(at_w, mask=known, other=0.0)
            else:
                inside = k < width - i
                a = tl.load(at_x, mask=inside[None, :], other=0.0)
                b = tl.load(at_w, mask=inside[:, None] & known, other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
            at_x += BK
            at_w += BK * w_w
        tl.store(at_y, acc.to(y.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=DATA)
def multiply_columns(
    dy,
    x,
    counts,
    dweight,
    rows,
    experts,
    outputs,
    width,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    XP: tl.constexpr,
):
    """Writes dweight [X, F, W] = dy^T x over the rows of one expert, for BM outputs and BN inputs,
    BK rows at a time; zeros where it has none."""
    e = tl.program_id(2)
    every = tl.arange(0, XP)
    count = tl.load(counts + every, mask=every < experts, other=0).to(tl.int32)
    begin = tl.sum(tl.where(every < e, count, 0), 0)
    end = tl.minimum(begin + tl.sum(tl.where(every == e, count, 0), 0), rows)
    f = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(begin, end, BK):
        m = first + tl.arange(0, BK)
        at_dy = dy + m.to(tl.int64)[None, :] * outputs + f[:, None]
        at_x = x + m.to(tl.int64)[:, None] * width + d[None, :]
        a = tl.load(at_dy, mask=(m < end)[None, :] & (f < outputs)[:, None], other=0.0)
        b = tl.load(at_x, mask=(m < end)[:, None] & (d < width)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    at = dweight + (e.to(tl.int64) * outputs + f.to(tl.int64)[:, None]) * width + d[None, :]
    inside = (f < outputs)[:, None] & (d < width)[None, :]
    tl.store(at, acc.to(dweight.dtype.element_ty), mask=inside)


def padded(experts: int) -> int:
    """Returns XP."""
    return int(max(16, triton.next_power_of_2(experts)))


def cut_for(x: Tensor, experts: int) -> Cut:
    """Returns how a product of these rows is cut."""
    size = "few" if len(x) <= FEW * experts else "many"
    return CUTS[family(x.device, x.element_size())][size]


def tiles(rows: int, experts: int, block: int) -> int:
    """Returns the most blocks that so many rows of so many experts can fill."""
    return min(rows, rows // block + experts)


def check_counts(counts: Tensor, rows: int, experts: int) -> None:
    """Raises ShapeError if the number of counts is wrong; the device refuses a wrong sum."""
    if counts.numel() != experts:
        raise ShapeError(
            f"grouped_linear: {experts} experts need as many counts, received {counts.numel()}"
        )
    what = "grouped_linear: the counts of the experts do not add up to the number of rows"
    torch._assert_async(counts.sum() == rows, what)


def times_experts(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Returns y [M, F] of x [M, W] and a weight [X, F, W] of any strides."""
    x, counts = x.contiguous(), counts.contiguous()
    (rows, width), (experts, outputs, _) = x.shape, weight.shape
    y = x.new_empty(rows, outputs)
    if y.numel():
        cut = cut_for(x, experts)
        grid = (tiles(rows, experts, cut.rows), triton.cdiv(outputs, cut.outputs))
        with torch.cuda.device_of(x):
            multiply_rows[grid](
                *(x, weight, counts, y, rows, experts, outputs, width, *weight.stride()),
                *(cut.rows, cut.outputs, cut.inputs, padded(experts), width % cut.inputs == 0),
                num_warps=cut.warps,
                num_stages=cut.stages,
            )
    return y


def grouped_linear_forward(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    check_counts(counts, len(rows), len(weight))
    return times_experts(rows, weight, counts)


def grouped_linear_backward(
    dy: Tensor,
    rows: Tensor,
    weight: Tensor,
    counts: Tensor,
    wants_rows: bool,
    wants_weight: bool,
) -> Two:
    """Returns drows and dweight, empty where they are not wanted."""
    drows, dweight = rows.new_empty(0), weight.new_empty(0)
    if wants_rows:
        drows = times_experts(dy, weight.transpose(1, 2), counts)
    if wants_weight:
        dweight = _weight_gradient(dy.contiguous(), rows.contiguous(), counts, len(weight))
    return drows, dweight


def _weight_gradient(dy: Tensor, rows: Tensor, counts: Tensor, experts: int) -> Tensor:
    outputs, width = dy.shape[1], rows.shape[1]
    dweight = rows.new_empty(experts, outputs, width)
    if dweight.numel():
        cut = CUTS[family(rows.device, rows.element_size())]["weight"]
        grid = (triton.cdiv(outputs, cut.rows), triton.cdiv(width, cut.outputs), experts)
        with torch.cuda.device_of(rows):
            multiply_columns[grid](
                *(dy, rows, counts.contiguous(), dweight, len(rows), experts, outputs, width),
                *(cut.rows, cut.outputs, cut.inputs, padded(experts)),
                num_warps=cut.warps,
                num_stages=cut.stages,
            )
    return dweight
