"""Declares the CPU backend: our fused C++ kernels (csrc/), and torch's matrix products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glm_core import ops
from glm_core.backends.base import Backend
from glm_core.backends.cpu import fakes, supports
from glm_core.backends.cpu.decode_step import CpuDecodeStep, supported
from glm_core.backends.cpu.extension import exact, isa, isas, loaded, probe, select_isa
from glm_core.backends.exact import Exact
from glm_core.decode_step import DecodeStep, Stack
from glm_core.ops.routing import check_choice
from glm_core.spec import Support

__all__ = ["backend", "isa", "isas", "select_isa"]


class CpuBackend(Backend):
    def synchronize(self) -> None:
        """Does nothing: kernels return when they are done."""

    def decode_step(self, stack: Stack) -> DecodeStep | Support:
        """Returns a step for a model whose every op has a kernel for these tensors, else the
        reason."""
        support = supported(stack)
        return CpuDecodeStep(stack, FEW_ROWS) if support.ok else support


backend = CpuBackend(
    name="cpu",
    device_type="cpu",
    verified="run on x86-64 CPUs; its kernels under emulation of Arm (qemu), never on an Arm chip",
    dtypes=supports.DTYPES,
    probe=probe,
    exact=Exact(exact, supports.DTYPES),
)
_ops = torch.ops.glm_core

FEW_ROWS = 8
"""the most rows for which inference uses our product: a row then has the same bits whatever the
other rows are, which no BLAS promises"""

if loaded():
    fakes.register()


@backend.implements(ops.rms_norm, supports.rms_norm)
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return _ops.rms_norm.default(x, weight, eps)


@backend.implements(ops.layer_norm, supports.layer_norm)
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    return _ops.layer_norm.default(x, weight, bias, eps)


@backend.implements(ops.add_rms_norm, supports.add_rms_norm)
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    return _ops.add_rms_norm.default(x, residual, weight, eps, alpha)


@backend.implements(ops.add_layer_norm, supports.add_layer_norm)
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    return _ops.add_layer_norm.default(x, residual, weight, bias, eps, alpha)


@backend.implements(ops.gelu, supports.activation)
def gelu(x: Tensor) -> Tensor:
    return _ops.gelu.default(x)


@backend.implements(ops.geglu, supports.activation)
def geglu(x: Tensor) -> Tensor:
    return _ops.geglu.default(x)


@backend.implements(ops.swiglu, supports.activation)
def swiglu(x: Tensor) -> Tensor:
    return _ops.swiglu.default(x)


@backend.implements(ops.rope, supports.rope)
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    return _ops.rope.default(x, cos, sin, interleaved)


@backend.implements(ops.embedding, supports.embedding)
def embedding(ids: Tensor, weight: Tensor, shrink: float = 1.0) -> Tensor:
    return _ops.embedding.default(ids, weight, shrink)


@backend.implements(ops.linear, supports.linear)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    differentiated = any(t is not None and t.requires_grad for t in (x, weight, bias))
    if (torch.is_grad_enabled() and differentiated) or x.numel() > FEW_ROWS * x.shape[-1]:
        return _ops.linear.default(x, weight, bias)
    return _ops.linear_few.default(x, weight, bias)


@backend.implements(ops.quantized_linear, supports.quantized_linear)
def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    bits: int = 8,
    activation_bits: int = 16,
) -> Tensor:
    return _ops.quantized_linear.default(x, weight, scale, bias, bits, activation_bits)


@backend.implements(ops.attention, supports.attention)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    scale: float,
    layer_scale: float = 1.0,
    pb_relax: float = 0.0,
) -> Tensor:
    # layer_scale and pb_relax keep half-precision scores in range; the kernel's are float32
    return _ops.attention.default(q, k, v, key_start, key_end, scale)


@backend.implements(ops.route, supports.route)
def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    check_choice(len(weight), top_k, groups, top_groups)
    return _ops.route.default(x, weight, bias, top_k, groups, top_groups, scale, normalize)


@backend.implements(ops.permute, supports.permute)
def permute(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return _ops.permute.default(x, experts, num_experts)


@backend.implements(ops.unpermute, supports.unpermute)
def unpermute(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    return _ops.unpermute.default(rows, order, weights)


@backend.implements(ops.grouped_linear, supports.grouped_linear)
def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return _ops.grouped_linear.default(rows, weight, counts)


@backend.implements(ops.quantized_grouped_linear, supports.quantized_grouped_linear)
def quantized_grouped_linear(
    rows: Tensor,
    weight: Tensor,
    scale: Tensor,
    counts: Tensor,
    bits: int = 8,
    activation_bits: int = 16,
) -> Tensor:
    return _ops.quantized_grouped_linear.default(rows, weight, scale, counts, bits, activation_bits)


@backend.implements(ops.linear_cross_entropy, supports.linear_cross_entropy)
def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
    return _ops.linear_cross_entropy.default(x, weight, labels, token_weight)


@backend.implements(ops.global_norm, supports.global_norm)
def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    return _ops.global_norm.default(tensors) if tensors else torch.zeros(())


@backend.implements(ops.adamw, supports.adamw)
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
) -> None:
    _ops.adamw_.default(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        grad_scale,
        step,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        copies or [],
    )
