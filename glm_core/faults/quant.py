"""Declares the wrong kernels of the product with a quantised weight.
Shapes: D in, F out, G groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm_core.faults.fault import fault, mutant
from glm_core.faults.kernels import Arguments, changed
from glm_core.ops import quantized_linear as op
from glm_core.ops.quant import BLOCK, dequantize, pack, unpack


def nibbles_swapped(a: Arguments) -> Tensor:
    if a["bits"] != 4:
        return unpack(a["weight"], a["bits"])
    return pack(unpack(a["weight"], 4).unflatten(-1, (-1, 2)).flip(-1).flatten(-2))  # [F, D / 2]


def low_nibbles_unsigned(a: Arguments) -> Tensor:
    codes = unpack(a["weight"], a["bits"]).clone()
    if a["bits"] == 4:
        codes[:, 1::2] &= 15
    return codes


def scaled_bias(a: Arguments) -> Tensor | None:
    scale, bias = a["scale"], a["bias"]
    return None if bias is None else bias * (scale if scale.dim() == 1 else scale[:, 0]).to(bias)


def cut_codes(x: Tensor) -> Tensor:
    """Rounds x to int8 codes in blocks, towards zero."""
    parts = []
    for block in x.split(BLOCK, -1):
        step = block.abs().amax(-1, keepdim=True) / 127 if block.numel() else block
        parts.append(torch.where(step > 0, block / step, 0.0).trunc() * step)
    return torch.cat(parts, -1)


def coarse_codes(x: Tensor) -> Tensor:
    """Rounds x to int8 codes with one step for a whole row."""
    if not x.numel():
        return x
    step = x.double().abs().amax(-1, keepdim=True) / 127
    return (torch.where(step > 0, x.double() / step, 0.0).round() * step).to(x.dtype)


@mutant(op, "weights are rounded to float16 before the product")
def weight_rounded_to_half(x: Tensor, weight: Tensor, scale: Tensor, bits: int, **a: Any) -> Tensor:
    w = dequantize(weight, scale.half(), bits, torch.float16).double()
    top = w.abs().amax(-1).clamp(min=1e-30)
    codes = (w / top[:, None] * 127).round().to(torch.int8)
    return op.reference(x, codes, (top / 127).float(), bits=8, **a)


@mutant(op, "one activation step for a whole row, not for 32 inputs")
def activation_step_of_the_row(x: Tensor, activation_bits: int, **a: Any) -> Tensor:
    if activation_bits == 8:
        x = x + (coarse_codes(x.detach()) - x).detach()
    return op.reference(x, activation_bits=16, **a)


@mutant(op, "activation codes are cut off, not rounded to nearest")
def activation_codes_cut(x: Tensor, activation_bits: int, **a: Any) -> Tensor:
    if activation_bits == 8:
        x = x + (cut_codes(x.detach()) - x).detach()
    return op.reference(x, activation_bits=16, **a)


@mutant(op, "an activation block of zeros gives NaN")
def zero_block_nan(x: Tensor, activation_bits: int, **a: Any) -> Tensor:
    if activation_bits == 8:
        x = x * (x.abs().amax() / x.abs().amax() if x.numel() else 1)
    return op.reference(x, activation_bits=activation_bits, **a)


fault(
    op,
    "the even element is taken from the low nibble",
    changed(op, weight=nibbles_swapped),
    mutant="nibbles_swapped",
)
fault(
    op,
    "the low nibble is not sign-extended",
    changed(op, weight=low_nibbles_unsigned, bits=8),
    mutant="low_nibble_unsigned",
)
fault(
    op,
    "each group takes the scale of the one before",
    changed(op, scale=lambda a: a["scale"].roll(1, -1) if a["scale"].dim() > 1 else a["scale"]),
    mutant="group_off_by_one",
)
fault(
    op,
    "each row takes the scale of the next",
    changed(op, scale=lambda a: a["scale"].roll(-1, 0)),
    mutant="scale_of_the_next_row",
)
fault(
    op,
    "a row whose scale is zero gives NaN, as w / scale would",
    changed(op, scale=lambda a: a["scale"] * (a["scale"] / a["scale"])),
    mutant="zero_row_nan",
)
fault(
    op,
    "the bias is multiplied by the scale too",
    changed(op, bias=scaled_bias),
    mutant="bias_scaled",
)
fault(
    op,
    "activations are rounded where 16 bits are asked for",
    changed(op, activation_bits=8),
    mutant="activations_always_rounded",
)
fault(
    op,
    "activations are never rounded to int8",
    changed(op, activation_bits=16),
    mutant="activations_never_rounded",
)
