"""Declares the wrong and benign kernels of RMS and layer norm, alone and fused with the residual
addition.
Shapes: D width, N rows."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from glm_core.faults import rounding
from glm_core.faults.fault import (
    BENIGN_IN_FLOAT32,
    BFLOAT16,
    FLOAT32,
    ONLY_BFLOAT16,
    ONLY_FLOAT32,
    benign,
    fault,
    mutant,
    planted,
    stateful_fault,
)
from glm_core.faults.kernels import (
    Arguments,
    Function,
    Gradients,
    backward_only,
    changed,
    edited,
    forward_only,
    pulled,
    pulled_argument,
)
from glm_core.ops import add_layer_norm, add_rms_norm, all_ops, layer_norm, rms_norm
from glm_core.ops.precision import wide

F = torch.nn.functional
Pair = tuple[Tensor, Tensor]


def same(x: Tensor) -> Tensor:
    return x


def layer_norm_by(
    total: rounding.Sum = rounding.row_sum,
    root: rounding.Edit = torch.rsqrt,
    centre: rounding.Edit = same,
) -> Function:
    """Returns a layer norm with its two sums over D taken by `total`, its mean passed through
    `centre`, and root(variance + eps) as its factor."""

    def kernel(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        t, n = wide(x), x.shape[-1]
        t = t - centre(total(t) / n)
        y = t * root(total(t.square()) / n + eps)
        return (y * wide(weight) + wide(bias)).to(x.dtype)

    return kernel


def rms_norm_by(
    total: rounding.Sum = rounding.row_sum, root: rounding.Edit = torch.rsqrt
) -> Function:
    """Returns an RMS norm with its sum over D taken by `total` and root(mean square + eps) as its
    factor."""

    def kernel(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        t = wide(x)
        y = t * root(total(t.square()) / x.shape[-1] + eps)
        return (y * wide(weight)).to(x.dtype)

    return kernel


def added(norm: Function) -> Function:
    """Returns the fused op of a norm: the sum with the residual, then `norm`."""

    def kernel(x: Tensor, residual: Tensor, alpha: float, **rest: Any) -> Pair:
        total = (wide(x) + alpha * wide(residual)).to(x.dtype)
        return norm(x=total, **rest), total

    return kernel


def both(kind: str, norm: Function) -> dict[str, Function]:
    """Returns a norm alone and fused with the residual, by op name."""
    return {f"{kind}_norm": norm, f"add_{kind}_norm": added(norm)}


def both_backward(kind: str, norm: Function) -> dict[str, Function]:
    """Returns the references of a norm, alone and fused, with the gradients of `norm`."""
    return {op: backward_only(all_ops()[op], f) for op, f in both(kind, norm).items()}


def other_default(kind: str, eps: float) -> dict[str, Function]:
    """Returns the references of a norm, alone and fused, with another eps for 1e-5."""
    names = (f"{kind}_norm", f"add_{kind}_norm")
    change = lambda a: eps if a["eps"] == 1e-5 else a["eps"]  # noqa: E731
    return {op: changed(all_ops()[op], eps=change) for op in names}


def constant_root(t: Tensor) -> Tensor:
    return torch.rsqrt(t).detach()


# RMS norm, wrong ------------------------------------------------------------------------


def eps_outside_root(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    t = wide(x)
    return (t / (t.square().mean(-1, keepdim=True).sqrt() + eps) * wide(weight)).to(x.dtype)


def bfloat16_sum(squares: Tensor) -> Tensor:
    """Sums one element after another, each sum rounded to bfloat16."""
    total = torch.zeros_like(squares[..., :1])
    for i in range(squares.shape[-1]):
        total = rounding.through(torch.bfloat16)(total + squares[..., i : i + 1])
    return total


@mutant(rms_norm, "squares are summed in the working dtype, chunk by chunk")
def narrow_sum(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    sums = [rounding.row_sum(part.square()) for part in x.split(8, -1)]
    scale = torch.rsqrt(functools.reduce(torch.add, sums) / x.shape[-1] + eps)
    return (wide(x) * wide(scale) * wide(weight)).to(x.dtype)


@mutant(rms_norm, "the gradient of weight sees x before normalisation")
def weight_gradient_of_raw_x(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y: Tensor = rms_norm.reference(x, weight.detach(), eps)
    raw = wide(x).detach() * wide(weight)
    return y + (raw - raw.detach()).to(x.dtype)


fault(rms_norm, "eps is 1e-5 whatever was asked", changed(rms_norm, eps=1e-5), mutant="eps_fixed")
fault(
    rms_norm,
    "eps is 1e-6 where the default is 1e-5",
    other_default("rms", 1e-6),
    mutant="eps_of_llama",
)
fault(
    rms_norm,
    "eps is 2e-5 where the default is 1e-5",
    other_default("rms", 2e-5),
    **planted("rms-norm-eps-2e-5", "eps"),
)
fault(
    rms_norm,
    "eps is added to the root, not under it",
    both("rms", eps_outside_root),
    mutant="eps_outside_root",
    **planted("rms-norm-eps-outside-root", "eps"),
)
fault(
    rms_norm,
    "subtracts the mean like a layer norm",
    changed(rms_norm, x=lambda a: a["x"] - a["x"].mean(-1, keepdim=True)),
    mutant="centred",
)
fault(
    rms_norm,
    "the weight is stored minus one, as Gemma's is",
    changed(rms_norm, weight=lambda a: a["weight"] + 1),
    mutant="weight_plus_one",
)
fault(
    rms_norm,
    "the backward takes the root mean square for a constant",
    both_backward("rms", rms_norm_by(root=constant_root)),
    mutant="statistic_constant",
    **planted("rms-norm-dx-without-projection", "gradient", "backward"),
)
fault(
    rms_norm,
    "arithmetic in bfloat16",
    rounding.inside(rms_norm, torch.bfloat16),
    **planted("rms-norm-bfloat16-internals", "dtype", **ONLY_FLOAT32),
)
fault(
    rms_norm,
    "the mean square is accumulated in bfloat16",
    both("rms", rms_norm_by(bfloat16_sum)),
    **planted("rms-norm-bfloat16-sum", "dtype"),
)


# layer norm, wrong ----------------------------------------------------------------------


def unbiased(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    t, less = wide(x), min(1, x.shape[-1] - 1)
    centred = t - t.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(t.var(-1, correction=less, keepdim=True) + eps)
    return (y * wide(weight) + wide(bias)).to(x.dtype)


@mutant(layer_norm, "variance is E[x^2] - E[x]^2 in float32")
def one_pass(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    t = wide(x)
    mean = t.mean(-1, keepdim=True)
    variance = (t.square().mean(-1, keepdim=True) - mean.square()).clamp(min=0)
    return ((t - mean) * torch.rsqrt(variance + eps) * wide(weight) + wide(bias)).to(x.dtype)


@mutant(layer_norm, "eps is added to the deviation, not to the variance")
def layer_eps_outside_root(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    t = wide(x)
    t = t - t.mean(-1, keepdim=True)
    y = t / (t.square().mean(-1, keepdim=True).sqrt() + eps)
    return (y * wide(weight) + wide(bias)).to(x.dtype)


def without_tail(tile: int, *names: str) -> Function:
    """Returns a layer norm of whose rows only whole tiles reach the gradients of `names`."""

    def kernel(x: Tensor, **rest: Any) -> Tensor:
        rows = x.flatten(0, -2)
        cut = rows.shape[0] // tile * tile
        fixed = {k: v.detach() if k in names else v for k, v in rest.items()}
        parts = layer_norm.reference(rows[:cut], **rest), layer_norm.reference(rows[cut:], **fixed)
        return torch.cat(parts).view_as(x)

    return kernel


def stale_statistics(every: int) -> Function:
    """Returns a layer norm that uses the previous call's mean and variance on every n-th call."""
    calls, last = 0, None

    def kernel(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        nonlocal calls, last
        t = wide(x)
        mean = t.mean(-1, keepdim=True)
        now = mean, (t - mean).square().mean(-1, keepdim=True)
        calls, before, last = calls + 1, last, tuple(s.detach() for s in now)
        if calls % every == 0 and before is not None and before[0].shape == mean.shape:
            now = before
        y = (t - now[0]) * torch.rsqrt(now[1] + eps)
        return (y * wide(weight) + wide(bias)).to(x.dtype)

    return kernel


fault(
    layer_norm,
    "eps is 1e-6 where the default is 1e-5",
    other_default("layer", 1e-6),
    mutant="layer_eps_small",
    **planted("layer-norm-eps-1e-6", "eps"),
)
fault(
    layer_norm,
    "variance divides by D - 1",
    both("layer", unbiased),
    mutant="unbiased",
    **planted("layer-norm-unbiased-variance"),
)
fault(
    layer_norm,
    "the bias is scaled by the weight too",
    changed(layer_norm, bias=lambda a: a["bias"] * a["weight"]),
    mutant="bias_inside",
)
fault(
    layer_norm,
    "the backward takes the mean for a constant",
    both_backward("layer", layer_norm_by(centre=torch.detach)),
    mutant="mean_constant",
    **planted("layer-norm-dx-without-mean", "gradient", "backward"),
)
fault(
    layer_norm,
    "the backward takes the variance for a constant",
    layer_norm_by(root=constant_root),
    mutant="variance_constant",
)
fault(
    layer_norm,
    "the gradient of weight sums whole tiles of 48 rows only",
    both_backward("layer", without_tail(48, "weight")),
    **planted("layer-norm-dgamma-whole-tiles", "rare shape", "backward"),
)
fault(
    layer_norm,
    "the gradient of bias is not computed",
    both_backward("layer", without_tail(10**9, "bias")),
    **planted("layer-norm-no-dbeta", "gradient", "backward"),
)


def native_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


fault(
    layer_norm,
    "torch's own kernel, which sums the gradients of weight and bias in bfloat16",
    both("layer", native_layer_norm),
    **planted("layer-norm-native-bfloat16", "dtype", "backward", **BENIGN_IN_FLOAT32),
)


# fused with the residual, wrong ---------------------------------------------------------


def native_residual(x: Tensor, residual: Tensor, alpha: float, **rest: Any) -> Pair:
    """Adds the residual by torch in the working dtype, with a fused multiply-add or without."""
    total = torch.add(x, pulled(residual, Tensor.contiguous), alpha=alpha)
    return layer_norm.reference(total, **rest), total


def half_away_residual(x: Tensor, residual: Tensor, alpha: float, **rest: Any) -> Pair:
    """Rounds ties of the sum with the residual away from zero."""
    total = rounding.half_away(wide(x) + alpha * wide(residual))
    return layer_norm.reference(total, **rest), total


def alpha_forgotten(a: Arguments, grads: Gradients) -> Gradients:
    """Gives the residual the gradient of x."""
    del a
    return {"residual": grads["x"]}


@mutant(add_rms_norm, "the second result is x, not the sum")
def sum_not_returned(**a: Any) -> Pair:
    y, _ = add_rms_norm.reference(**a)
    return y, a["x"].clone()


@mutant(add_rms_norm, "the backward forgets the gradient that comes in through the sum")
def gradient_of_sum_lost(**a: Any) -> Pair:
    y, total = add_rms_norm.reference(**a)
    return y, total.detach() + 0 * total


@mutant(add_layer_norm, "the norm reads x, the sum is only returned")
def norm_of_x(**a: Any) -> Pair:
    _, total = add_layer_norm.reference(**a)
    return layer_norm.reference(a["x"], a["weight"], a["bias"], a["eps"]), total


@mutant(add_layer_norm, "the backward forgets the gradient that comes in through the norm")
def gradient_of_norm_lost(**a: Any) -> Pair:
    _, total = add_layer_norm.reference(**a)
    return layer_norm.reference(total.detach(), a["weight"], a["bias"], a["eps"]), total


fault(add_rms_norm, "alpha is 1", changed(add_rms_norm, alpha=1.0), mutant="alpha_ignored")
fault(
    add_rms_norm,
    "alpha scales x, not the residual",
    changed(add_rms_norm, x=lambda a: a["residual"], residual=lambda a: a["x"]),
    mutant="alpha_on_x",
)
fault(
    add_rms_norm,
    "the gradient of the residual lacks alpha",
    pulled_argument(add_rms_norm, "residual", lambda a, g: g / a["alpha"]),
    mutant="gradient_lacks_alpha",
)
fault(
    add_layer_norm, "alpha is 1", changed(add_layer_norm, alpha=1.0), mutant="layer_alpha_ignored"
)
fault(
    add_layer_norm,
    "eps is 1e-5 whatever was asked",
    changed(add_layer_norm, eps=1e-5),
    mutant="layer_eps_fixed",
)
fault(
    add_layer_norm,
    "the gradient of the residual has alpha twice",
    pulled_argument(add_layer_norm, "residual", lambda a, g: g * a["alpha"]),
    mutant="gradient_has_alpha_twice",
)
fault(
    add_layer_norm,
    "alpha is too large by 0.1 %",
    changed(add_layer_norm, alpha=lambda a: a["alpha"] * 1.001),
    **planted("add-layer-norm-alpha-0.1%", "scale"),
)
fault(
    add_layer_norm,
    "the gradient of the residual lacks alpha",
    edited(add_layer_norm, alpha_forgotten),
    **planted("add-layer-norm-no-alpha-in-gradient", "gradient", "backward"),
)
fault(
    add_layer_norm,
    "arithmetic in float16",
    rounding.inside(add_layer_norm, torch.float16),
    **planted("layer-norm-float16-internals", "dtype", **ONLY_FLOAT32),
)
fault(
    add_layer_norm,
    "torch.add in bfloat16, which rounds alpha to bfloat16 (0.15 % here)",
    native_residual,
    **planted("add-layer-norm-bfloat16-alpha", "dtype", **BENIGN_IN_FLOAT32),
)
fault(
    add_layer_norm,
    "the norm's result is cut to bfloat16",
    forward_only(add_layer_norm, added(rounding.rounds(layer_norm, rounding.truncated))),
    **planted("layer-norm-truncated", "rounding", "forward", **ONLY_BFLOAT16),
)
fault(
    add_layer_norm,
    "the sum with the residual rounds ties away from zero",
    forward_only(add_layer_norm, half_away_residual),
    **planted("residual-half-away", "rounding", "forward", setup="glm", **ONLY_BFLOAT16),
)
stateful_fault(
    add_layer_norm,
    "every fifth call uses the previous call's mean and variance",
    lambda: added(stale_statistics(5)),
    **planted("layer-norm-stale-statistics", "stale"),
)


# benign -------------------------------------------------------------------------------


def one_pass_folded(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """var = E[x^2] - E[x]^2; y = x (r w) + (b - m r w)."""
    t = wide(x)
    mean = t.mean(-1, keepdim=True)
    rstd = torch.rsqrt(t.square().mean(-1, keepdim=True) - mean.square() + eps)
    scale = rstd * wide(weight)
    return (t * scale + (wide(bias) - mean * scale)).to(x.dtype)


def native_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def layer_norm_rounded_inside(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    t = wide(x)
    t = t - t.mean(-1, keepdim=True)
    return (t * torch.rsqrt(t.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight + bias


def rms_norm_rounded_inside(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    t = wide(x)
    return (t * torch.rsqrt(t.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def unrounded_sum(x: Tensor, residual: Tensor, alpha: float, **rest: Any) -> Pair:
    total = wide(x) + alpha * wide(residual)
    up = {k: wide(v) if isinstance(v, Tensor) else v for k, v in rest.items()}
    return layer_norm.reference(total, **up).to(x.dtype), total.to(x.dtype)


def benign_layer_norm(name: str, description: str, norm: Function, **rest: Any) -> None:
    """Declares a change of layer norm, alone and fused with the residual."""
    benign(f"layer-norm-{name}", layer_norm, description, both("layer", norm), **rest)


def benign_rms_norm(name: str, description: str, norm: Function, **rest: Any) -> None:
    """Declares a change of RMS norm, alone and fused with the residual."""
    benign(f"rms-norm-{name}", rms_norm, description, both("rms", norm), **rest)


benign_layer_norm("blocked-16", "sums in blocks of 16", layer_norm_by(rounding.blocked(16)))
benign_layer_norm("pairwise", "pairwise sums", layer_norm_by(rounding.pairwise))
benign_layer_norm("kahan", "compensated sums", layer_norm_by(rounding.kahan))
benign_layer_norm("float64", "float64 inside", rounding.precise(layer_norm))
benign_layer_norm("one-pass", "E[x^2] - E[x]^2, affine folded", one_pass_folded, ordinary=True)
benign_layer_norm("native", "torch's own kernel", native_layer_norm, dtypes=FLOAT32)
benign_layer_norm("sqrt-division", "1 / sqrt for rsqrt", layer_norm_by(root=lambda t: 1 / t.sqrt()))
benign_layer_norm(
    "rounded-before-affine", "normalised values rounded", layer_norm_rounded_inside, dtypes=BFLOAT16
)
benign(
    "layer-norm-reads-unrounded-sum",
    add_layer_norm,
    "the norm reads the float32 sum",
    unrounded_sum,
    dtypes=BFLOAT16,
)
benign(
    "add-layer-norm-native-add",
    add_layer_norm,
    "torch.add(x, residual, alpha)",
    native_residual,
    dtypes=FLOAT32,
)
benign_rms_norm("blocked-8", "sum in blocks of 8", rms_norm_by(rounding.blocked(8)))
benign_rms_norm("kahan", "compensated sum", rms_norm_by(rounding.kahan), ordinary=True)
benign_rms_norm("float64", "float64 inside", rounding.precise(rms_norm))
benign_rms_norm(
    "rounded-before-weight",
    "normalised values rounded, as transformers does",
    rms_norm_rounded_inside,
    dtypes=BFLOAT16,
)
