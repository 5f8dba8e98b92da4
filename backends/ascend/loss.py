"""Computes cross-entropy with the output projection, a block of rows at a time. Shapes: N tokens,
D width, V vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_npu = torch.ops.npu

ROWS = 2048
"""tokens at a time: float32 logits and log-probabilities take 8 * ROWS * V bytes"""


class LinearCrossEntropy(torch.autograd.Function):
    """Computes the op's float32 loss. The forward pass computes the gradients too, while a block's
    log-probabilities exist. npu_cross_entropy_loss gets float32 logits, since it returns losses in
    the logits' dtype (its docstring) and bfloat16 has only three digits."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad[:2])
        loss = token_weight.new_zeros(())
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dweight = torch.zeros_like(
            weight, dtype=torch.float32, memory_format=torch.contiguous_format
        )
        for start in range(0, len(x), ROWS):
            rows = slice(start, start + ROWS)
            part, dz = _block(x[rows], weight, labels[rows], token_weight[rows], wanted)
            loss += part
            if wanted:
                torch.mm(dz, weight, out=dx[rows])
                dweight += dz.t() @ x[rows]  # [V, D]
        ctx.save_for_backward(dx, dweight.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        return (dx * dloss).to(dx.dtype), (dweight * dloss).to(dweight.dtype), None, None


def _block(
    x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Returns the rows' weighted loss and, in x's dtype, its gradient with respect to the
    logits."""
    z = torch.nn.functional.linear(x, weight).float()  # [rows, V]
    each, log_prob, _, _ = _npu.npu_cross_entropy_loss(z, labels, None, "none")
    part = (each * token_weight).sum()
    if not wanted:
        return part, part
    dz = _npu.npu_cross_entropy_loss_backward(
        token_weight, log_prob, labels, None, None, None, "none"
    )
    return part, dz.to(x.dtype)
