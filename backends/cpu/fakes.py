"""Computes the shapes and dtypes that the compiled operators return, without arithmetic.
FakeTensor, meta tensors and torch.compile use these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Two = tuple[Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _like(x: Tensor) -> Tensor:
    """Returns a contiguous tensor like x, whatever x's strides: kernels write rows in order."""
    return x.new_empty(x.shape)


def norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    alpha: float,
) -> Three:
    """Returns y, total (empty without residual) and each row's statistics."""
    stats = x.new_empty((1 if bias is None else 2, x[..., 0].numel()), dtype=torch.float32)
    return _like(x), x.new_empty(0) if residual is None else _like(x), stats


def norm_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    stats: Tensor,
    layer: bool,
    residual: bool,
    alpha: float,
) -> Four:
    """Returns dx, dresidual (empty where it equals dx), dweight and dbias (empty for RMS norm)."""
    dresidual = _like(total) if residual and alpha != 1.0 else total.new_empty(0)
    dbias = _like(weight) if layer else weight.new_empty(0)
    return _like(total), dresidual, _like(weight), dbias


def activation_forward(x: Tensor, kind: int) -> Tensor:
    """Returns y: kind 0 keeps the width, the gated kinds halve it."""
    return x.new_empty((*x.shape[:-1], x.shape[-1] // (1 if kind == 0 else 2)))


def activation_backward(dy: Tensor, x: Tensor, kind: int) -> Tensor:
    """Returns dx."""
    return _like(x)


def rope_turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> Tensor:
    """Returns y."""
    return _like(x)


def embedding_forward(ids: Tensor, weight: Tensor) -> Tensor:
    """Returns y."""
    return weight.new_empty((*ids.shape, weight.shape[1]))


def embedding_backward(dy: Tensor, ids: Tensor, vocab: int, shrink: float) -> Tensor:
    """Returns dweight."""
    return dy.new_empty((vocab, dy.shape[-1]))


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, key_start: Tensor, key_end: Tensor, scale: float
) -> Tensor:
    """Returns y, whose heads have the size of v's."""
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, key_start: Tensor, key_end: Tensor, scale: float
) -> Three:
    """Returns dq, dk and dv."""
    return _like(q), _like(k), _like(v)


def linear_few(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns y."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns y."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def quantized_linear_forward(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int, activation_bits: int
) -> Tensor:
    """Returns y."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def quantized_linear_backward(dy: Tensor, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Returns dx."""
    return dy.new_empty((*dy.shape[:-1], weight.shape[1] * 8 // bits))


def route_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    groups: int,
    top_groups: int,
    scale: float,
    normalize: bool,
) -> Three:
    """Returns experts, weights and scores."""
    shape = (len(x), top_k)
    return bias.new_empty(shape, dtype=torch.int64), bias.new_empty(shape), bias.new_empty(shape)


def route_backward(
    dweights: Tensor,
    experts: Tensor,
    scores: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: float,
    normalize: bool,
) -> Two:
    """Returns dx and dweight."""
    return _like(x), _like(weight)


def permute_forward(x: Tensor, experts: Tensor, num_experts: int) -> Three:
    """Returns rows, order and counts."""
    rows = experts.numel()
    return x.new_empty((rows, x.shape[1])), experts.new_empty(rows), experts.new_empty(num_experts)


def permute_backward(drows: Tensor, order: Tensor, tokens: int) -> Tensor:
    """Returns dx."""
    return drows.new_empty((tokens, drows.shape[1]))


def unpermute_forward(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Returns y."""
    return rows.new_empty((len(weights), rows.shape[1]))


def unpermute_backward(dy: Tensor, rows: Tensor, order: Tensor, weights: Tensor) -> Two:
    """Returns drows and dweights."""
    return _like(rows), _like(weights)


def grouped_linear_forward(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Returns y."""
    return rows.new_empty((len(rows), weight.shape[1]))


def grouped_linear_backward(
    dy: Tensor,
    rows: Tensor,
    weight: Tensor,
    counts: Tensor,
    wants_rows: bool,
    wants_weight: bool,
) -> Two:
    """Returns drows and dweight, empty where they are not wanted."""
    drows = _like(rows) if wants_rows else rows.new_empty(0)
    return drows, _like(weight) if wants_weight else weight.new_empty(0)


def quantized_grouped_linear_forward(
    rows: Tensor, weight: Tensor, scale: Tensor, counts: Tensor, bits: int, activation_bits: int
) -> Tensor:
    """Returns y."""
    return rows.new_empty((len(rows), weight.shape[1]))


def quantized_grouped_linear_backward(
    dy: Tensor, weight: Tensor, scale: Tensor, counts: Tensor, bits: int
) -> Tensor:
    """Returns drows."""
    return dy.new_empty((len(dy), weight.shape[2] * 8 // bits))


def linear_cross_entropy_forward(
    x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor, gradients: bool
) -> Three:
    """Returns loss, dx and dweight; the gradients are empty unless `gradients`."""
    loss = token_weight.new_empty(())
    return (loss, _like(x), _like(weight)) if gradients else (loss, x.new_empty(0), x.new_empty(0))


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Returns a float32 scalar."""
    like = tensors[0] if tensors else torch.empty(())
    return like.new_empty((), dtype=torch.float32)


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grad_scale: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    copies: Sequence[Tensor],
) -> None:
    """Returns nothing; the operator writes its arguments."""


FAKES: list[Callable[..., Any]] = [
    norm_forward,
    norm_backward,
    activation_forward,
    activation_backward,
    rope_turn,
    embedding_forward,
    embedding_backward,
    attention_forward,
    attention_backward,
    linear_few,
    linear_forward,
    quantized_linear_forward,
    quantized_linear_backward,
    route_forward,
    route_backward,
    permute_forward,
    permute_backward,
    unpermute_forward,
    unpermute_backward,
    grouped_linear_forward,
    grouped_linear_backward,
    quantized_grouped_linear_forward,
    quantized_grouped_linear_backward,
    linear_cross_entropy_forward,
    global_norm,
    adamw_,
]


def register() -> None:
    """Registers the fakes with torch; to be called once, after the operators are loaded."""
    for fake in FAKES:
        torch.library.register_fake(f"glm_core::{fake.__name__}", fake)
