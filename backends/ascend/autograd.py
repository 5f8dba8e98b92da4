"""Defines gradients that torch_npu lacks: residual + RMS norm, the shrunk embedding, and products
with a quantised weight and with the experts' weights. Shapes: D width, F features, G groups, M
rows, X experts."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from glm_core.ops.quant import dequantize, unpack

_npu = torch.ops.npu


class AddRmsNorm(torch.autograd.Function):
    """Computes s = x + residual and y = rms_norm(s). torch_npu declares no derivative of
    npu_add_rms_norm (op-plugin config/derivatives.yaml), so the backward adds the gradient of s to
    npu_rms_norm's backward at s."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        y, rstd, total = _npu.npu_add_rms_norm(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        # torch_npu's order; CANN's own aclnnRmsNormGrad has rstd before gamma
        dx, dweight = _npu.npu_rms_norm_backward(dy.contiguous(), total, weight, rstd)
        dx = dx + dtotal
        return dx, dx, dweight.to(weight.dtype), None


class ShrunkEmbedding(torch.autograd.Function):
    """Computes weight[ids]; multiplies the gradient by `shrink`."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, shrink: float) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shrink, ctx.rows = shrink, weight.shape[0]
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        scaled = dy if ctx.shrink == 1.0 else dy * ctx.shrink
        dweight = torch.ops.aten.embedding_dense_backward(scaled, ids, ctx.rows, -1, False)
        return None, dweight, None


_packed: MutableMapping[Tensor, tuple[int, Tensor]] = WeakIdKeyDictionary()
"""4-bit weight -> its version and its codes in the operator's own order, half a byte per code"""


def operand(weight: Tensor, bits: int) -> Tensor:
    """Returns the codes as npu_weight_quant_batchmatmul takes them: int8 [D, F] as a transposed
    view, or 4-bit codes in int32 [D, F / 8], in an order that only npu_convert_weight_to_int4pack
    knows."""
    if bits == 8:
        return weight.t()  # [D, F]
    version, packed = _packed.get(weight, (-1, weight))
    if version != weight._version:
        codes = unpack(weight, 4).t().to(torch.int32).contiguous()  # [D, F]
        packed = _npu.npu_convert_weight_to_int4pack(codes)
        _packed[weight] = weight._version, packed
    return packed


class QuantizedLinear(torch.autograd.Function):
    """Computes x weight^T + bias for x [M, D]; only x has a gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.bits = bits
        rows = scale.reshape(len(weight), -1)  # [F, G]
        group = x.shape[1] // rows.shape[1] if rows.shape[1] > 1 else 0
        return _npu.npu_weight_quant_batchmatmul(
            x, operand(weight, bits), rows.t().contiguous(), None, None, None, bias, group
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        dx = dy.float() @ dequantize(weight, scale, ctx.bits, torch.float32)
        return dx.to(dy.dtype), None, None, None, None


def _by_expert(
    x: Tensor, weight: Tensor, ends: Tensor, group_type: int = 0, **codes: list[Tensor]
) -> Tensor:
    """Calls npu_grouped_matmul for one tensor on each side. group_type 0: each expert's rows of x
    [M, K] times its matrix of weight [X, K, N]. 2: each expert's columns of x [N, M] times its rows
    of weight [M, K], [X, N, K]; x must be a transposed view (ops-transformer
    docs/aclnnGroupedMatmulV4.md). codes: scales and offsets of a weight in int8."""
    how = {"split_item": 3, "group_type": group_type, "group_list_type": 0}
    (y,) = _npu.npu_grouped_matmul([x], [weight], group_list=ends, **how, **codes)
    return y


class GroupedLinear(torch.autograd.Function):
    """Computes rows [M, D] times the weight [X, F, D] of each row's expert, [M, F]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0)
        ctx.save_for_backward(rows, weight, counts, ends)
        return _by_expert(rows, weight.transpose(1, 2), ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, counts, ends = ctx.saved_tensors
        drows = dweight = None
        dy = dy.contiguous()
        if ctx.needs_input_grad[0]:
            drows = _by_expert(dy, weight, ends)
        if ctx.needs_input_grad[1]:
            dweight = _by_expert(dy.t(), rows, ends, 2)  # [X, F, D]
            # the page does not say what an expert without rows leaves in the result
            dweight = dweight.masked_fill((counts == 0)[:, None, None], 0.0)
        return drows, dweight, None


class QuantizedGroupedLinear(torch.autograd.Function):
    """Computes the same with int8 codes [X, F, D] and their scales [X, F]; only rows have a
    gradient. The page wants offsets of codes, which are zero here."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, scale: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0)
        ctx.save_for_backward(weight, scale, ends)
        zeros = [torch.zeros_like(scale)]
        return _by_expert(
            rows, weight.transpose(1, 2), ends, antiquant_scale=[scale], antiquant_offset=zeros
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, ends = ctx.saved_tensors
        wide = weight.float() * scale.float()[..., None]  # [X, F, D]
        return _by_expert(dy.float().contiguous(), wide, ends).to(dy.dtype), None, None, None
