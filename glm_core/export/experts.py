"""Translates the ops of a layer of experts to ONNX, by the formulas of their references, in
float32. Each expert's product is a node of its own, so that a call reads the weights of the
experts that it uses. A weight is stored once, as it is.

Shapes: N tokens, T experts chosen for a token, M = N T rows, D width, F output width, X experts, G
groups of experts. N and M are known only at run time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glm_core.export.graph import ELEMENT, Graph
from glm_core.export.value import Value
from glm_core.ops.routing import TINY

_FLOAT, _INT64 = ELEMENT[torch.float32], ELEMENT[torch.int64]


def route(
    x: Value,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    groups: int,
    top_groups: int,
    scale: float,
    normalize: bool,
) -> tuple[Value, Value]:
    """Relies on ONNX's TopK, which puts the lower index first where values are equal."""
    g = x.graph
    logits = x.like(g.node("Gemm", x.name, g.tensor(weight), transB=1), (0, len(weight)))
    scores = logits.unary("Sigmoid")
    biased = scores + bias
    if top_groups < groups:
        biased = _without_other_groups(biased, groups, top_groups)
    _, places = g.nodes("TopK", 2, biased.name, g.ints(top_k), axis=-1)
    weights = x.like(g.node("GatherElements", scores.name, places, axis=1), (0, top_k))
    if normalize:
        total = x.like(g.node("ReduceSum", weights.name, g.ints(-1), keepdims=1), (0, 1))
        weights = weights / (total + TINY)
    return x.like(places, (0, top_k), torch.int64), weights * scale


def _without_other_groups(scores: Value, groups: int, top_groups: int) -> Value:
    """Sets the scores of all but the best groups to minus infinity."""
    g, experts = scores.graph, scores.shape[1]
    size = experts // groups
    by_group = scores.like(
        g.node("Reshape", scores.name, g.ints(-1, groups, size)), (0, groups, size)
    )
    best, _ = g.nodes("TopK", 2, by_group.name, g.ints(min(2, size)), axis=-1)
    sums = g.node("ReduceSum", best, g.ints(-1), keepdims=0)  # [N, G]
    _, kept = g.nodes("TopK", 2, sums, g.ints(top_groups), axis=-1)
    lanes = g.tensor(torch.arange(groups)[:, None])  # [G, 1]
    hits = g.node("Equal", g.node("Unsqueeze", kept, g.ints(1)), lanes)  # [N, G, top_groups]
    any_hit = g.node("ReduceMax", g.node("Cast", hits, to=_FLOAT), g.ints(-1), keepdims=1)
    stays = g.node("Greater", any_hit, g.number(0.0))  # [N, G, 1]
    masked = g.node("Where", stays, by_group.name, g.number(-torch.inf))
    return scores.like(g.node("Reshape", masked, g.ints(-1, experts)), scores.shape)


def permute(x: Value, experts: Value, num_experts: int) -> tuple[Value, Value, Value]:
    g, width = x.graph, x.shape[1]
    places = g.node("Reshape", experts.name, g.ints(-1))  # [M]
    # ascending, and the lower index first where values are equal: a stable sort
    _, order = g.nodes("TopK", 2, places, g.node("Shape", places), axis=0, largest=0)
    token = g.node("Div", order, g.tensor(torch.tensor(experts.shape[1])))
    rows = x.like(g.node("Gather", x.name, token, axis=0), (0, width))
    own = g.node("Equal", g.node("Unsqueeze", places, g.ints(1)), g.ints(*range(num_experts)))
    counts = g.node("ReduceSum", g.node("Cast", own, to=_INT64), g.ints(0), keepdims=0)
    return (
        rows,
        x.like(order, (0,), torch.int64),
        x.like(counts, (num_experts,), torch.int64),
    )


def unpermute(rows: Value, order: Value, weights: Value) -> Value:
    g, (_, top_k), width = rows.graph, weights.shape, rows.shape[1]
    count = g.node("Squeeze", g.node("Shape", order.name))
    numbers = (g.tensor(torch.tensor(n)) for n in (0, 1))
    first, step = numbers
    places = g.node("Range", first, count, step)
    back = g.node("ScatterElements", order.name, order.name, places, axis=0)  # [M]
    each = g.node("Gather", rows.name, back, axis=0)
    each = g.node("Reshape", each, g.ints(-1, top_k, width))  # [N, T, D]
    weighted = g.node("Mul", each, weights.unsqueeze(2).name)
    return rows.like(g.node("ReduceSum", weighted, g.ints(1), keepdims=0), (0, width))


def grouped_linear(rows: Value, weight: Tensor, counts: Value) -> Value:
    """Multiplies each expert's rows, none or more, by its weight as it is stored."""

    def product(part: Value, e: int) -> str:
        g = rows.graph
        return g.node("Gemm", part.name, g.derived(weight, str(e), lambda: weight[e]), transB=1)

    return by_expert(rows, counts, weight.shape[1], product)


def by_expert(
    rows: Value, counts: Value, outputs: int, product: Callable[[Value, int], str]
) -> Value:
    """Returns `product` of each expert's rows, one under the other, [M, F]."""
    g: Graph = rows.graph
    [experts] = counts.shape
    names = g.nodes("Split", experts, rows.name, counts.name, axis=0)
    parts = [product(rows.like(name, rows.shape), e) for e, name in enumerate(names)]
    return rows.like(g.node("Concat", *parts, axis=0), (0, outputs))
