"""Declares the activations of the feed-forward part; the gated ones include their product.

Shapes: F inner width."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from glm_core.dispatch import op
from glm_core.ops.layout import gapped
from glm_core.ops.precision import num_bytes, wide
from glm_core.spec import Cost, Sample, normal


def _samples(width: int) -> Iterator[Sample]:
    for id, shape in {
        "2x5x48": (2, 5, 48),
        "1x1": (1, 1),
        "3x7x33": (3, 7, 33),
        "0x8": (0, 8),
    }.items():
        yield Sample(id, {"x": normal(*shape[:-1], width * shape[-1])})
    yield Sample("2x5x48-strided", {"x": normal(2, 5, width * 48, strided=True)})
    yield Sample("3x33-gapped", gapped({"x": normal(3, width * 33)}))
    yield Sample("64x48-tiny", {"x": normal(64, width * 48, std=1e-3)})
    yield Sample("64x48-huge", {"x": normal(64, width * 48, std=30.0)})
    for id, shape in {"5x8193": (5, 8193), "1025x33": (1025, 33)}.items():
        yield Sample(id, {"x": normal(shape[0], width * shape[1], strided=True)}, large=True)
    yield Sample("8x13696", {"x": normal(8, width * 13696)}, real=True)  # ChatGLM2 / GLM-4


def gelu_cost(x: Tensor) -> Cost:
    return Cost(8 * x.numel(), 2 * num_bytes(x), 14 * x.numel(), 3 * num_bytes(x))


def gated_cost(x: Tensor) -> Cost:
    moved = num_bytes(x)
    return Cost(5 * x.numel(), moved * 3 // 2, 10 * x.numel(), moved * 5 // 2)


@op(samples=lambda: _samples(1), cost=gelu_cost, differentiable=("x",))
def gelu(x: Tensor) -> Tensor:
    """Computes y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), the tanh form of GELU.

    Shapes: x [..., F] -> [..., F]. Computed in float32 and rounded once to x's dtype.
    Accumulates nothing. Source: Hendrycks & Gimpel 2016, section 2; used by GLM and ChatGLM-6B."""
    return torch.nn.functional.gelu(wide(x), approximate="tanh").to(x.dtype)


@op(samples=lambda: _samples(2), cost=gated_cost, differentiable=("x",))
def geglu(x: Tensor) -> Tensor:
    """Computes [a, b] = x; y = a * gelu(b) with the exact (erf) GELU. The gate is the SECOND half
    of x.

    Shapes: x [..., 2F] -> [..., F]. Computed in float32 and rounded once to x's dtype.
    Accumulates nothing. Source: Shazeer 2020, eq. 6; the order of the halves is that of GLM-130B's
    code."""
    a, b = wide(x).chunk(2, -1)
    return (a * torch.nn.functional.gelu(b)).to(x.dtype)


@op(samples=lambda: _samples(2), cost=gated_cost, differentiable=("x",))
def swiglu(x: Tensor) -> Tensor:
    """Computes [g, u] = x; y = silu(g) * u. The gate is the FIRST half of x.

    Shapes: x [..., 2F] -> [..., F]. Computed in float32 and rounded once to x's dtype.
    Accumulates nothing. Source: Shazeer 2020, eq. 6; the order of the halves is that of ChatGLM2
    and of transformers' Glm."""
    g, u = wide(x).chunk(2, -1)
    return (torch.nn.functional.silu(g) * u).to(x.dtype)
