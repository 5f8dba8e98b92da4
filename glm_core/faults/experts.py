"""Declares the wrong kernels of a layer of experts: rows brought to the experts and back, and their
products. Shapes: N tokens, T experts of a token, M = N T rows, D in, F out, X experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm_core.faults import rounding
from glm_core.faults.fault import fault, mutant, planted
from glm_core.faults.kernels import Arguments, backward_only, changed, pulled_argument
from glm_core.ops import grouped_linear, permute, quantized_grouped_linear, unpermute
from glm_core.ops.precision import wide
from glm_core.ops.quant import pack, unpack

RESULT_IS_NARROW: dict[str, Any] = {
    "dtypes": ("float32",),
    "reason": "in bfloat16 the gradient is a bfloat16 number in the end",
}
CAPACITY = 2
"""rows that an expert takes where tokens are dropped"""


# permute ------------------------------------------------------------------------------


@mutant(permute, "rows of one expert lie in reverse order")
def not_stable(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, order, counts = permute.reference(x.flip(0), experts.flip(0, 1), num_experts)
    return rows, experts.numel() - 1 - order, counts


@mutant(
    permute, "an expert takes two rows, the others are zero", **planted("permute-dropped", "rows")
)
def tokens_dropped(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, order, counts = permute.reference(x, experts, num_experts)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)  # [M]
    late = torch.arange(len(rows)) - starts >= CAPACITY
    return rows.masked_fill(late[:, None], 0.0), order, counts


@mutant(permute, "order is the inverse: where each place went", **planted("permute-order"))
def order_inverted(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, order, counts = permute.reference(x, experts, num_experts)
    return rows, order.argsort(), counts


@mutant(permute, "counts are where each expert's rows begin")
def counts_are_starts(
    x: Tensor, experts: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    rows, order, counts = permute.reference(x, experts, num_experts)
    return rows, order, counts.cumsum(0) - counts


def first_copy(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Takes all but a token's first row from a copy without gradient."""
    first = torch.arange(experts.shape[-1]) == 0
    each = torch.where(first[:, None], x[:, None], x.detach()[:, None]).flatten(0, 1)  # [M, D]
    return permute.reference(each, experts.reshape(-1, 1), num_experts)


fault(
    permute,
    "the gradient is that of a token's first row alone",
    backward_only(permute, first_copy),
    mutant="gradient_of_one_copy",
    **planted("permute-one-gradient", "gradient", "backward"),
)


# unpermute ----------------------------------------------------------------------------


def in_sorted_order(a: Arguments) -> Tensor:
    return a["weights"].flatten()[a["order"]].reshape(a["weights"].shape)


@mutant(unpermute, "a token's rows are added in the dtype of rows, one by one")
def narrow_sum(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    back = order.argsort().reshape(weights.shape)
    total = torch.zeros(len(weights), rows.shape[-1], dtype=rows.dtype)
    for j in range(weights.shape[-1]):
        part = rows[back[:, j]] * weights[:, j, None].to(torch.bfloat16).to(rows.dtype)
        total = total + part
    return total


@mutant(unpermute, "a token's last row is dropped", **planted("unpermute-last-dropped", "rows"))
def last_dropped(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    kept = torch.arange(weights.shape[-1]) < max(weights.shape[-1] - 1, 1)
    return unpermute.reference(rows, order, weights * kept)


fault(
    unpermute,
    "rows are added without weights",
    changed(unpermute, weights=lambda a: torch.ones_like(a["weights"])),
    mutant="weights_ignored",
)
fault(
    unpermute,
    "weights are taken in the rows' order",
    changed(unpermute, weights=in_sorted_order),
    mutant="weights_in_sorted_order",
    **planted("unpermute-weights-sorted"),
)
fault(
    unpermute,
    "order is read as its inverse",
    changed(unpermute, order=lambda a: a["order"].argsort()),
    mutant="order_inverted",
)
fault(
    unpermute,
    "the gradient of rows is that of a sum without weights",
    pulled_argument(unpermute, "rows", lambda a, g: g / in_sorted(a).to(g.dtype)),
    mutant="gradient_unweighted",
)


def in_sorted(a: Arguments) -> Tensor:
    """Returns the weight of each row [M, 1]."""
    return wide(a["weights"].detach()).flatten()[a["order"]][:, None]


# grouped_linear -----------------------------------------------------------------------


@mutant(grouped_linear, "experts without rows are not counted, and the others move up")
def empty_skipped(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    used = counts[counts > 0]
    full = torch.cat((used, counts.new_zeros(len(counts) - len(used))))
    return grouped_linear.reference(rows, weight, full)


@mutant(grouped_linear, "an expert takes two rows, the others give zero")
def rows_dropped(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)  # [M]
    late = torch.arange(len(rows)) - starts >= CAPACITY
    return grouped_linear.reference(rows, weight, counts).masked_fill(late[:, None], 0.0)


def boundary(a: Arguments) -> Tensor:
    """Returns counts with one row moved from the first expert that has some to its neighbour."""
    counts = a["counts"].clone()
    if len(counts) > 1 and int(counts.sum()):
        first = int((counts > 0).int().argmax())
        counts[first] -= 1
        counts[(first + 1) % len(counts)] += 1
    return counts


def first_expert_alone(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    fixed = torch.cat((weight[:1], weight[1:].detach()))
    return grouped_linear.reference(rows, fixed, counts)


def summed_narrow(a: Arguments, gradient: Tensor) -> Tensor:
    return gradient.bfloat16().to(gradient.dtype)


fault(
    grouped_linear,
    "an expert's last row goes to the next expert",
    changed(grouped_linear, counts=boundary),
    mutant="boundary_off_by_one",
    **planted("grouped-boundary", "rows"),
)
fault(
    grouped_linear,
    "factors are cut to TF32",
    changed(
        grouped_linear,
        rows=lambda a: rounding.ten_bits(a["rows"]),
        weight=lambda a: rounding.ten_bits(a["weight"]),
    ),
    mutant="tf32",
)
fault(
    grouped_linear,
    "only the first expert's weight gets a gradient",
    backward_only(grouped_linear, first_expert_alone),
    mutant="gradient_of_first_expert",
)
fault(
    grouped_linear,
    "the gradient of weight is summed in bfloat16",
    pulled_argument(grouped_linear, "weight", summed_narrow),
    mutant="narrow_weight_gradient",
    **planted("grouped-narrow-gradient", "gradient", "backward", **RESULT_IS_NARROW),
)


# quantized_grouped_linear -------------------------------------------------------------


def nibbles_swapped(a: Arguments) -> Tensor:
    if a["bits"] != 4:
        return unpack(a["weight"], a["bits"])
    return pack(unpack(a["weight"], 4).unflatten(-1, (-1, 2)).flip(-1).flatten(-2))  # [X, F, D / 2]


fault(
    quantized_grouped_linear,
    "the odd element is read from the high nibble",
    changed(quantized_grouped_linear, weight=nibbles_swapped),
    mutant="nibbles_swapped",
)
fault(
    quantized_grouped_linear,
    "every expert has the last one's scales",
    changed(quantized_grouped_linear, scale=lambda a: a["scale"][-1:].expand_as(a["scale"])),
    mutant="scale_of_the_last",
)
fault(
    quantized_grouped_linear,
    "an expert's last row goes to the next expert",
    changed(quantized_grouped_linear, counts=boundary),
    mutant="boundary_off_by_one",
)
fault(
    quantized_grouped_linear,
    "the gradient of rows is the first expert's for all",
    backward_only(
        quantized_grouped_linear,
        changed(
            quantized_grouped_linear,
            weight=lambda a: a["weight"][:1].expand_as(a["weight"]),
        ),
    ),
    mutant="gradient_of_first_expert",
)
