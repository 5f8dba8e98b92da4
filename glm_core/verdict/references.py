"""Decides what the correct result of an operator is computed with: the operator itself in float64
on the host, or a reference given for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

GIVEN: dict[str, Callable[..., Any]] = {}
"""by name of the operator: the reference that computes it"""


def reference(name: str) -> Callable[[Function], Function]:
    """Registers a function as the reference of the operator called `lib::op` or `lib::op.overload`.
    It is called with the operator's arguments: on the host, tensors in float64 where they were
    floating point. It returns what the operator returns; an argument that the operator writes, it
    writes in place."""

    def register(function: Function) -> Function:
        GIVEN[name] = function
        return function

    return register


def given(func: Any) -> Callable[..., Any] | None:
    """Returns the reference registered for an operator, None where there is none."""
    name = func._schema.name
    overload = func._schema.overload_name or "default"
    return GIVEN.get(f"{name}.{overload}") or GIVEN.get(name)


NO_VALUES = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::empty_permuted",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::resize_",
    "aten::set_",
    "aten::_local_scalar_dense",
    "aten::record_stream",
    "c10d::barrier",
    "c10d::monitored_barrier_",
    "_c10d_functional::wait_tensor",
    "_c10d_functional::_wrap_tensor_autograd",
}
"""operators that compute no tensor's values"""
HOST_ROUNDS = {
    "aten::embedding_dense_backward",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
    "aten::index_add",
    "aten::index_add_",
    "aten::scatter_add",
    "aten::scatter_add_",
    "aten::cumsum",
    "aten::_foreach_norm",
    "aten::native_layer_norm_backward",
    "aten::native_group_norm_backward",
    "aten::native_batch_norm",
    "aten::native_batch_norm_backward",
    "aten::max_pool2d_with_indices_backward",
    "aten::convolution_backward",
    "aten::nll_loss_forward",
    "aten::_log_softmax",
    "aten::pow",
}
"""operators whose kernels on the CPU round inside to the dtype of the result, below float32: sums,
a row's statistics, powers"""
SHORT_EXPONENTIAL = 2.0**-14
"""relative error of the exponentials that torch's attention on a CPU with AVX-512 takes of 16-bit
arguments: exp(0) is 0.99995 there"""
LOGARITHMS = {"aten::_scaled_dot_product_flash_attention_for_cpu": "y1"}
"""by operator: its result that is a logarithm of sums of them, kept for the backward pass"""


COPIES = {"fsdp::split_with_sizes_copy", "fsdp::chunk_cat"}
"""operators of torch.distributed.fsdp that move numbers, and are their own reference"""


def why_not(func: Any) -> str:
    """Returns why an operator cannot be judged, "" where it can."""
    name = func._schema.name
    if given(func) is not None:
        return ""
    if torch.Tag.nondeterministic_seeded in func.tags and not _deterministic(name):
        return "random; its results are given to the next operator as they are"
    namespace = name.partition("::")[0]
    if namespace not in ("aten", "prims") and name not in COPIES:
        return f'no reference; give one with @glm_core.verdict.reference("{name}")'
    return ""


def _deterministic(name: str) -> bool:
    """Says whether an operator is random only where it drops out."""
    return "attention" in name


UNFILLED = {"fsdp::all_gather_copy_in": "y1"}
"""by operator: a result that has no values yet"""
Mask = Tensor | None


def _per_query_head(query: Tensor, x: Tensor) -> Tensor:
    """Repeats the heads of keys or values, where groups of query heads share one."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1)


def _logits(q: Tensor, k: Tensor, causal: bool, mask: Mask, scale: float | None) -> Tensor:
    logits = q @ _per_query_head(q, k).transpose(-2, -1) * (scale or q.shape[-1] ** -0.5)
    if causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device="cpu").triu(1)
        logits = logits.masked_fill(hidden, -torch.inf)
    if mask is not None:
        logits = (
            logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        )
    return logits


def _attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Mask, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Returns softmax(q k^T scale + mask) v and each row's log of the sum of exponentials; shapes
    [B, H, L, E] -> [B, H, L, E], [B, H, L]."""
    logits = _logits(q, k, causal, mask, scale)
    weights = torch.softmax(logits, -1)
    return weights @ _per_query_head(q, v), logits.logsumexp(-1)


def _no_dropout(p: float) -> None:
    if p:
        raise NotImplementedError("attention drops out inside; its mask is not given")


@reference("aten::_scaled_dot_product_flash_attention_for_cpu")
def attention_of_the_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Mask = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes attention by its formula."""
    _no_dropout(dropout_p)
    return _attention(q, k, v, is_causal, attn_mask, scale)


@reference("aten::_scaled_dot_product_flash_attention_for_cpu_backward")
def attention_of_the_cpu_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Mask = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes attention's gradients by their formula, from the output and the logarithms of the
    forward pass as they were rounded."""
    _no_dropout(dropout_p)
    weights = (_logits(q, k, is_causal, attn_mask, scale) - logsumexp.unsqueeze(-1)).exp()
    d_weights = grad @ _per_query_head(q, v).transpose(-2, -1)
    d_logits = weights * (d_weights - (grad * out).sum(-1, keepdim=True))
    d_logits = d_logits * (scale or q.shape[-1] ** -0.5)
    d_q = d_logits @ _per_query_head(q, k)
    d_k, d_v = d_logits.transpose(-2, -1) @ q, weights.transpose(-2, -1) @ grad
    return d_q, _summed(d_k, k), _summed(d_v, v)


def _summed(x: Tensor, like: Tensor) -> Tensor:
    """Sums over the query heads that share a head."""
    return x.unflatten(1, (like.shape[1], -1)).sum(2) if x.shape[1] != like.shape[1] else x


@reference("fsdp::all_gather_copy_in")
def sharded_weights(
    all_gather_inputs: list[Tensor], *sizes: Any, **named_sizes: Any
) -> tuple[Tensor]:
    """Returns what a rank sends: its parts of all weights, one after the other. The buffer that it
    is part of has no values yet."""
    return (torch.cat([x.reshape(-1) for x in all_gather_inputs]),)


@reference("aten::_grouped_mm")
def grouped_product(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Mask = None, out_dtype: Any = None
) -> Tensor:
    """Multiplies group by group. `offs` [E] are the ends of the groups along the dimension that a
    flat argument divides: [M, K] x [E, K, N] -> [M, N], [E, M, K] x [K, N] -> [M, N], [M, K] x
    [K, N] -> [E, M, N]."""
    if offs is None:
        return a @ b
    ends = offs.tolist()
    cuts = [slice(i, j) for i, j in zip([0, *ends], ends, strict=False)]
    if a.ndim == 2 and b.ndim == 2:
        return torch.stack([a[:, c] @ b[c] for c in cuts])
    if a.ndim == 2:
        out = a.new_zeros(a.shape[0], b.shape[-1])
        for c, own in zip(cuts, b, strict=True):
            out[c] = a[c] @ own
        return out
    return torch.cat([own @ b[:, c] for c, own in zip(cuts, a, strict=True)], -1)


@reference("aten::_scaled_dot_product_flash_attention")
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes attention by its formula."""
    return attention_of_the_cpu(q, k, v, dropout_p, is_causal, scale=scale)


@reference("aten::_scaled_dot_product_efficient_attention")
@reference("aten::_scaled_dot_product_cudnn_attention")
def attention_with_bias(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Mask,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *rest: Any,
    scale: float | None = None,
) -> tuple[Tensor]:
    """Computes attention by its formula; only the output is compared."""
    _no_dropout(dropout_p)
    return (_attention(q, k, v, is_causal, attn_bias, scale)[0],)
