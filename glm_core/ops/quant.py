"""Declares the product with a quantised weight, and defines how weights are quantised: one scale
per row as in GLM-130B, or one per group of inputs.

Shapes: D input width, F output width, G groups of D / G inputs that share a scale."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from glm_core.dispatch import op
from glm_core.errors import ShapeError
from glm_core.ops.layout import gapped
from glm_core.ops.precision import num_bytes, wide
from glm_core.spec import Cost, Draw, Maker, Sample, normal

BITS = (8, 4)
WORKING_SET = 1 << 22
"""weights that are quantised at a time; bounds the float32 copies"""
BLOCK = 32
"""inputs that share a scale when activations are rounded to int8"""


def quantize(weight: Tensor, bits: int, group: int = 0) -> tuple[Tensor, Tensor]:
    """Returns (codes, scale) of a float weight [F, D]. Codes are int8 [F, D], or [F, D / 2] with
    two 4-bit codes in a byte; scale is float16 [F], or [F, D / group].

    q = round(w / scale), half to even, with scale = max|w| / (2^(bits-1) - 1) over a row or group;
    symmetric, without a zero point. A row whose scale underflows float16 gets scale 0 and codes 0
    (GLM-130B's division gives NaN there). Source: Zeng et al. 2022 (GLM-130B), section 5;
    quantization/functional.py. Raises ShapeError if D is not divisible or a weight is not
    finite."""
    rows, width = weight.shape
    _check(bits, width, group)
    groups = width // group if group else 1
    codes = torch.empty(rows, width * bits // 8, dtype=torch.int8, device=weight.device)
    scale = torch.empty(rows, groups, dtype=torch.half, device=weight.device)
    for part in row_parts(weight):  # bounds the float32 copies
        codes[part], scale[part] = _rounded_rows(wide(weight[part].detach()), bits, groups)
    return codes, scale if group else scale[:, 0]


def row_parts(weight: Tensor) -> Iterator[slice]:
    """Returns slices that cut the rows of a matrix into parts of about WORKING_SET elements."""
    rows, width = weight.shape
    step = max(WORKING_SET // max(width, 1), 1)
    return (slice(begin, begin + step) for begin in range(0, rows, step))


def _rounded_rows(weight: Tensor, bits: int, groups: int) -> tuple[Tensor, Tensor]:
    """Returns codes, and scales [F, G]."""
    top = 2 ** (bits - 1) - 1
    parts = weight.reshape(len(weight), groups, -1)  # [F, G, D / G]
    scale = (parts.abs().amax(-1) / top).half()
    if not scale.isfinite().all():
        raise ShapeError(
            "quantize: the weight has values that are not finite, or too large for float16 scales; "
            "check the checkpoint"
        )
    step = scale.to(parts)[..., None]  # [F, G, 1]
    codes = torch.where(step > 0, parts / step, 0.0).round_().clamp_(-top, top)
    codes = codes.to(torch.int8).reshape(weight.shape)  # [F, D]
    return pack(codes) if bits == 4 else codes, scale


def _check(bits: int, width: int, group: int) -> None:
    if bits not in BITS:
        raise ShapeError(f"quantize: bits must be 8 or 4; received {bits}")
    if bits == 4 and width % 2:
        raise ShapeError(f"quantize: 4 bits need an even input width; received {width}")
    if group and (group % BLOCK or width % group):
        raise ShapeError(
            f"quantize: group={group} must be a multiple of {BLOCK} that divides the input width "
            f"{width}; use 0 for one scale a row"
        )


def pack(codes: Tensor) -> Tensor:
    """Packs 4-bit codes [..., D] in -8..7 into bytes [..., D / 2], with the even element in the
    HIGH nibble (GLM-130B kernels/quantization.cu, compress_int4_weight)."""
    return (codes[..., ::2] << 4) | (codes[..., 1::2] & 15)


def unpack(weight: Tensor, bits: int) -> Tensor:
    """Returns the codes as int8 [F, D]; both nibbles are sign-extended."""
    if bits == 8:
        return weight
    nibbles = torch.stack((weight >> 4, (weight << 4) >> 4), -1)  # [F, D / 2, 2]
    return nibbles.flatten(-2)  # [F, D]


def dequantize(weight: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Returns w = code * scale [F, D], formed in float32 at least and rounded once to `dtype`."""
    codes = unpack(weight, bits)
    wide_scale = scale.to(torch.promote_types(dtype, torch.float32))
    wide_scale = wide_scale.reshape(len(codes), -1, 1)  # [F, G, 1]
    grouped = codes.reshape(len(codes), wide_scale.shape[1], -1)  # [F, G, D / G]
    return (grouped * wide_scale).flatten(1).to(dtype)  # [F, D]


def round_activations(x: Tensor) -> Tensor:
    """Returns x rounded to int8 codes times a scale, max|x| / 127 over each block of 32 inputs of a
    row (the last block may be shorter), in x's dtype. The gradient passes straight through."""
    full = x.shape[-1] // BLOCK * BLOCK
    blocks = x[..., :full].unflatten(-1, (full // BLOCK, BLOCK))  # [..., D // 32, 32]
    whole_blocks = _rounded(blocks).flatten(-2)  # [..., D // 32 * 32]
    rounded = torch.cat((whole_blocks, _rounded(x[..., full:])), -1)  # [..., D]
    return x + (rounded - x).detach()


def _rounded(x: Tensor) -> Tensor:
    if not x.numel():
        return x
    step = x.abs().amax(-1, keepdim=True) / 127
    return torch.where(step > 0, x / step, 0.0).round().clamp(-127, 127) * step


def bytes_of_codes(bits: int, *shape: int) -> Maker:
    """Makes random codes over the whole range of their width; `shape` is the shape after
    packing."""

    def make(draw: Draw) -> Tensor:
        codes = torch.randint(-128 if bits == 4 else -127, 128, shape, generator=draw.generator)
        return codes.to(torch.int8).to(draw.device)

    return make


def steps(size: float, *shape: int) -> Maker:
    """Makes float16 scales in size/2 ... 3/2 size. With several rows the first is zero, like that
    of a row of zeros."""

    def make(draw: Draw) -> Tensor:
        scale = (torch.rand(shape, generator=draw.generator) + 0.5) * size
        scale[: int(shape[0] > 1)] = 0
        return scale.half().to(draw.device)

    return make


def quantized_linear_samples() -> Iterator[Sample]:
    def make(
        id: str,
        rows: tuple[int, ...],
        d: int,
        f: int,
        bits: int,
        group: int = 0,
        activation_bits: int = 16,
        bias: bool = True,
        std: float = 1.0,
        strided: bool = False,
    ) -> Sample:
        size = d**-0.5 / 2 ** (bits - 2)
        args = {
            "x": normal(*rows, d, std=std, strided=strided),
            "weight": bytes_of_codes(bits, f, d * bits // 8),
            "scale": steps(size, f, d // group) if group else steps(size, f),
            **({"bias": normal(f, std=0.2)} if bias else {}),
        }
        fixed = {"bits": bits, "activation_bits": activation_bits}
        return Sample(id, {**args, **fixed}, real="768" in id)

    yield make("2x5x96-64-int4", (2, 5), 96, 64, 4)
    yield make("2x5x96-64-int8", (2, 5), 96, 64, 8, bias=False)
    yield make("7x96-33-int4-group32", (7,), 96, 33, 4, group=32)
    yield make("3x384-17-int4-group128", (3,), 384, 17, 4, group=128, bias=False)
    yield make("3x256-17-int8-group128-strided", (3,), 256, 17, 8, group=128, strided=True)
    yield make("1x1-1-int8", (1,), 1, 1, 8)
    yield make("3x33-17-int8", (3,), 33, 17, 8)
    yield Sample("3x34-17-int4-gapped", gapped(make("", (3,), 34, 17, 4).args))
    yield make("3x34-17-tiny", (3,), 34, 17, 4, std=1e-4, bias=False)
    yield make("3x34-17-huge", (3,), 34, 17, 8, std=1e3)
    yield make("0x32-8-int4", (0,), 32, 8, 4)
    yield make("2x5x96-64-int4-a8", (2, 5), 96, 64, 4, activation_bits=8)
    yield make("7x328-33-int8-a8", (7,), 328, 33, 8, activation_bits=8)  # last block of 8
    yield make("3x384-17-int4-group32-a8", (3,), 384, 17, 4, group=32, activation_bits=8)
    yield make("9x384-17-int8-group128-a8", (9,), 384, 17, 8, group=128, activation_bits=8)
    yield make("3x96-17-int4-a8-zeros", (3,), 96, 17, 4, activation_bits=8, std=0.0)
    yield make("40x96-33-int4-group32", (40,), 96, 33, 4, group=32)  # dequantised, then multiplied
    yield make("40x96-33-int8-a8", (40,), 96, 33, 8, activation_bits=8)
    large = make("", (67,), 1056, 129, 4, group=32)
    yield Sample("67x1056-129-int4-group32", large.args, large=True)
    yield make("4x768-2304-int4-group128", (4,), 768, 2304, 4, group=128)  # QKV of GLM base


def quantized_linear_cost(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    bits: int = 8,
    activation_bits: int = 16,
) -> Cost:
    rows, fixed = x.numel() // max(x.shape[-1], 1), num_bytes(weight, scale)
    flops, out = 2 * x.numel() * len(weight), rows * len(weight) * x.element_size()
    moved = num_bytes(x, bias) + fixed + out
    return Cost(flops, moved, flops, fixed + num_bytes(x) + out)


@op(samples=quantized_linear_samples, cost=quantized_linear_cost, differentiable=("x",))
def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    bits: int = 8,
    activation_bits: int = 16,
) -> Tensor:
    """Computes y = x w^T + bias with w = code * scale. With activation_bits = 8, x is first rounded
    to int8 codes in blocks of 32 inputs (`round_activations`). Weight, scale and bias are frozen:
    only x has a gradient, that of the unrounded x.

    Shapes: x [..., D]; weight int8 [F, D], or for bits = 4 [F, D / 2] with the even element in the
    high nibble; scale float16 or float32 [F] or [F, G], one for D / G inputs; bias [F] -> [..., F].
    Neither w nor the rounded x is rounded to the working dtype. Accumulates in float32 at least: y
    over D, the gradient of x over F; each is rounded once to x's dtype. Source: Zeng et al. 2022
    (GLM-130B), section 5; blocks: Dettmers et al. 2022."""
    a = wide(x)
    a = round_activations(a) if activation_bits == 8 else a
    w = dequantize(weight, scale, bits, a.dtype)
    added = None if bias is None else bias.detach().to(a)
    return torch.nn.functional.linear(a, w, added).to(x.dtype)
