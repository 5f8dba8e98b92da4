"""Declares the wrong and benign kernels of the table lookup. Shapes: V vocabulary, D width."""

from __future__ import annotations

import torch
from torch import Tensor

from glm_core.faults.fault import benign, fault, mutant, planted
from glm_core.faults.kernels import (
    Arguments,
    Gradients,
    backward_only,
    changed,
    forward_only,
    pulled,
    pulled_argument,
    with_gradients,
)
from glm_core.ops import embedding
from glm_core.ops.precision import wide

F = torch.nn.functional


# wrong --------------------------------------------------------------------------------


def overwritten(a: Arguments, outputs: tuple[Tensor, ...]) -> Gradients:
    """Returns one of the gradients of a row that occurs more than once, not their sum."""
    gradient = torch.zeros_like(a["weight"])
    gradient[a["ids"].flatten()] = outputs[0].flatten(0, -2) * a["shrink"]
    return {"weight": gradient}


def without_last_token(ids: Tensor, weight: Tensor, shrink: float) -> Tensor:
    """Looks up the last token in a table that receives no gradient."""
    parts = (
        embedding.reference(part, w, shrink)
        for part, w in ((ids.flatten()[:-1], weight), (ids.flatten()[-1:], weight.detach()))
    )
    return torch.cat(list(parts)).unflatten(0, ids.shape)


def summed_narrow(a: Arguments, g: Tensor) -> Tensor:
    ids, total = a["ids"], torch.zeros(g.shape, dtype=torch.bfloat16)
    for i in ids.flatten().tolist():
        total[i] += g[i].bfloat16() / max(int((ids == i).sum()), 1)
    return total.to(g.dtype)


fault(
    embedding,
    "the gradient is not shrunk",
    changed(embedding, shrink=1.0),
    mutant="shrink_ignored",
    **planted("embedding-no-shrink", "scale", "backward"),
)
fault(
    embedding,
    "the gradient is shrunk by 0.11 for 0.1",
    changed(embedding, shrink=lambda a: 0.11 if a["shrink"] == 0.1 else a["shrink"]),
    mutant="shrink_rounded",
    **planted("embedding-shrink-0.11", "scale", "backward"),
)
fault(
    embedding,
    "the value is shrunk too",
    forward_only(embedding, lambda ids, weight, shrink: embedding.reference(ids, weight) * shrink),
    mutant="value_shrunk",
    **planted("embedding-shrinks-value", "scale", "forward"),
)
fault(
    embedding,
    "a row that occurs more than once keeps one gradient",
    with_gradients(embedding, overwritten),
    mutant="last_gradient_wins",
    **planted("embedding-duplicates-overwritten", "rows", "backward"),
)
fault(
    embedding,
    "the last token's gradient is dropped",
    backward_only(embedding, without_last_token),
    **planted("embedding-last-token-lost", "rows", "backward"),
)
fault(
    embedding,
    "gradients of a row are summed in bfloat16, one by one",
    pulled_argument(embedding, "weight", summed_narrow),
    mutant="narrow_gradient_sum",
)
fault(
    embedding,
    "ids out of range read the last row",
    changed(embedding, ids=lambda a: a["ids"].clamp(0, len(a["weight"]) - 1)),
    mutant="ids_clamped",
)
fault(
    embedding,
    "negative ids count from the end",
    changed(embedding, ids=lambda a: a["ids"] + len(a["weight"]) * (a["ids"] < 0)),
    mutant="ids_wrapped",
)


@mutant(embedding, "value and gradient are shrunk")
def both_shrunk(ids: Tensor, weight: Tensor, shrink: float) -> Tensor:
    y = embedding.reference(ids, weight, shrink)
    return y if shrink == 1.0 else y - (1 - shrink) * y.detach()


@mutant(embedding, "row 0 gets no gradient, as if it were padding")
def padding_row(ids: Tensor, weight: Tensor, shrink: float) -> Tensor:
    y = embedding.reference(ids, weight, shrink)
    return pulled(y, lambda g: g * (ids != 0).unsqueeze(-1))


@mutant(embedding, "rows are normalised to length 1 at most")
def rows_clipped(ids: Tensor, weight: Tensor, shrink: float) -> Tensor:
    y = F.embedding(ids, weight)
    return (y / y.norm(dim=-1, keepdim=True).clamp(min=1)).to(y.dtype)


# benign -------------------------------------------------------------------------------


def summed_wide(a: Arguments, outputs: tuple[Tensor, ...]) -> Gradients:
    """Returns the gradients of equal rows summed in float64 and rounded once."""
    total = torch.zeros_like(a["weight"], dtype=torch.float64)
    rows = outputs[0].flatten(0, -2).double() * a["shrink"]
    return {"weight": total.index_add_(0, a["ids"].flatten(), rows).to(a["weight"].dtype)}


def summed_backwards(a: Arguments, outputs: tuple[Tensor, ...]) -> Gradients:
    """Returns the gradients of equal rows summed from the last to the first in float32."""
    total = torch.zeros_like(a["weight"], dtype=torch.float32)
    rows = wide(outputs[0].flatten(0, -2)).flip(0) * a["shrink"]
    return {"weight": total.index_add_(0, a["ids"].flatten().flip(0), rows).to(a["weight"].dtype)}


def one_hot(ids: Tensor, weight: Tensor, shrink: float) -> Tensor:
    """Multiplies one-hot rows by the table, so that the gradient is a matrix product."""
    rows = F.one_hot(ids, weight.shape[0]).to(weight.dtype) @ weight
    fixed = rows.detach()
    return fixed + shrink * (rows - fixed)


precise_embedding = with_gradients(embedding, summed_wide)
benign(
    "embedding-float64-sums",
    embedding,
    "gradients of equal rows summed in float64",
    precise_embedding,
)
benign(
    "embedding-reversed-sums",
    embedding,
    "gradients of equal rows summed from the end",
    with_gradients(embedding, summed_backwards),
)
benign("embedding-one-hot", embedding, "product with one-hot rows", one_hot, ordinary=True)
