"""Decides which arguments Ascend's operators take; the reasons reach the user unchanged.

Products, dtypes and shapes are taken from CANN's operator pages (gitcode.com/cann/ops-nn, each
operator's docs/aclnn*.md) and from torch_npu's docstrings (torch_npu/_op_plugin_docs.py, 2.13.0).
A tensor on the host is no reason to fall back: torch_npu refuses it with an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from glm_core.backends.ascend import chip
from glm_core.spec import SUPPORTED, Support, unsupported

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIM, HEADS = 768, 256
"""the largest head dim and number of heads that npu_fusion_attention takes"""
QUANTISED_WIDTH = 65535
"""the most inputs or outputs that npu_weight_quant_batchmatmul takes"""
NO_CALL = {
    "route": "npu_moe_gating_top_k is for inference, says nothing of ties, and takes no groups of "
    "two experts; torch's own operators route on the device",
    "permute": "npu_moe_token_permute says nothing of the order of one expert's rows; torch's own "
    "operators sort on the device",
    "unpermute": "npu_moe_token_unpermute does not say whether it takes weights in float32 with "
    "rows in half precision; torch's own operators add the rows on the device",
}
"""by op of a mixture of experts: why none of torch_npu's operators runs it"""
MOST_EXPERTS, GROUPED_WIDTH = 1024, 65535
"""the most matrices that npu_grouped_matmul takes, and their most rows or columns
(ops-transformer docs/aclnnGroupedMatmulV4.md)"""
ROTATED, ROTATED_HEADS = 896, 1000
"""npu_rotary_mul takes fewer rotated dimensions and fewer heads than these"""


def takes(*tensors: Tensor | None) -> Support:
    """Requires one dtype of DTYPES, no empty tensor, and no bfloat16 on the first generation."""
    dtype = None
    for t in (t for t in tensors if t is not None):
        if not t.numel():
            return unsupported(f"operators take no empty tensor, received shape {tuple(t.shape)}")
        if dtype is None:
            dtype = t.dtype
            if dtype not in DTYPES:
                return unsupported(f"operators take float32, bfloat16, float16, received {dtype}")
            if dtype == torch.bfloat16 and chip.is_first_generation():
                return unsupported(f"{chip.name()} has no bfloat16; train in float16")
        elif t.dtype != dtype:
            return unsupported(f"operators take one dtype, received {dtype} and {t.dtype}")
    return SUPPORTED


def fused(operator: str, *tensors: Tensor | None) -> Support:
    """Requires a later chip than the first generation, and what `takes` requires."""
    if chip.is_first_generation():
        return unsupported(f"{operator} needs Atlas A2 (Ascend910B1) or later, not {chip.name()}")
    return takes(*tensors)


def exactly(dtype: torch.dtype, **tensors: Tensor) -> Support:
    """Requires `dtype` of arguments whose dtype is fixed whatever the working dtype is."""
    for name, t in tensors.items():
        if t.dtype != dtype:
            return unsupported(f"operators take {name} in {dtype}, received {t.dtype}")
    return SUPPORTED


def first(*supports: Support) -> Support:
    """Returns the first refusal, or SUPPORTED where there is none."""
    return next((s for s in supports if not s.ok), SUPPORTED)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Support:
    return fused("npu_rms_norm", x, weight)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Support:
    return takes(x, weight, bias)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5, alpha: float = 1.0
) -> Support:
    if x.shape[-1] == 1:  # the gradient then is only the rounding error of the sum
        return unsupported(
            "npu_add_rms_norm normalises the sum it has not rounded; not for width 1"
        )
    return fused("npu_add_rms_norm", x, residual, weight)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, alpha: float = 1.0
) -> Support:
    return fused("npu_add_layer_norm", x, residual, weight, bias)


def gelu(x: Tensor) -> Support:
    return takes(x)


def geglu(x: Tensor) -> Support:
    return fused("npu_geglu with activate_left", x)


def swiglu(x: Tensor) -> Support:
    return fused("npu_swiglu", x)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Support:
    width, heads = 2 * cos.shape[-1], x.shape[2]
    if width >= ROTATED or heads >= ROTATED_HEADS:
        limits = f"fewer than {ROTATED} rotated dimensions and {ROTATED_HEADS} heads"
        return unsupported(f"npu_rotary_mul takes {limits}, received {width} and {heads}")
    operator = "npu_rotary_mul with any width and interleaved pairs"
    return first(fused(operator, x), exactly(torch.float32, cos=cos, sin=sin))


def embedding(ids: Tensor, weight: Tensor, shrink: float = 1.0) -> Support:
    if not ids.numel():
        return unsupported("operators take no empty tensor, received no ids")
    return first(takes(weight), exactly(torch.int64, ids=ids))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Support:
    return takes(x, weight, bias)


def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor) -> Support:
    return first(takes(rows, weight), _by_expert(rows, weight, counts))


def _by_expert(rows: Tensor, weight: Tensor, counts: Tensor) -> Support:
    """Requires what npu_grouped_matmul takes, whatever the dtype of the weight is."""
    if len(weight) > MOST_EXPERTS or max(weight.shape[1:]) > GROUPED_WIDTH:
        limits = f"up to {MOST_EXPERTS} matrices of {GROUPED_WIDTH} rows and columns"
        return unsupported(f"npu_grouped_matmul takes {limits}, received {tuple(weight.shape)}")
    operator = "npu_grouped_matmul of bfloat16 and float32"
    return first(fused(operator, rows), exactly(torch.int64, counts=counts))


def quantized_grouped_linear(
    rows: Tensor,
    weight: Tensor,
    scale: Tensor,
    counts: Tensor,
    bits: int = 8,
    activation_bits: int = 16,
) -> Support:
    operator = "npu_grouped_matmul"
    if bits == 4:
        return unsupported(f"{operator} packs 4-bit codes along the outputs, ours lie along inputs")
    if scale.dim() == 3 and scale.shape[2] > 1:
        return unsupported(f"{operator} takes one scale a row of 8-bit codes, not groups")
    if activation_bits == 8:
        return unsupported(f"{operator} does not round activations; npu_dynamic_quant does by row")
    if rows.dtype != torch.float16:  # its scales have the dtype of the rows
        return unsupported(
            f"{operator} keeps float16 scales for float16 only, received {rows.dtype}"
        )
    return first(_by_expert(rows, weight, counts), exactly(torch.float16, scale=scale))


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    bits: int = 8,
    activation_bits: int = 16,
) -> Support:
    operator = "npu_weight_quant_batchmatmul"
    if bits == 4 and len(weight) % 8:
        return unsupported(f"{operator} takes 4-bit codes of 8 n outputs, received {len(weight)}")
    if activation_bits == 8:
        return unsupported(f"{operator} does not round activations; npu_dynamic_quant does by row")
    if x.dtype != torch.float16:  # the operator rounds the float16 scales to x's dtype
        return unsupported(f"{operator} keeps float16 scales for float16 only, received {x.dtype}")
    width = weight.shape[1] * 8 // bits
    group = width // scale.shape[1] if scale.dim() == 2 else 0
    if scale.dim() == 2 and (group % 32 or not group < width):
        return unsupported(f"{operator} takes groups of 32 n below the width, received {group}")
    if max(len(weight), width) > QUANTISED_WIDTH:
        return unsupported(f"{operator} takes up to {QUANTISED_WIDTH} inputs and outputs")
    exact = exactly(torch.float16, scale=scale, **({} if bias is None else {"bias": bias}))
    return first(fused(operator, x), exact)


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
    heads, width = q.shape[2:]
    if width > HEAD_DIM or heads > HEADS:
        limits = f"up to {HEADS} heads of {HEAD_DIM} dimensions"
        return unsupported(f"npu_fusion_attention takes {limits}, received {heads} of {width}")
    if v.shape[-1] != width:
        sizes = f"received {width} and {v.shape[-1]}"
        return unsupported(f"our call of npu_fusion_attention takes one head size, {sizes}")
    ints = exactly(torch.int32, key_start=key_start, key_end=key_end)
    return first(fused("npu_fusion_attention", q, k, v), ints)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor
) -> Support:
    rest = exactly(torch.int64, labels=labels), exactly(torch.float32, token_weight=token_weight)
    return first(fused("npu_cross_entropy_loss", x, weight), *rest)


def global_norm(tensors: Sequence[Tensor]) -> Support:
    if any(t.dtype not in DTYPES for t in tensors):
        return unsupported(f"operators take {DTYPES}, received {[t.dtype for t in tensors]}")
    return SUPPORTED


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
    state = [*params, *exp_avgs, *exp_avg_sqs]
    if strange := {t.dtype for t in (*state, grad_scale)} - {torch.float32}:
        return unsupported(f"parameters and state are kept in float32, received {strange}")
    if any(g.dtype not in DTYPES for g in grads):
        return unsupported(f"operators take {DTYPES}, received {[g.dtype for g in grads]}")
    return SUPPORTED


def refusal(op: str) -> Callable[..., Support]:
    """Returns the predicate of an op in NO_CALL."""
    return lambda *args, **kwargs: unsupported(NO_CALL[op])
