"""The rule acquits honest kernels: other formulas, other orders, one rounding more than the
reference's. What it convicts is test_conformance_mutants' business."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from glm_core import ops
from glm_core.backends.base import Backend
from glm_core.conformance.case import select
from glm_core.conformance.run import run, run_case
from glm_core.dispatch import Op
from glm_core.faults.fault import Benign
from glm_core.faults.flash import flash as flash_forward
from glm_core.faults.flash import flash_backward
from glm_core.ops.precision import wide

HONEST: list[Any] = []


def honest(op: Op) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a kernel that must pass every case of its op."""

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        HONEST.append(pytest.param(op, kernel, id=f"{op.name}-{kernel.__name__}"))
        return kernel

    return register


@honest(ops.rms_norm)
def rounded_before_weight(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Rounds once more, like transformers' Llama and Glm."""
    t = wide(x)
    return (t * torch.rsqrt(t.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


@honest(ops.rms_norm)
def float64_inside(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Rounds only the result."""
    y: Tensor = ops.rms_norm.reference(x.double(), weight.double(), eps)
    return y.to(x.dtype)


@honest(ops.layer_norm)
def rounded_before_affine(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Rounds between normalising and scaling, like layers made of two kernels."""
    y = functional.layer_norm(wide(x), x.shape[-1:], None, None, eps)
    return y.to(x.dtype) * weight + bias


@honest(ops.add_layer_norm)
def sum_not_rounded(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The norm reads the float32 sum."""
    total = wide(x) + alpha * wide(residual)
    y = functional.layer_norm(total, x.shape[-1:], wide(weight), wide(bias), eps)
    return y.to(x.dtype), total.to(x.dtype)


@honest(ops.gelu)
def by_sigmoid(x: Tensor) -> Tensor:
    """tanh(u) = 2 sigmoid(2u) - 1: right where the reference's tail is flushed to zero."""
    t = wide(x)
    return (t * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (t + 0.044715 * t**3))).to(x.dtype)


@honest(ops.geglu)
def rounded_before_product(x: Tensor) -> Tensor:
    """Rounds the gate, then the product, like eager torch."""
    a, b = x.chunk(2, -1)
    return a * functional.gelu(b)


@honest(ops.swiglu)
def gate_rounded(x: Tensor) -> Tensor:
    """Computes it like transformers' MLP."""
    g, u = x.chunk(2, -1)
    return functional.silu(g) * u


@honest(ops.rope)
def tables_rounded(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rounds cos and sin to the working dtype, like transformers."""
    tables = [t.to(x.dtype).to(t.dtype) for t in (cos, sin)]
    y: Tensor = ops.rope.reference(x, *tables, interleaved)
    return y


class Flash(torch.autograd.Function):
    """Flash attention 2 over [B, H, L, E]: probabilities and their gradients are rounded to the
    working dtype before each product, the row sum comes from the rounded output."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
        scores = (wide(q) @ wide(k).mT * scale).masked_fill(~visible, -torch.inf)
        top = scores.amax(-1, keepdim=True) if scores.numel() else scores
        top = top.nan_to_num(neginf=0.0)  # a query that sees nothing
        p = (scores - top).exp()
        total = p.sum(-1, keepdim=True)
        total = torch.where(total == 0, 1, total)
        y = (p.to(q.dtype).to(p.dtype) @ wide(v) / total).to(q.dtype)
        p = (scores - (top + total.log())).exp()  # what backward recomputes
        ctx.save_for_backward(q, k, v, y, p)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, p = ctx.saved_tensors
        rounded = lambda t: t.to(q.dtype).to(p.dtype)  # noqa: E731
        dp = wide(g) @ wide(v).mT
        ds = rounded(p * (dp - (wide(g) * wide(y)).sum(-1, keepdim=True)))
        dq, dk = ds @ wide(k) * ctx.scale, ds.mT @ wide(q) * ctx.scale
        dv = rounded(p).mT @ wide(g)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), None, None


@honest(ops.attention)
def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    scale: float,
    layer_scale: float = 1.0,
    pb_relax: float = 0.0,
) -> Tensor:
    share = q.shape[2] // k.shape[2]
    heads = [q.transpose(1, 2), *(t.transpose(1, 2).repeat_interleave(share, 1) for t in (k, v))]
    j = torch.arange(k.shape[1])
    visible = ((j >= key_start[..., None]) & (j < key_end[..., None]))[:, None]  # [B, 1, L, S]
    y: Tensor = Flash.apply(*heads, visible, scale)
    return y.transpose(1, 2).contiguous()


@honest(ops.linear)
def bias_after_rounding(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product is rounded, then the bias is added."""
    y = x @ weight.t()
    return y if bias is None else y + bias


@honest(ops.linear_cross_entropy)
def logits_not_rounded(x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
    """Logits stay in float32, as in a fused kernel that never stores them."""
    each = functional.cross_entropy(wide(x) @ wide(weight).t(), labels, reduction="none")
    return (each * token_weight).sum()


@pytest.mark.parametrize(("op", "kernel"), HONEST)
def test_honest_kernels_pass(op: Op, kernel: Callable[..., Any]) -> None:
    backend = Backend(
        name="honest",
        device_type="cpu",
        verified="in this test",
        dtypes=(torch.float32, torch.bfloat16),
    )
    backend.implements(op)(kernel)
    report = run(backend, op=op.name, real=False)
    assert report.count("pass") > 20
    assert not [(r.id, r.reason) for r in report.failed]


@pytest.mark.parametrize("sample", ["1x1x1x1", "2x6x2x8-empty-rows", "1x9x2x16-huge"])
def test_attentions_gradients_may_cancel_as_a_rounded_result_lets_them(sample: str) -> None:
    """Where a query sees one key, or one key takes all, the right gradient is zero and P dO v^T,
    rounded, does not cancel with its row sum. A row sum that is lost is another matter."""
    kernels = {"attention": flash_forward(32, rounding=True)}
    honest = Benign("here", "attention", "flash, differentiated through its roundings", kernels)
    lost = flash_backward(lambda do, o: torch.zeros_like(do[..., :1]))
    wrong = Benign("here", "attention", "no row sum", {"attention": lost})
    for change, outcome in ((honest, "pass"), (wrong, "fail")):
        backend = change.backend()
        [case] = select(backend, id=f"attention-bfloat16-{sample}-grad")
        assert run_case(case, backend).outcome == outcome
