"""Wrong RMS and layer norms. Shapes: D width."""

from __future__ import annotations

import torch
from torch import Tensor

from glm_core.faults.mutant import mutant, pulled
from glm_core.ops import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from glm_core.ops.precision import wide

Pair = tuple[Tensor, Tensor]


@mutant(rms_norm, wrong="eps is added to the root, not under it")
def eps_outside_root(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    t = wide(x)
    return (t / (t.square().mean(-1, keepdim=True).sqrt() + eps) * wide(weight)).to(x.dtype)


@mutant(rms_norm, wrong="eps is 1e-5 whatever was asked")
def eps_fixed(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return rms_norm.reference(x, weight)


@mutant(rms_norm, wrong="eps is 1e-6 where the default is 1e-5")
def eps_of_llama(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return rms_norm.reference(x, weight, 1e-6 if eps == 1e-5 else eps)


@mutant(rms_norm, wrong="subtracts the mean like a layer norm")
def centred(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return rms_norm.reference(x - x.mean(-1, keepdim=True), weight, eps)


@mutant(rms_norm, wrong="the weight is stored minus one, as Gemma's is")
def weight_plus_one(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return rms_norm.reference(x, weight + 1, eps)


@mutant(rms_norm, wrong="squares are summed in the working dtype, chunk by chunk")
def narrow_sum(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    parts = [c.square().sum(-1, keepdim=True) for c in x.split(8, -1)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    scale = torch.rsqrt(total / x.shape[-1] + eps)
    return (wide(x) * wide(scale) * wide(weight)).to(x.dtype)


@mutant(rms_norm, wrong="backward takes the root mean square for a constant")
def statistic_constant(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    t = wide(x)
    scale = torch.rsqrt(t.square().mean(-1, keepdim=True) + eps).detach()
    return (t * scale * wide(weight)).to(x.dtype)


@mutant(rms_norm, wrong="the gradient of weight sees x before normalisation")
def weight_gradient_of_raw_x(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    y = rms_norm.reference(x, weight.detach(), eps)
    raw = wide(x).detach() * wide(weight)
    return y + (raw - raw.detach()).to(x.dtype)


@mutant(layer_norm, wrong="variance divides by D - 1")
def unbiased(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    t = wide(x)
    t = t - t.mean(-1, keepdim=True)
    variance = t.square().sum(-1, keepdim=True) / max(x.shape[-1] - 1, 1)
    return (t * torch.rsqrt(variance + eps) * wide(weight) + wide(bias)).to(x.dtype)


@mutant(layer_norm, wrong="variance is E[x^2] - E[x]^2 in float32")
def one_pass(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    t = wide(x)
    mean = t.mean(-1, keepdim=True)
    variance = (t.square().mean(-1, keepdim=True) - mean.square()).clamp(min=0)
    return ((t - mean) * torch.rsqrt(variance + eps) * wide(weight) + wide(bias)).to(x.dtype)


@mutant(layer_norm, wrong="eps is 1e-6 where the default is 1e-5")
def layer_eps_small(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    return layer_norm.reference(x, weight, bias, 1e-6 if eps == 1e-5 else eps)


@mutant(layer_norm, wrong="eps is added to the deviation, not to the variance")
def layer_eps_outside_root(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    t = wide(x)
    t = t - t.mean(-1, keepdim=True)
    y = t / (t.square().mean(-1, keepdim=True).sqrt() + eps)
    return (y * wide(weight) + wide(bias)).to(x.dtype)


@mutant(layer_norm, wrong="the bias is scaled by the weight too")
def bias_inside(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    return layer_norm.reference(x, weight, bias * weight, eps)


@mutant(layer_norm, wrong="backward takes the mean for a constant")
def mean_constant(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    t = wide(x)
    t = t - t.mean(-1, keepdim=True).detach()
    y = t * torch.rsqrt(t.square().mean(-1, keepdim=True) + eps)
    return (y * wide(weight) + wide(bias)).to(x.dtype)


@mutant(layer_norm, wrong="backward takes the variance for a constant")
def variance_constant(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    t = wide(x)
    t = t - t.mean(-1, keepdim=True)
    y = t * torch.rsqrt(t.square().mean(-1, keepdim=True) + eps).detach()
    return (y * wide(weight) + wide(bias)).to(x.dtype)


@mutant(add_rms_norm, wrong="alpha is taken for 1")
def alpha_ignored(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5, alpha: float = 1.0
) -> Pair:
    return add_rms_norm.reference(x, residual, weight, eps)


@mutant(add_rms_norm, wrong="alpha scales x, not the residual")
def alpha_on_x(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5, alpha: float = 1.0
) -> Pair:
    return add_rms_norm.reference(residual, x, weight, eps, alpha)


@mutant(add_rms_norm, wrong="the second result is x, not the sum")
def sum_not_returned(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5, alpha: float = 1.0
) -> Pair:
    y, _ = add_rms_norm.reference(x, residual, weight, eps, alpha)
    return y, x.clone()


@mutant(add_rms_norm, wrong="backward forgets the gradient that comes in through the sum")
def gradient_of_sum_lost(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5, alpha: float = 1.0
) -> Pair:
    y, total = add_rms_norm.reference(x, residual, weight, eps, alpha)
    return y, total.detach() + 0 * total


@mutant(add_rms_norm, wrong="the gradient of the residual lacks alpha")
def gradient_lacks_alpha(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5, alpha: float = 1.0
) -> Pair:
    bare = pulled(residual, lambda g: g / alpha)
    return add_rms_norm.reference(x, bare, weight, eps, alpha)


@mutant(add_layer_norm, wrong="alpha is taken for 1")
def layer_alpha_ignored(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, alpha: float = 1.0
) -> Pair:
    return add_layer_norm.reference(x, residual, weight, bias, eps)


@mutant(add_layer_norm, wrong="the norm reads x, the sum is only returned")
def norm_of_x(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, alpha: float = 1.0
) -> Pair:
    _, total = add_layer_norm.reference(x, residual, weight, bias, eps, alpha)
    return layer_norm.reference(x, weight, bias, eps), total


@mutant(add_layer_norm, wrong="eps is 1e-5 whatever was asked")
def layer_eps_fixed(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, alpha: float = 1.0
) -> Pair:
    return add_layer_norm.reference(x, residual, weight, bias, alpha=alpha)


@mutant(add_layer_norm, wrong="backward forgets the gradient that comes in through the norm")
def gradient_of_norm_lost(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, alpha: float = 1.0
) -> Pair:
    _, total = add_layer_norm.reference(x, residual, weight, bias, eps, alpha)
    return layer_norm.reference(total.detach(), weight, bias, eps), total


@mutant(add_layer_norm, wrong="the gradient of the residual has alpha twice")
def gradient_has_alpha_twice(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, alpha: float = 1.0
) -> Pair:
    twice = pulled(residual, lambda g: g * alpha)
    return add_layer_norm.reference(x, twice, weight, bias, eps, alpha)
