"""Decides which arguments the compiled kernels take; the reasons reach the user unchanged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glm_core.spec import SUPPORTED, Support, unsupported

DTYPES = (torch.float32, torch.bfloat16)


def takes(*tensors: Tensor | None) -> Support:
    """Requires CPU tensors of one dtype, float32 or bfloat16."""
    dtype = None
    for t in tensors:
        if t is None:
            continue
        if dtype is None:
            dtype = t.dtype
            if dtype not in DTYPES:
                return unsupported(f"kernels take float32 and bfloat16, received {dtype}")
        elif t.dtype != dtype:
            return unsupported(f"kernels take one dtype, received {dtype} and {t.dtype}")
        if not t.is_cpu:
            return unsupported(f"kernels take CPU tensors, received one on {t.device}")
    return SUPPORTED


def exactly(dtype: torch.dtype, **tensors: Tensor) -> Support:
    """Requires `dtype` of arguments whose dtype is fixed whatever the working dtype is."""
    for name, t in tensors.items():
        if t.dtype != dtype:
            return unsupported(f"kernels take {name} in {dtype}, received {t.dtype}")
    return SUPPORTED


def both(first: Support, second: Support) -> Support:
    """Returns the first refusal, or SUPPORTED where there is none."""
    return second if first.ok else first


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Support:
    return takes(x, weight)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Support:
    return takes(x, weight, bias)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5, alpha: float = 1.0
) -> Support:
    return takes(x, residual, weight)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, alpha: float = 1.0
) -> Support:
    return takes(x, residual, weight, bias)


def activation(x: Tensor) -> Support:
    return takes(x)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Support:
    return both(takes(x), exactly(torch.float32, cos=cos, sin=sin))


def embedding(ids: Tensor, weight: Tensor, shrink: float = 1.0) -> Support:
    return both(takes(weight), exactly(torch.int64, ids=ids))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Support:
    return takes(x, weight, bias)


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    bits: int = 8,
    activation_bits: int = 16,
) -> Support:
    groups = 1 if scale.dim() == 1 else scale.shape[1]
    group = x.shape[-1] // max(groups, 1)
    if groups > 1 and group != 32 and group % 128:
        return unsupported(f"kernels take groups of 32 or a multiple of 128, received {group}")
    codes = both(exactly(torch.int8, weight=weight), exactly(torch.float16, scale=scale))
    return both(takes(x, bias), codes)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    scale: float,
    layer_scale: float = 1.0,
    pb_relax: float = 0.0,
) -> Support:
    return both(takes(q, k, v), exactly(torch.int32, key_start=key_start, key_end=key_end))


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    normalize: bool = True,
) -> Support:
    return both(takes(x), exactly(torch.float32, weight=weight, bias=bias))


def permute(x: Tensor, experts: Tensor, num_experts: int) -> Support:
    return both(takes(x), exactly(torch.int64, experts=experts))


def unpermute(rows: Tensor, order: Tensor, weights: Tensor) -> Support:
    kinds = both(exactly(torch.int64, order=order), exactly(torch.float32, weights=weights))
    return both(takes(rows), kinds)


def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor) -> Support:
    return both(takes(rows, weight), exactly(torch.int64, counts=counts))


def quantized_grouped_linear(
    rows: Tensor,
    weight: Tensor,
    scale: Tensor,
    counts: Tensor,
    bits: int = 8,
    activation_bits: int = 16,
) -> Support:
    one = quantized_linear(rows, weight, scale.flatten(0, 1), None, bits, activation_bits)
    return both(one, exactly(torch.int64, counts=counts))


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor
) -> Support:
    rest = both(
        exactly(torch.int64, labels=labels), exactly(torch.float32, token_weight=token_weight)
    )
    return both(takes(x, weight), rest)


def global_norm(tensors: Sequence[Tensor]) -> Support:
    return takes(*tensors)


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grad_scale: Tensor,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    copies: Sequence[Tensor] | None = None,
) -> Support:
    state = takes(*params, *exp_avgs, *exp_avg_sqs, grad_scale)
    if state.ok and grad_scale.dtype != torch.float32:
        return unsupported(f"kernels keep parameters in float32, received {grad_scale.dtype}")
    return both(state, takes(*grads, *(copies or ())))
