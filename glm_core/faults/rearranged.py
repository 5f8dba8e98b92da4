"""Right kernels that round differently: the same formulas in another order, blocking, precision or
library call.
Shapes: B batch, L queries, S keys, H heads, K kv heads, R = H/K, E head dim, D width, N rows, V
vocabulary."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glm_core import ops
from glm_core.dispatch import Op
from glm_core.faults.variants import Arguments, Function, Gradients
from glm_core.faults.wrong_norm import added
from glm_core.ops.precision import wide

F = torch.nn.functional
Sum = Callable[[Tensor], Tensor]
"""[..., D] -> [..., 1]"""
Order = Callable[[int], Tensor]


def reversed_order(n: int) -> Tensor:
    return torch.arange(n - 1, -1, -1)


def shuffled(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(3))


def double(x: Any) -> Any:
    """Floating-point tensors as float64, alone or in lists."""
    if isinstance(x, list | tuple):
        return [double(t) for t in x]
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def precise(op: Op) -> Function:
    """The reference in float64, rounded once at the end."""

    def kernel(**a: Any) -> Any:
        y = op.reference(**{k: double(v) for k, v in a.items()})
        first = a[op.parameters[0]]
        scalar = op in (ops.linear_cross_entropy, ops.global_norm)
        return y.to(torch.float32 if scalar else first.dtype)

    return kernel


def blocks(x: Tensor, size: int) -> list[Tensor]:
    """Sums over D of blocks of this size, each [..., 1]."""
    return [part.sum(-1, keepdim=True) for part in x.split(size, -1)]


def blocked(size: int) -> Sum:
    """Block after block, as a tiled kernel does."""
    return lambda x: functools.reduce(torch.add, blocks(x, size))


def pairwise(x: Tensor) -> Tensor:
    """Neighbours first, then their sums."""
    while x.shape[-1] > 1:
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1))
        x = x[..., ::2] + x[..., 1::2]
    return x


def kahan(x: Tensor) -> Tensor:
    """Compensated, over blocks of 4 (Kahan 1965)."""
    parts = blocks(x, 4)
    total, lost = parts[0], torch.zeros_like(parts[0])
    for part in parts[1:]:
        y = part - lost
        t = total + y
        total, lost = t, (t - total) - y
    return total


# linear -------------------------------------------------------------------------------


def ordered_linear(order: Order) -> Function:
    """The sum over D in another order."""

    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        at = order(x.shape[-1])
        return F.linear(x[..., at], weight[:, at], bias)

    return kernel


def one_after_another(parts: list[Tensor]) -> Tensor:
    """Left to right."""
    return functools.reduce(torch.add, parts)


def split_linear(
    size: Callable[[int], int], total: Callable[[list[Tensor]], Tensor] = one_after_another
) -> Function:
    """The sum over D in parts of size(D), added in float32."""

    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        parts = zip(*(wide(t).split(size(x.shape[-1]), -1) for t in (x, weight)), strict=True)
        y = total([F.linear(a, b) for a, b in parts])
        return (y if bias is None else y + wide(bias)).to(x.dtype)

    return kernel


def in_parts(number: int) -> Callable[[int], int]:
    """The size that splits n into `number` parts."""
    return lambda n: -(-n // number)


def stacked(total: Sum) -> Callable[[list[Tensor]], Tensor]:
    """Partial products added by `total`."""
    return lambda parts: total(torch.stack(parts, -1))[..., 0]


def transposed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(weight x^T)^T."""
    y = (weight @ x.flatten(0, -2).t()).t().unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def separate_bias(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product is rounded before the bias is added."""
    y = F.linear(x, weight)
    return y if bias is None else y + bias


def weight_gradient_in_parts(parts: int) -> Callable[[Arguments, tuple[Tensor, ...]], Gradients]:
    """Linear's backward, its reduction over rows in parts added in float32."""

    def gradients(a: Arguments, outputs: tuple[Tensor, ...]) -> Gradients:
        g, x = outputs[0].flatten(0, -2), a["x"].flatten(0, -2)
        pairs = list(zip(wide(g).chunk(parts), wide(x).chunk(parts), strict=True))
        found: Gradients = {
            "x": outputs[0] @ a["weight"],
            "weight": one_after_another([p.t() @ q for p, q in pairs]).to(g.dtype),
        }
        if a["bias"] is not None:
            found["bias"] = one_after_another([p.sum(0) for p, _ in pairs]).to(g.dtype)
        return found

    return gradients


# normalisation ------------------------------------------------------------------------


def layer_norm_by(total: Sum, root: Callable[[Tensor], Tensor] = torch.rsqrt) -> Function:
    """Layer norm with its two sums over D taken by `total`."""

    def kernel(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        t, n = wide(x), x.shape[-1]
        t = t - total(t) / n
        y = t * root(total(t.square()) / n + eps)
        return (y * wide(weight) + wide(bias)).to(x.dtype)

    return kernel


def rms_norm_by(total: Sum, root: Callable[[Tensor], Tensor] = torch.rsqrt) -> Function:
    """RMS norm with its sum over D taken by `total`."""

    def kernel(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        t = wide(x)
        y = t * root(total(t.square()) / x.shape[-1] + eps)
        return (y * wide(weight)).to(x.dtype)

    return kernel


def one_pass_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """var = E[x^2] - E[x]^2; y = x (r w) + (b - m r w)."""
    t = wide(x)
    mean = t.mean(-1, keepdim=True)
    rstd = torch.rsqrt(t.square().mean(-1, keepdim=True) - mean.square() + eps)
    scale = rstd * wide(weight)
    return (t * scale + (wide(bias) - mean * scale)).to(x.dtype)


def native_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def native_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def rounded_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The normalised values are rounded to the working dtype before weight and bias."""
    t = wide(x)
    t = t - t.mean(-1, keepdim=True)
    return (t * torch.rsqrt(t.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight + bias


def rounded_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same for RMS norm, as transformers' Glm does."""
    t = wide(x)
    return (t * torch.rsqrt(t.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def unrounded_sum(norm: Function) -> Function:
    """The norm reads the sum with the residual before it is rounded."""

    def kernel(x: Tensor, residual: Tensor, alpha: float, **rest: Any) -> tuple[Tensor, Tensor]:
        total = wide(x) + alpha * wide(residual)
        up = {k: wide(v) if isinstance(v, Tensor) else v for k, v in rest.items()}
        return norm(x=total, **up).to(x.dtype), total.to(x.dtype)

    return kernel


def native_residual(
    x: Tensor, residual: Tensor, alpha: float, **rest: Any
) -> tuple[Tensor, Tensor]:
    """The residual is added by torch in the working dtype, fused multiply-add or not as torch
    likes."""
    total = torch.add(x, residual, alpha=alpha)
    return ops.layer_norm.reference(total, **rest), total


def both_norms(norm: Function, kind: str) -> dict[str, Function]:
    """A norm alone and fused with the residual."""
    return {f"{kind}_norm": norm, f"add_{kind}_norm": added(norm)}


# activations and rotation -------------------------------------------------------------


def erf_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def erfc_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * torch.special.erfc(-x * math.sqrt(0.5))


def sigmoid_tanh_gelu(x: Tensor) -> Tensor:
    """x sigmoid(2 u) = x/2 (1 + tanh u)."""
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


def written_tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x.square())))


def exp_silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def tanh_silu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(0.5 * x))


def gated_native(activation: Callable[[Tensor], Tensor], gate: int) -> Function:
    """Activation and product in the working dtype, each rounded."""

    def kernel(x: Tensor) -> Tensor:
        halves = x.chunk(2, -1)
        return activation(halves[gate]) * halves[1 - gate]

    return kernel


def fused_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """a cos - b sin and b cos + a sin by one product and one fused multiply-add."""
    sections, pairs = cos.shape[-2:]
    rotated = 2 * sections * pairs
    shape, dim = ((pairs, 2), -1) if interleaved else ((2, pairs), -2)
    a, b = double(x[..., :rotated]).unflatten(-1, (sections, *shape)).unbind(dim)
    c, s = cos.unsqueeze(2), sin.unsqueeze(2)
    rounded = torch.stack((-(b * s), a * s), dim).float()
    turned = (torch.stack((a * c, b * c), dim) + rounded.double()).float()  # one more rounding
    return torch.cat((turned.flatten(-3).to(x.dtype), x[..., rotated:]), -1)
