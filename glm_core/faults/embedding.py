"""Wrong table lookups. Shapes: V vocabulary, D width."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from glm_core.faults.mutant import mutant, pulled
from glm_core.ops import embedding


@mutant(embedding, wrong="the gradient is not shrunk")
def shrink_ignored(ids: Tensor, weight: Tensor, shrink: float = 1.0) -> Tensor:
    return embedding.reference(ids, weight)


@mutant(embedding, wrong="the value is shrunk, not its gradient")
def value_shrunk(ids: Tensor, weight: Tensor, shrink: float = 1.0) -> Tensor:
    return embedding.reference(ids, weight) * shrink


@mutant(embedding, wrong="value and gradient are shrunk")
def both_shrunk(ids: Tensor, weight: Tensor, shrink: float = 1.0) -> Tensor:
    y = embedding.reference(ids, weight, shrink)
    return y if shrink == 1.0 else y - (1 - shrink) * y.detach()


@mutant(embedding, wrong="the gradient is shrunk by 0.11 for 0.1")
def shrink_rounded(ids: Tensor, weight: Tensor, shrink: float = 1.0) -> Tensor:
    return embedding.reference(ids, weight, 0.11 if shrink == 0.1 else shrink)


@mutant(embedding, wrong="of rows that occur more than once the last gradient wins")
def last_gradient_wins(ids: Tensor, weight: Tensor, shrink: float = 1.0) -> Tensor:
    rows = ids.flatten()
    later = (rows[None] == rows[:, None]).triu(1).any(1)  # this row comes again
    y = embedding.reference(ids, weight, shrink)
    return pulled(y, lambda g: g * ~later.view(ids.shape).unsqueeze(-1))


@mutant(embedding, wrong="row 0 gets no gradient, as if it were padding")
def padding_row(ids: Tensor, weight: Tensor, shrink: float = 1.0) -> Tensor:
    y = embedding.reference(ids, weight, shrink)
    return pulled(y, lambda g: g * (ids != 0).unsqueeze(-1))


@mutant(embedding, wrong="gradients of a row are summed in bfloat16, one by one")
def narrow_gradient_sum(ids: Tensor, weight: Tensor, shrink: float = 1.0) -> Tensor:
    y = embedding.reference(ids, weight, shrink)

    def pull(g: Tensor) -> Tensor:
        total = torch.zeros(g.shape, dtype=torch.bfloat16)
        for i in ids.flatten().tolist():
            total[i] += g[i].bfloat16() / max(int((ids == i).sum()), 1)
        return total.to(g.dtype)

    return embedding.reference(ids, pulled(weight, pull), shrink) if weight.requires_grad else y


@mutant(embedding, wrong="ids out of range read the last row")
def ids_clamped(ids: Tensor, weight: Tensor, shrink: float = 1.0) -> Tensor:
    return embedding.reference(ids.clamp(0, len(weight) - 1), weight, shrink)


@mutant(embedding, wrong="negative ids count from the end")
def ids_wrapped(ids: Tensor, weight: Tensor, shrink: float = 1.0) -> Tensor:
    return embedding.reference(torch.where(ids < 0, ids + len(weight), ids), weight, shrink)


@mutant(embedding, wrong="rows are normalised to length 1 at most")
def rows_clipped(ids: Tensor, weight: Tensor, shrink: float = 1.0) -> Tensor:
    y = functional.embedding(ids, weight)
    longest = y.norm(dim=-1, keepdim=True).clamp(min=1)
    return (y / longest).to(y.dtype)
