"""Wrong matrix products. Shapes: D in, F out."""

from __future__ import annotations

import torch
from torch import Tensor

from glm_core.faults.mutant import mutant, pulled
from glm_core.ops import linear


@mutant(linear, wrong="the bias is left out")
def bias_left_out(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear.reference(x, weight)


@mutant(linear, wrong="float32 operands are cut to TF32's ten bits")
def tf32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear.reference(_cut(x), _cut(weight), bias)


def _cut(x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        return x
    cut = (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)
    return x + (cut - x).detach()


@mutant(linear, wrong="partial sums of 8 products are kept in the working dtype")
def narrow_sum(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    parts = zip(x.split(8, -1), weight.split(8, -1), strict=True)
    total = torch.zeros((), dtype=x.dtype)
    for a, b in parts:
        total = total + linear.reference(a, b)
    return total if bias is None else total + bias


@mutant(linear, wrong="the last input dimension is left out where D is odd")
def odd_dimension_lost(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    even = max(x.shape[-1] // 2 * 2, 1)
    return linear.reference(x[..., :even], weight[:, :even], bias)


@mutant(linear, wrong="the gradient of the bias is the mean over rows, not the sum")
def bias_gradient_mean(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = max(x[..., 0].numel(), 1)
    mean = None if bias is None else pulled(bias, lambda g: g / rows)
    return linear.reference(x, weight, mean)


@mutant(linear, wrong="the gradient of weight is summed in bfloat16")
def weight_gradient_bfloat16(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear.reference(x, pulled(weight, lambda g: g.bfloat16().to(g.dtype)), bias)


@mutant(linear, wrong="the bias is added twice")
def bias_twice(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear.reference(x, weight, None if bias is None else bias + bias)
