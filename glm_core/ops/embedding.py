"""Declares the table lookup, with GLM-130B's gradient shrink.

Shapes: V vocabulary, D width."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from glm_core.dispatch import op
from glm_core.ops.layout import gapped
from glm_core.ops.precision import wide
from glm_core.spec import Cost, Maker, Sample, exact, integers, normal


def embedding_samples() -> Iterator[Sample]:
    yield Sample("2x5-50x96", {"ids": integers(0, 50, 2, 5), "weight": normal(50, 96)})
    yield Sample(
        "2x5-50x96-shrink", {"ids": integers(0, 50, 2, 5), "weight": normal(50, 96), "shrink": 0.1}
    )
    repeated = exact([[3, 3, 3], [0, 6, 3]], torch.int64)
    yield Sample("repeated-7x33", {"ids": repeated, "weight": normal(7, 33), "shrink": 0.5})
    every_other: Maker = lambda draw: integers(0, 9, 3, 8)(draw)[:, ::2]  # noqa: E731
    yield Sample("3x4-9x33-strided", {"ids": every_other, "weight": normal(9, 33, strided=True)})
    yield Sample("5-9x7-gapped", gapped({"ids": integers(0, 9, 5), "weight": normal(9, 7)}))
    yield Sample("40-3x16", {"ids": integers(0, 3, 40), "weight": normal(3, 16), "shrink": 0.1})
    yield Sample("2x5-50x7-tiny", {"ids": integers(0, 50, 2, 5), "weight": normal(50, 7, std=1e-6)})
    yield Sample("2x5-50x7-huge", {"ids": integers(0, 50, 2, 5), "weight": normal(50, 7, std=1e4)})
    yield Sample("1-1x1", {"ids": exact([0], torch.int64), "weight": normal(1, 1)})
    yield Sample("0-9x8", {"ids": exact([], torch.int64), "weight": normal(9, 8)})
    yield Sample(
        "1025-257x65", {"ids": integers(0, 257, 1025), "weight": normal(257, 65)}, large=True
    )
    yield Sample(
        "16-65024x128", {"ids": integers(0, 65024, 16), "weight": normal(65024, 128)}, real=True
    )


def embedding_cost(ids: Tensor, weight: Tensor, shrink: float = 1.0) -> Cost:
    rows = ids.numel() * weight.shape[1]
    moved = 2 * rows * weight.element_size() + ids.numel() * 8
    return Cost(0, moved, 2 * rows, moved + weight.numel() * weight.element_size())


@op(samples=embedding_samples, cost=embedding_cost, differentiable=("weight",))
def embedding(ids: Tensor, weight: Tensor, shrink: float = 1.0) -> Tensor:
    """Computes y = weight[ids]; the gradient of weight is multiplied by `shrink`, and rows that
    occur more than once sum their gradients.

    Shapes: ids [...] int64, weight [V, D] -> [..., D]. The value is exact in every dtype.
    Accumulates in float32: the gradient of weight, over the positions of a row. Source: Zeng et al.
    2022 (GLM-130B), section 2.2, embedding gradient shrink."""
    differentiated = torch.is_grad_enabled() and weight.requires_grad
    y = torch.nn.functional.embedding(ids, wide(weight) if differentiated else weight)
    if shrink != 1.0:
        fixed = y.detach()
        y = fixed + shrink * (y - fixed)  # y - fixed is exactly zero: the value keeps every bit
    return y.to(weight.dtype)
