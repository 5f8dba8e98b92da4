"""Wrong activations. Shapes: F inner width."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from glm_core.faults.mutant import mutant
from glm_core.ops import geglu, gelu, swiglu
from glm_core.ops.precision import wide


@mutant(gelu, wrong="the exact GELU where the tanh form is asked")
def exact(x: Tensor) -> Tensor:
    return functional.gelu(wide(x)).to(x.dtype)


@mutant(gelu, wrong="x sigmoid(1.702 x)")
def quick(x: Tensor) -> Tensor:
    return (wide(x) * torch.sigmoid(1.702 * wide(x))).to(x.dtype)


@mutant(gelu, wrong="0.0447 for 0.044715")
def constant_cut_short(x: Tensor) -> Tensor:
    t = wide(x)
    return (0.5 * t * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (t + 0.0447 * t**3)))).to(x.dtype)


@mutant(gelu, wrong="zero below -4, where results are small")
def tail_cut(x: Tensor) -> Tensor:
    return torch.where(x < -4, 0, gelu.reference(x))


@mutant(gelu, wrong="backward is that of the exact form")
def gradient_of_exact(x: Tensor) -> Tensor:
    other = exact(x)
    return gelu.reference(x.detach()) + (other - other.detach())


@mutant(geglu, wrong="the tanh form where the exact GELU is asked")
def tanh_form(x: Tensor) -> Tensor:
    a, b = wide(x).chunk(2, -1)
    return (a * functional.gelu(b, approximate="tanh")).to(x.dtype)


@mutant(geglu, wrong="the gate is the first half")
def gate_first(x: Tensor) -> Tensor:
    return geglu.reference(x.roll(x.shape[-1] // 2, -1))


@mutant(geglu, wrong="halves interleaved")
def halves_interleaved(x: Tensor) -> Tensor:
    return geglu.reference(x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2))


@mutant(swiglu, wrong="sigmoid for silu")
def sigmoid(x: Tensor) -> Tensor:
    g, u = wide(x).chunk(2, -1)
    return (torch.sigmoid(g) * u).to(x.dtype)


@mutant(geglu, wrong="backward takes the gate for a constant")
def gate_constant(x: Tensor) -> Tensor:
    a, b = wide(x).chunk(2, -1)
    return (a * functional.gelu(b).detach()).to(x.dtype)


@mutant(swiglu, wrong="the gate is the second half")
def gate_second(x: Tensor) -> Tensor:
    return swiglu.reference(x.roll(x.shape[-1] // 2, -1))


@mutant(swiglu, wrong="GELU for silu")
def gelu_gate(x: Tensor) -> Tensor:
    g, u = wide(x).chunk(2, -1)
    return (functional.gelu(g) * u).to(x.dtype)


@mutant(swiglu, wrong="the gate saturates: its input is clamped to [-20, 20]")
def gate_clamped(x: Tensor) -> Tensor:
    g, u = wide(x).chunk(2, -1)
    return (functional.silu(g.clamp(-20, 20)) * u).to(x.dtype)


@mutant(swiglu, wrong="backward of silu is its sigmoid alone")
def gradient_of_sigmoid_only(x: Tensor) -> Tensor:
    g, u = wide(x).chunk(2, -1)
    return (g * torch.sigmoid(g).detach() * u).to(x.dtype)
