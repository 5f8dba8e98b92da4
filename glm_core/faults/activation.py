"""Declares the wrong and benign kernels of the activations. Shapes: F inner width."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glm_core.faults.fault import (
    BFLOAT16,
    ONLY_BFLOAT16,
    ONLY_FLOAT32,
    benign,
    fault,
    mutant,
    planted,
)
from glm_core.faults.kernels import Function, backward_only
from glm_core.faults.rounding import Edit, inside, leaning, precise, rough_exp, rounds
from glm_core.ops import geglu, gelu, swiglu
from glm_core.ops.precision import wide

F = torch.nn.functional


def ungated(activation: Edit) -> Function:
    """Returns a kernel that computes `activation` in float32 and rounds once."""
    return lambda x: activation(wide(x)).to(x.dtype)


def gated(activation: Edit, gate: int) -> Function:
    """Returns a kernel that computes activation(half `gate`) times the other half in float32 and
    rounds once."""

    def kernel(x: Tensor) -> Tensor:
        halves = wide(x).chunk(2, -1)
        return (activation(halves[gate]) * halves[1 - gate]).to(x.dtype)

    return kernel


def gated_rounding_twice(activation: Edit, gate: int) -> Function:
    """Returns a kernel that computes activation and product in the working dtype, each rounded."""

    def kernel(x: Tensor) -> Tensor:
        halves = x.chunk(2, -1)
        return activation(halves[gate]) * halves[1 - gate]

    return kernel


# gelu ---------------------------------------------------------------------------------

exact = ungated(F.gelu)
fault(gelu, "the erf form for the tanh form", exact, mutant="exact", **planted("gelu-erf"))
fault(
    gelu,
    "the derivative of the erf form",
    backward_only(gelu, exact),
    mutant="gradient_of_exact",
    **planted("gelu-gradient-erf", "gradient", "backward"),
)


@mutant(gelu, "x sigmoid(1.702 x)", **planted("gelu-sigmoid"))
def quick(x: Tensor) -> Tensor:
    return (wide(x) * torch.sigmoid(1.702 * wide(x))).to(x.dtype)


@mutant(gelu, "0.0447 for 0.044715")
def constant_cut_short(x: Tensor) -> Tensor:
    t = wide(x)
    return (0.5 * t * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (t + 0.0447 * t**3)))).to(x.dtype)


@mutant(gelu, "zero below -4, where results are small")
def tail_cut(x: Tensor) -> Tensor:
    return torch.where(x < -4, 0, gelu.reference(x))


def sigmoid_form(x: Tensor) -> Tensor:
    """x sigmoid(2 u) = x/2 (1 + tanh u)."""
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


def written_out(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x.square())))


benign("gelu-float64", gelu, "float64 inside", precise(gelu))
benign("gelu-sigmoid-form", gelu, "x sigmoid(2 u)", ungated(sigmoid_form))
benign("gelu-written-out", gelu, "x/2 (1 + tanh(..x (1 + ..x^2)))", ungated(written_out))


# geglu --------------------------------------------------------------------------------

tanh_form = gated(lambda x: F.gelu(x, approximate="tanh"), 1)
gate_first = gated(F.gelu, 0)
fault(
    geglu, "the tanh form for the erf form", tanh_form, mutant="tanh_form", **planted("geglu-tanh")
)
fault(
    geglu,
    "the gate is the first half",
    gate_first,
    mutant="gate_first",
    **planted("geglu-halves-swapped"),
)
fault(
    geglu,
    "the derivative of the tanh form",
    backward_only(geglu, tanh_form),
    **planted("geglu-gradient-tanh", "gradient", "backward"),
)
fault(
    geglu,
    "the backward takes the gate for a constant",
    gated(lambda x: F.gelu(x).detach(), 1),
    mutant="gate_constant",
)


@mutant(geglu, "the halves are interleaved")
def halves_interleaved(x: Tensor) -> Tensor:
    return geglu.reference(x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2))


erf = gated(lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), 1)
erfc = gated(lambda x: 0.5 * x * torch.special.erfc(-x * math.sqrt(0.5)), 1)
benign("geglu-float64", geglu, "float64 inside", precise(geglu))
benign("geglu-erf", geglu, "0.5 b (1 + erf)", erf)
benign("geglu-erfc", geglu, "erfc in place of 1 + erf", erfc)
benign(
    "geglu-rounded-before-product",
    geglu,
    "both steps in the working dtype",
    gated_rounding_twice(F.gelu, 1),
    dtypes=BFLOAT16,
)


# swiglu -------------------------------------------------------------------------------


def lost_last_row(tile: int) -> Function:
    """Returns a kernel that leaves zeros in the last row where the rows do not fill whole tiles."""

    def kernel(x: Tensor) -> Tensor:
        y = swiglu.reference(x)
        rows = y.flatten(0, -2)
        if rows.shape[0] % tile == 0:
            return y
        return torch.cat((rows[:-1], torch.zeros_like(rows[-1:]))).view_as(y)

    return kernel


fault(swiglu, "sigmoid for silu", gated(torch.sigmoid, 0), mutant="sigmoid")
fault(swiglu, "GELU for silu", gated(F.gelu, 0), mutant="gelu_gate")
fault(
    swiglu,
    "the gate is the second half",
    gated(F.silu, 1),
    mutant="gate_second",
    **planted("swiglu-halves-swapped"),
)
fault(
    swiglu,
    "the gate saturates: its input is clamped to [-20, 20]",
    gated(lambda g: F.silu(g.clamp(-20, 20)), 0),
    mutant="gate_clamped",
)
fault(
    swiglu,
    "the backward lacks the derivative of the sigmoid",
    backward_only(swiglu, gated(lambda g: g * torch.sigmoid(g).detach(), 0)),
    mutant="gradient_of_sigmoid_only",
    **planted("swiglu-half-derivative", "gradient", "backward"),
)
fault(
    swiglu,
    "exp with a relative error of 1e-4",
    gated(lambda g: g / (1 + rough_exp(-g)), 0),
    **planted("swiglu-rough-exp", **ONLY_FLOAT32),
)
fault(
    swiglu,
    "arithmetic in float16",
    inside(swiglu, torch.float16),
    **planted("swiglu-float16-internals", "dtype", **ONLY_FLOAT32),
)
fault(
    swiglu,
    "stochastic rounding, away from zero too often by 1/16",
    rounds(swiglu, leaning),
    **planted("swiglu-leaning-rounding", "rounding", "forward", **ONLY_BFLOAT16),
)
fault(
    swiglu,
    "the last row is zero where rows do not fill tiles of 64",
    lost_last_row(64),
    **planted("swiglu-last-row-lost", "rare shape"),
)

benign("swiglu-float64", swiglu, "float64 inside", precise(swiglu))
benign(
    "swiglu-exp",
    swiglu,
    "g / (1 + exp(-g))",
    gated(lambda g: g / (1 + torch.exp(-g)), 0),
    ordinary=True,
)
benign(
    "swiglu-tanh",
    swiglu,
    "g/2 (1 + tanh(g/2))",
    gated(lambda g: 0.5 * g * (1 + torch.tanh(0.5 * g)), 0),
    ordinary=True,
)
benign(
    "swiglu-rounded-before-product",
    swiglu,
    "both steps in the working dtype",
    gated_rounding_twice(F.silu, 0),
    dtypes=BFLOAT16,
)
