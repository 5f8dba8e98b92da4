"""Declares the parts of a layer of experts: rows brought into the experts' order and back, and the
product of each expert's rows with its own weight.

Shapes: N tokens, T experts chosen for a token, M = N T rows, D input width, F output width, X
experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from glm_core.dispatch import op
from glm_core.errors import ShapeError
from glm_core.ops.layout import gapped
from glm_core.ops.precision import num_bytes, product, wide
from glm_core.ops.quant import (
    bytes_of_codes,
    dequantize,
    quantized_linear,
    round_activations,
    steps,
)
from glm_core.spec import Cost, Draw, Maker, Sample, exact, integers, normal


def permute_samples() -> Iterator[Sample]:
    def make(
        id: str,
        tokens: int,
        width: int,
        experts: int,
        top_k: int,
        std: float = 1.0,
        strided: bool = False,
    ) -> Sample:
        args = {
            "x": normal(tokens, width, std=std, strided=strided),
            "experts": integers(0, experts, tokens, top_k),
            "num_experts": experts,
        }
        return Sample(id, args, real="2048" in id)

    yield make("6x16-8-top2", 6, 16, 8, 2)
    yield make("5x33-9-top3-strided", 5, 33, 9, 3, strided=True)
    yield Sample("5x7-4-top2-gapped", gapped(make("", 5, 7, 4, 2).args))
    alone = exact([[1, 1], [1, 3]], torch.int64)  # most experts without rows
    yield Sample("2x8-5-top2-empty", {"x": normal(2, 8), "experts": alone, "num_experts": 5})
    yield make("1x1-1-top1", 1, 1, 1, 1)
    yield make("0x16-8-top2", 0, 16, 8, 2)
    yield make("6x16-8-top2-tiny", 6, 16, 8, 2, std=1e-6)
    yield make("6x16-8-top2-huge", 6, 16, 8, 2, std=1e4)
    yield Sample("517x65-33-top3", make("", 517, 65, 33, 3, strided=True).args, large=True)
    yield make("64x2048-64-top4", 64, 2048, 64, 4)  # GLM-4.7-Flash


def permute_cost(x: Tensor, experts: Tensor, num_experts: int) -> Cost:
    top_k = experts.shape[-1]
    rows, indexes = top_k * num_bytes(x), 2 * num_bytes(experts) + 8 * num_experts
    return Cost(0, num_bytes(x) + rows + indexes, top_k * x.numel(), rows + num_bytes(x))


@op(samples=permute_samples, cost=permute_cost, differentiable=("x",))
def permute(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Computes order = the stable sort of experts.flatten(), rows = x[order // T], and counts, the
    number of rows of each expert. Row i belongs to place order[i] of experts.flatten(), so rows of
    one expert are contiguous and keep the tokens' order.

    Shapes: x [N, D], experts [N, T] int64 in 0 ... num_experts - 1 -> rows [N T, D], order [N T]
    int64, counts [num_experts] int64. The rows are exact in every dtype. Accumulates in float32:
    the gradient of x, over a token's rows in the order of its choices. Source: Gale et al. 2022
    (MegaBlocks), section 5; Megatron-LM's moe_permute."""
    places = experts.flatten()
    order = torch.sort(places, stable=True).indices
    counts = order.new_zeros(num_experts).scatter_add(0, places, torch.ones_like(places))
    differentiated = torch.is_grad_enabled() and x.requires_grad
    each = (wide(x) if differentiated else x)[:, None].expand(-1, experts.shape[-1], -1)
    rows = each.flatten(0, 1).index_select(0, order)  # [N T, D]
    return rows.to(x.dtype), order, counts


def _shuffled(size: int) -> Maker:
    def make(draw: Draw) -> Tensor:
        return torch.randperm(size, generator=draw.generator).to(draw.device)

    return make


def unpermute_samples() -> Iterator[Sample]:
    def make(
        id: str, tokens: int, width: int, top_k: int, std: float = 1.0, strided: bool = False
    ) -> Sample:
        args = {
            "rows": normal(tokens * top_k, width, std=std, strided=strided),
            "order": _shuffled(tokens * top_k),
            "weights": normal(tokens, top_k, mean=0.5, std=0.2, strided=strided, wide=True),
        }
        return Sample(id, args, real="2048" in id)

    yield make("6x16-top2", 6, 16, 2)
    yield make("5x33-top3-strided", 5, 33, 3, strided=True)
    yield Sample("5x7-top2-gapped", gapped(make("", 5, 7, 2).args))
    yield make("1x1-top1", 1, 1, 1)
    yield make("3x8-top8", 3, 8, 8)
    yield make("0x16-top2", 0, 16, 2)
    yield make("6x16-top2-tiny", 6, 16, 2, std=1e-6)
    yield make("6x16-top2-huge", 6, 16, 2, std=1e4)
    yield Sample("517x65-top3", make("", 517, 65, 3, strided=True).args, large=True)
    yield make("64x2048-top4", 64, 2048, 4)  # GLM-4.7-Flash


def unpermute_cost(rows: Tensor, order: Tensor, weights: Tensor) -> Cost:
    moved, out = num_bytes(rows, order, weights), len(weights) * rows.shape[-1]
    flops = 2 * rows.numel()
    return Cost(
        flops, moved + out * rows.element_size(), 2 * flops, 2 * moved + out * rows.element_size()
    )


@op(samples=unpermute_samples, cost=unpermute_cost, differentiable=("rows", "weights"))
def unpermute(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Computes y[t] = sum over j of weights[t, j] rows[i], where order[i] = t T + j: the rows go
    back to the tokens that `permute` took them from, and are added with the router's weights.

    Shapes: rows [N T, D]; order [N T] int64, a permutation; weights [N, T] float32 -> [N, D].
    Products and sums in float32, rounded once to the dtype of rows. Accumulates in float32: y over
    a token's rows in the order of its choices, the gradient of weights over D. Source: Gale et al.
    2022 (MegaBlocks), section 5; Megatron-LM's moe_unpermute."""
    back = torch.zeros_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    each = wide(rows).index_select(0, back).unflatten(0, weights.shape)  # [N, T, D]
    return (each * weights.to(each.dtype)[..., None]).sum(1).to(rows.dtype)


def grouped_linear_samples() -> Iterator[Sample]:
    def make(
        id: str,
        counts: list[int],
        d: int,
        f: int,
        std: float = 1.0,
        strided: bool = False,
    ) -> Sample:
        args = {
            "rows": normal(sum(counts), d, std=std, strided=strided),
            "weight": normal(len(counts), f, d, std=d**-0.5, strided=strided),
            "counts": exact(counts, torch.int64),
        }
        return Sample(id, args, real="2048" in id)

    yield make("9x48-32-3experts", [4, 2, 3], 48, 32)
    yield make("7x33-17-5experts-empty-strided", [0, 4, 0, 3, 0], 33, 17, strided=True)
    yield Sample("5x9-7-4experts-gapped", gapped(make("", [3, 2, 0, 0], 9, 7).args))
    yield make("1x1-1-1expert", [1], 1, 1)
    yield make("0x16-8-3experts", [0, 0, 0], 16, 8)
    yield make("5x33-17-2experts-tiny", [2, 3], 33, 17, std=1e-4)
    yield make("5x33-17-2experts-huge", [2, 3], 33, 17, std=1e3)
    yield make("3x1001-5-2experts", [1, 2], 1001, 5)  # partial sums of low precision show
    large = make("", [67, 0, 1, 41, 16], 160, 129, strided=True).args
    yield Sample("125x160-129-5experts", large, large=True)
    yield make("9x384-2048-2experts", [5, 4], 384, 2048)  # GLM-4.7-Flash, down, cut in four


def grouped_linear_cost(rows: Tensor, weight: Tensor, counts: Tensor) -> Cost:
    """Counts the weights of as many experts as may have rows."""
    flops, out = 2 * rows.numel() * weight.shape[1], len(rows) * weight.shape[1]
    used = min(len(rows), len(weight)) * num_bytes(weight) // max(len(weight), 1)
    moved = num_bytes(rows, counts) + out * rows.element_size()
    back = 2 * num_bytes(rows) + used + num_bytes(weight) + out * rows.element_size()
    return Cost(flops, moved + used, 2 * flops, back)


@op(samples=grouped_linear_samples, cost=grouped_linear_cost, differentiable=("rows", "weight"))
def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Computes y = row weight[e]^T for each row, where the first counts[0] rows belong to expert
    e = 0, the next counts[1] to expert 1, and so on. An expert may have no rows; its weight's
    gradient is then zero.

    Shapes: rows [M, D], weight [X, F, D], counts [X] int64 with sum M -> [M, F]. Rounded to the
    dtype of rows. Accumulates in float32 at least: y over D, the gradient of rows over F, that of
    weight over the expert's rows. Raises ShapeError if the counts do not add up to M. Source: Gale
    et al. 2022 (MegaBlocks), section 4; torch.nn.functional.grouped_mm."""
    if _without_values(counts):
        return _of_every_expert(rows, weight, counts)
    parts = zip(rows.split(_sizes(rows, weight, counts)), weight.unbind(), strict=True)
    used = [product(part, w) for part, w in parts if len(part) or not len(rows)]
    return torch.cat(used)


def _without_values(counts: Tensor) -> bool:
    return counts.is_meta or is_fake(counts)


def _sizes(rows: Tensor, weight: Tensor, counts: Tensor) -> list[int]:
    """Returns the counts as numbers, checked."""
    sizes: list[int] = counts.tolist()
    if sum(sizes) != len(rows) or len(sizes) != len(weight) or min(sizes, default=0) < 0:
        raise ShapeError(
            f"grouped_linear: {len(weight)} experts and {len(rows)} rows need as many counts with "
            f"that sum; received {len(sizes)} counts with sum {sum(sizes)}"
        )
    return sizes


def _of_every_expert(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Computes the same where the counts have no values, as in a trace: every row by every expert,
    of which its own is kept."""
    row = torch.arange(len(rows), device=rows.device)[:, None]
    expert = (row >= counts.cumsum(0)).sum(-1)  # [M]
    # contiguous, and with it the gradient
    y = rows.contiguous() @ weight.contiguous().transpose(-1, -2)  # [X, M, F]
    own = expert.clamp(max=len(weight) - 1)[None, :, None].expand(1, -1, y.shape[-1])  # [1, M, F]
    return y.gather(0, own)[0]


def quantized_grouped_linear_samples() -> Iterator[Sample]:
    def make(
        id: str,
        counts: list[int],
        d: int,
        f: int,
        bits: int,
        group: int = 0,
        activation_bits: int = 16,
        std: float = 1.0,
        strided: bool = False,
    ) -> Sample:
        size, experts = d**-0.5 / 2 ** (bits - 2), len(counts)
        args = {
            "rows": normal(sum(counts), d, std=std, strided=strided),
            "weight": bytes_of_codes(bits, experts, f, d * bits // 8),
            "scale": steps(size, experts, f, d // group) if group else steps(size, experts, f),
            "counts": exact(counts, torch.int64),
            "bits": bits,
            "activation_bits": activation_bits,
        }
        return Sample(id, args, real="2048" in id)

    yield make("9x96-17-3experts-int4", [4, 2, 3], 96, 17, 4)
    yield make("7x33-17-4experts-empty-int8-strided", [0, 4, 0, 3], 33, 17, 8, strided=True)
    yield make("5x96-33-3experts-int4-group32", [1, 0, 4], 96, 33, 4, group=32)
    yield make("5x256-9-3experts-int8-group128-a8", [1, 1, 3], 256, 9, 8, 128, activation_bits=8)
    yield Sample("5x34-7-4experts-int4-gapped", gapped(make("", [3, 2, 0, 0], 34, 7, 4).args))
    yield make("1x1-1-1expert-int8", [1], 1, 1, 8)
    yield make("0x32-8-3experts-int4", [0, 0, 0], 32, 8, 4)
    yield make("5x34-17-2experts-int8-tiny", [2, 3], 34, 17, 8, std=1e-4)
    yield make("5x34-17-2experts-int8-huge", [2, 3], 34, 17, 8, std=1e3)
    large = make("", [37, 0, 1, 21], 160, 129, 4, group=32).args
    yield Sample("59x160-129-4experts-int4-group32", large, large=True)
    yield make("4x384-2048-4experts-int4-group128", [2, 0, 1, 1], 384, 2048, 4, group=128)


def quantized_grouped_linear_cost(
    rows: Tensor,
    weight: Tensor,
    scale: Tensor,
    counts: Tensor,
    bits: int = 8,
    activation_bits: int = 16,
) -> Cost:
    """Counts the weights of as many experts as may have rows."""
    flops, out = 2 * rows.numel() * weight.shape[1], len(rows) * weight.shape[1]
    used = min(len(rows), len(weight)) * num_bytes(weight, scale) // max(len(weight), 1)
    moved = num_bytes(rows, counts) + used + out * rows.element_size()
    return Cost(flops, moved, flops, moved)


@op(
    samples=quantized_grouped_linear_samples,
    cost=quantized_grouped_linear_cost,
    differentiable=("rows",),
)
def quantized_grouped_linear(
    rows: Tensor,
    weight: Tensor,
    scale: Tensor,
    counts: Tensor,
    bits: int = 8,
    activation_bits: int = 16,
) -> Tensor:
    """Computes grouped_linear with w = code * scale, each expert's product as quantized_linear
    defines it. Weight and scale are frozen: only rows have a gradient.

    Shapes: rows [M, D]; weight int8 [X, F, D], or for bits = 4 [X, F, D / 2]; scale float16 or
    float32 [X, F] or [X, F, G]; counts [X] int64 with sum M -> [M, F]. Neither w nor the rounded
    rows are rounded to the working dtype. Accumulates in float32 at least: y over D, the gradient
    of rows over F; each is rounded once to the dtype of rows. Source: Zeng et al. 2022 (GLM-130B),
    section 5; Gale et al. 2022 (MegaBlocks), section 4."""
    if _without_values(counts):
        a = wide(rows)
        a = round_activations(a) if activation_bits == 8 else a
        w = dequantize(weight.flatten(0, 1), scale.flatten(0, 1), bits, a.dtype)
        return _of_every_expert(a, w.unflatten(0, weight.shape[:2]), counts).to(rows.dtype)
    parts = rows.split(_sizes(rows, weight, counts))
    each = zip(parts, weight.unbind(), scale.unbind(), strict=True)
    fixed = {"bits": bits, "activation_bits": activation_bits}
    used = [item for item in each if len(item[0]) or not len(rows)]
    return torch.cat([quantized_linear.reference(x, w, s, **fixed) for x, w, s in used])
