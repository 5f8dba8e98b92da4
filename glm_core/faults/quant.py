"""Wrong products with a quantised weight. Shapes: D in, F out, G groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm_core.faults.mutant import mutant
from glm_core.ops import quantized_linear
from glm_core.ops.quant import BLOCK, dequantize, pack, unpack


@mutant(quantized_linear, wrong="the even element is taken from the low nibble")
def nibbles_swapped(weight: Tensor, bits: int, **a: Any) -> Tensor:
    codes = unpack(weight, bits)
    swapped = codes.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if bits == 4 else codes
    return quantized_linear.reference(weight=_packed(swapped, bits), bits=bits, **a)


@mutant(quantized_linear, wrong="the low nibble is not sign-extended")
def low_nibble_unsigned(weight: Tensor, bits: int, **a: Any) -> Tensor:
    codes = unpack(weight, bits).clone()
    if bits == 4:
        codes[:, 1::2] &= 15
    return quantized_linear.reference(weight=codes, bits=8, **a)


@mutant(quantized_linear, wrong="each group takes the scale of the one before")
def group_off_by_one(scale: Tensor, **a: Any) -> Tensor:
    return quantized_linear.reference(scale=scale.roll(1, -1) if scale.dim() > 1 else scale, **a)


@mutant(quantized_linear, wrong="each row takes the scale of the next")
def scale_of_the_next_row(scale: Tensor, **a: Any) -> Tensor:
    return quantized_linear.reference(scale=scale.roll(-1, 0), **a)


@mutant(quantized_linear, wrong="a row whose scale is zero gives NaN, as w / scale would")
def zero_row_nan(scale: Tensor, **a: Any) -> Tensor:
    return quantized_linear.reference(scale=scale * (scale / scale), **a)


@mutant(quantized_linear, wrong="the bias is multiplied by the scale too")
def bias_scaled(scale: Tensor, bias: Tensor | None = None, **a: Any) -> Tensor:
    steps = scale if scale.dim() == 1 else scale[:, 0]
    scaled = None if bias is None else bias * steps.to(bias)
    return quantized_linear.reference(scale=scale, bias=scaled, **a)


@mutant(quantized_linear, wrong="weights are rounded to float16 before the product")
def weight_rounded_to_half(x: Tensor, weight: Tensor, scale: Tensor, bits: int, **a: Any) -> Tensor:
    w = dequantize(weight, scale.half(), bits, torch.float16).double()
    top = w.abs().amax(-1).clamp(min=1e-30)
    codes = (w / top[:, None] * 127).round().to(torch.int8)
    return quantized_linear.reference(x, codes, (top / 127).float(), bits=8, **a)


@mutant(quantized_linear, wrong="activations are rounded where 16 bits are asked for")
def activations_always_rounded(activation_bits: int, **a: Any) -> Tensor:
    return quantized_linear.reference(activation_bits=8, **a)


@mutant(quantized_linear, wrong="activations are never rounded to int8")
def activations_never_rounded(activation_bits: int = 16, **a: Any) -> Tensor:
    return quantized_linear.reference(activation_bits=16, **a)


@mutant(quantized_linear, wrong="one activation step for a whole row, not for 32 inputs")
def activation_step_of_the_row(x: Tensor, activation_bits: int = 16, **a: Any) -> Tensor:
    if activation_bits == 8 and x.numel():
        step = x.detach().double().abs().amax(-1, keepdim=True) / 127
        coarse = torch.where(step > 0, x.double() / step, 0.0).round() * step
        x = x + (coarse.to(x.dtype) - x).detach()
    return quantized_linear.reference(x, activation_bits=16, **a)


@mutant(quantized_linear, wrong="activation codes are cut off, not rounded to nearest")
def activation_codes_cut(x: Tensor, activation_bits: int = 16, **a: Any) -> Tensor:
    if activation_bits == 8:
        x = x + (_cut(x.detach()) - x).detach()
    return quantized_linear.reference(x, activation_bits=16, **a)


@mutant(quantized_linear, wrong="an activation block of zeros gives NaN")
def zero_block_nan(x: Tensor, activation_bits: int = 16, **a: Any) -> Tensor:
    if activation_bits == 8:
        x = x * (x.abs().amax() / x.abs().amax() if x.numel() else 1)
    return quantized_linear.reference(x, activation_bits=activation_bits, **a)


def _cut(x: Tensor) -> Tensor:
    parts = []
    for block in x.split(BLOCK, -1):
        step = block.abs().amax(-1, keepdim=True) / 127 if block.numel() else block
        parts.append(torch.where(step > 0, block / step, 0.0).trunc() * step)
    return torch.cat(parts, -1)


def _packed(codes: Tensor, bits: int) -> Tensor:
    return pack(codes) if bits == 4 else codes
