"""Multiplies many rows in half precision with a weight in int8 or int4, in one Triton kernel: codes
are read as they are stored, become weights in registers, and go to tensor cores from there. A
weight is rounded once to half precision, as where it is converted first. Needs triton.

Shapes: M rows, W width, F outputs, G groups of a row; BM rows, BN outputs and BK inputs in a
block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm_core.backends.cuda import probe

STEPS = (64, 32)
"""inputs of a step: the first that divides a group"""
WGMMA = {"BM": 256, "BN": 64, "num_warps": 4, "num_stages": 2}
MMA = {"BM": 128, "BN": 64, "num_warps": 4, "num_stages": 2}
MFMA = {"BM": 128, "BN": 64, "num_warps": 4, "num_stages": 1}
"""how the kernel is cut for many rows on sm_90, for NVIDIA else, and for AMD. A processor holds two
blocks or more: one multiplies while another makes weights of its codes. Chosen by what compiles
without spills, not by speed: no GPU has run them (docs/adr/0014-decoding-on-a-gpu.md)"""

# A byte's nibbles, the even element's in the high one, move into the low ends of two halves'
# mantissas, with their top bits flipped; the offset is subtracted, exactly. The scale is a sum of
# two halves, so that their product with a code is rounded once.
_STEPS = """{{
.reg .b32 a, b, one, minus, zero;
mov.b32 one, {one};
mov.b32 minus, {minus};
mov.b32 zero, 0x80008000;
shr.u32 a, $2, 4;
prmt.b32 a, a, $2, 0x7470;
lop3.b32 a, a, 0x000f000f, {offset}, 0x6a;
fma.rn.{kind}x2 a, a, one, minus;
fma.rn.{kind}x2 b, a, $4, zero;
fma.rn.{kind}x2 a, a, $3, b;
mov.b32 {{$0, $1}}, a;
}}"""
FLOAT16_PAIR = tl.constexpr(
    _STEPS.format(kind="f16", offset="0x64086408", one="0x3c003c00", minus="0xe408e408")
)
BFLOAT16_PAIR = tl.constexpr(
    _STEPS.format(kind="bf16", offset="0x43084308", one="0x3f803f80", minus="0xc308c308")
)
REGISTERS = tl.constexpr("=h,=h,r,r,r")


@triton.jit
def twice(x):
    """Returns a half's bits in both halves of an int32."""
    bits = x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (bits << 16)


@triton.jit
def from_codes(codes, scale, dtype: tl.constexpr, BITS: tl.constexpr, PAIRS: tl.constexpr):
    """Returns the weights [BN, BK] of a tile of codes and their scales [BN], float32. PAIRS: by
    NVIDIA's instructions for two at a time."""
    if BITS == 8:
        weights = (codes.to(tl.float32) * scale[:, None]).to(dtype)
    else:
        if PAIRS:
            near = scale.to(dtype)
            rest = twice((scale - near.to(tl.float32)).to(dtype))[:, None]
            words = codes.to(tl.uint8, bitcast=True).to(tl.int32)
            args = [words, twice(near)[:, None], rest]
            if dtype == tl.bfloat16:
                even, odd = tl.inline_asm_elementwise(
                    BFLOAT16_PAIR, REGISTERS, args, (tl.bfloat16, tl.bfloat16), True, 1
                )
            else:
                even, odd = tl.inline_asm_elementwise(
                    FLOAT16_PAIR, REGISTERS, args, (tl.float16, tl.float16), True, 1
                )
        else:
            even = ((codes >> 4).to(tl.float32) * scale[:, None]).to(dtype)
            odd = (((codes << 4) >> 4).to(tl.float32) * scale[:, None]).to(dtype)
        weights = tl.reshape(tl.join(even, odd), (codes.shape[0], 2 * codes.shape[1]))
    return weights


@triton.jit(do_not_specialize=["rows"])
def many_rows(
    x,
    codes,
    scale,
    bias,
    y,
    rows,
    outputs,
    width,
    groups,
    BIASED: tl.constexpr,
    BITS: tl.constexpr,
    PAIRS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Writes y [M, F] = x [M, W] (codes scale) [F, W]^T + bias of BM rows and BN outputs. Programs
    that read the same codes follow each other, so that the second cache serves all but one."""
    f = tl.program_id(1) * BN + tl.arange(0, BN)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    stored = (m < rows)[:, None] & (f < outputs)[None, :]
    at_y = y + m.to(tl.int64)[:, None] * outputs + f[None, :]
    f = tl.minimum(f, outputs - 1)
    m = tl.minimum(m, rows - 1)
    part: tl.constexpr = BK * BITS // 8
    at_w = codes + f.to(tl.int64)[:, None] * (width * BITS // 8) + tl.arange(0, part)[None, :]
    at_x = x + m.to(tl.int64)[:, None] * width + tl.arange(0, BK)[None, :]
    at_s = scale + f.to(tl.int64) * groups
    group = width // groups
    left = group  # inputs of the current group that are not read yet
    factor = tl.load(at_s).to(tl.float32)
    acc = tl.zeros((BN, BM), tl.float32)
    for i in range(0, width, BK):
        w = from_codes(tl.load(at_w + i * BITS // 8), factor, x.dtype.element_ty, BITS, PAIRS)
        left -= BK
        at_s += tl.where((left == 0) & (i + BK < width), 1, 0)
        left = tl.where(left == 0, group, left)
        factor = tl.load(at_s).to(tl.float32)
        acc = tl.dot(w, tl.trans(tl.load(at_x + i)), acc)
    if BIASED:
        acc += tl.load(bias + f).to(tl.float32)[:, None]
    tl.store(at_y, tl.trans(acc.to(y.dtype.element_ty)), mask=stored)


def cut_for(architecture: str, rows: int) -> dict[str, int]:
    """Returns how the kernel is cut for a chip and a number of rows."""
    if not architecture.startswith("sm_"):
        return MFMA
    return WGMMA if architecture == "sm_90" and rows > MMA["BM"] else MMA


def product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """Returns y [..., F] of x [..., W]; a group is a multiple of 32."""
    outputs, groups = scale.shape[0], scale[0].numel()
    x, weight, scale = x.contiguous(), weight.contiguous(), scale.contiguous()
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    y = x.new_empty(*x.shape[:-1], outputs)
    pairs = x.is_cuda and not torch.version.hip
    step = next(k for k in STEPS if width // groups % k == 0)
    cut = cut_for(probe.architecture(x.device.index or 0), rows) if x.is_cuda else MFMA
    grid = (triton.cdiv(rows, cut["BM"]), triton.cdiv(outputs, cut["BN"]))
    with torch.cuda.device_of(x):
        many_rows[grid](
            *(x, weight, scale, x if bias is None else bias.contiguous(), y),
            *(rows, outputs, width, groups, bias is not None, bits, pairs),
            BK=step,
            **cut,
        )
    return y
