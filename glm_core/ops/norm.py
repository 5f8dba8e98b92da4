"""Declares RMS norm and layer norm, alone and together with the residual addition before them.

Shapes: D width."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from glm_core.dispatch import op
from glm_core.ops.layout import gapped
from glm_core.ops.precision import num_bytes, wide
from glm_core.spec import Cost, Draw, Maker, Sample, normal

_SHAPES = {
    "2x5x96": (2, 5, 96),
    "1x1x1": (1, 1, 1),
    "3x7x33": (3, 7, 33),
    "64x1000": (64, 1000),
    "0x16": (0, 16),
}


def _fading(falloff: float, make: Maker) -> Maker:
    """Multiplies row i by falloff^(i - 1)."""

    def faded(draw: Draw) -> Tensor:
        x = make(draw)
        rows = torch.arange(len(x), device=x.device).unsqueeze(-1)  # [rows, 1]
        factors = falloff ** (rows - 1.0)
        return (x * factors).to(x.dtype)

    return make if falloff == 1.0 else faded


def _samples(residual: bool, bias: bool) -> Iterator[Sample]:
    def make(
        id: str,
        shape: tuple[int, ...],
        std: float = 1.0,
        strided: bool = False,
        falloff: float = 1.0,
        mean: float = 0.0,
        gaps: bool = False,
        **rest: float,
    ) -> Sample:
        args = {"x": _fading(falloff, normal(*shape, mean=mean, std=std, strided=strided))}
        if residual:
            args["residual"] = _fading(falloff, normal(*shape, std=std, strided=strided))
        args["weight"] = normal(shape[-1], mean=1.0, std=0.2)
        if bias:
            args["bias"] = normal(shape[-1], std=0.2)
        if gaps:
            args = gapped(args)
        return Sample(id, {**args, **rest}, real="4096" in id)

    for id, shape in _SHAPES.items():
        yield make(id, shape)
    yield make("2x5x96-strided", (2, 5, 96), strided=True)
    yield make("3x33-gapped", (3, 33), gaps=True)
    yield make("4x96-tiny", (4, 96), std=1e-3)  # variance comparable with eps
    yield make("4x96-huge", (4, 96), std=1e3)
    yield make("4x96-offset", (4, 96), mean=100.0)  # a one-pass variance cancels
    yield make("4x96-eps", (4, 96), std=0.1, eps=1e-2)
    yield make("5x130-mixed", (5, 130), falloff=0.03)  # rows of very different magnitude
    if residual:
        yield make("4x96-alpha", (4, 96), alpha=2.83)
    for id, shape in {"5x8193": (5, 8193), "1025x33": (1025, 33)}.items():
        yield Sample(id, make("", shape, strided=True).args, large=True)
    yield make("8x4096", (8, 4096))  # ChatGLM2 / GLM-4


def _cost(x: Tensor, *others: Tensor, outputs: int, per_element: int) -> Cost:
    moved, size = num_bytes(x, *others), x.numel()
    flops = per_element * size
    return Cost(
        flops, moved + outputs * num_bytes(x), 2 * flops, moved + (outputs + 1) * num_bytes(x)
    )


def rms_norm_cost(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Cost:
    return _cost(x, weight, outputs=1, per_element=4)


def layer_norm_cost(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Cost:
    return _cost(x, weight, bias, outputs=1, per_element=7)


def add_rms_norm_cost(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5, alpha: float = 1.0
) -> Cost:
    return _cost(x, residual, weight, outputs=2, per_element=6)


def add_layer_norm_cost(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, alpha: float = 1.0
) -> Cost:
    return _cost(x, residual, weight, bias, outputs=2, per_element=9)


@op(samples=lambda: _samples(False, False), cost=rms_norm_cost, differentiable=("x", "weight"))
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Computes y = x / sqrt(mean(x^2, -1) + eps) * weight.

    Shapes: x [..., D], weight [D] -> [..., D]. Statistics and product in float32, rounded once to
    x's dtype. Accumulates in float32: statistics and the gradient of x over D, the gradient of
    weight over rows. Source: Zhang & Sennrich 2019, eq. 4."""
    t = wide(x)
    return (t * torch.rsqrt(t.square().mean(-1, keepdim=True) + eps) * wide(weight)).to(x.dtype)


@op(
    samples=lambda: _samples(False, True),
    cost=layer_norm_cost,
    differentiable=("x", "weight", "bias"),
)
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Computes y = (x - mean) / sqrt(var + eps) * weight + bias, with the biased variance.

    Shapes: x [..., D], weight, bias [D] -> [..., D]. Statistics and product in float32, rounded
    once to x's dtype. Accumulates in float32: statistics and the gradient of x over D, the
    gradients of weight and bias over rows. Source: Ba et al. 2016, eq. 4."""
    t = wide(x)
    t = t - t.mean(-1, keepdim=True)
    y = t * torch.rsqrt(t.square().mean(-1, keepdim=True) + eps)
    return (y * wide(weight) + wide(bias)).to(x.dtype)


@op(
    samples=lambda: _samples(True, False),
    cost=add_rms_norm_cost,
    differentiable=("x", "residual", "weight"),
)
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Computes s = x + alpha * residual; y = rms_norm(s). Returns (y, s).

    Shapes: x, residual [..., D], weight [D] -> y, s [..., D]. The sum is formed in float32 and
    rounded to x's dtype; the norm reads the rounded sum. Accumulates in float32 as rms_norm does;
    the two gradients that meet in s are added in x's dtype. Source: Zhang & Sennrich 2019, eq. 4,
    applied to the residual stream."""
    total = (wide(x) + alpha * wide(residual)).to(x.dtype)
    return rms_norm.reference(total, weight, eps), total


@op(
    samples=lambda: _samples(True, True),
    cost=add_layer_norm_cost,
    differentiable=("x", "residual", "weight", "bias"),
)
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Computes s = x + alpha * residual; y = layer_norm(s). Returns (y, s). alpha is DeepNorm's
    (2N)^(1/2) with N the total number of layers, 1 without DeepNorm.

    Shapes: x, residual [..., D], weight, bias [D] -> y, s [..., D]. The sum is formed in float32
    and rounded to x's dtype; the norm reads the rounded sum. Accumulates in float32 as layer_norm
    does; the two gradients that meet in s are added in x's dtype. Source: Ba et al. 2016, eq. 4;
    Wang et al. 2022 (DeepNet), fig. 2."""
    total = (wide(x) + alpha * wide(residual)).to(x.dtype)
    return layer_norm.reference(total, weight, bias, eps), total
