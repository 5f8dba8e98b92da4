"""Brings tokens into the experts' order and back, and chooses the experts, in Triton. Sums have one
order: nothing is added by atomics. Needs triton.

Shapes: N tokens, T experts chosen for a token, M = N T rows, D width, X experts, G groups; XP, TP
and GP are the powers of two that hold X, T and G."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm_core.backends.cuda.grouped_product import times_experts
from glm_core.errors import ShapeError
from glm_core.ops.routing import TINY

Two = tuple[Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]
COLUMNS = 1024
"""columns of a row that a program takes at a time"""


@triton.jit
def take_rows(x, order, y, width, top_k, BLOCK: tl.constexpr):
    """Writes BLOCK columns of row i of y [M, D], the token order[i] // T of x [N, D]."""
    i = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(order + i) // top_k
    row = tl.load(x + token * width + d, mask=d < width, other=0.0)
    tl.store(y + i * width + d, row, mask=d < width)


@triton.jit
def add_rows(rows, back, weights, y, width, top_k, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """Writes BLOCK columns of one token of y [N, D]: the sum of its rows, in the order of its
    choices, times its weights where WEIGHTED. Choice j of token t is row back[t T + j]."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for j in range(0, top_k):
        row = tl.load(back + t * top_k + j)
        part = tl.load(rows + row * width + d, mask=d < width, other=0.0).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(weights + t * top_k + j)
        acc += part
    tl.store(y + t * width + d, acc.to(y.dtype.element_ty), mask=d < width)


@triton.jit
def spread_rows(dy, rows, order, weights, drows, dweights, width, top_k, BLOCK: tl.constexpr):
    """Writes the gradients of `add_rows` for row i: drows = weight dy, dweight = sum over D of dy
    row."""
    i = tl.program_id(0).to(tl.int64)
    place = tl.load(order + i)
    weight = tl.load(weights + place)
    acc = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        d = first + tl.arange(0, BLOCK)
        g = tl.load(dy + place // top_k * width + d, mask=d < width, other=0.0).to(tl.float32)
        acc += g * tl.load(rows + i * width + d, mask=d < width, other=0.0).to(tl.float32)
        tl.store(drows + i * width + d, (g * weight).to(drows.dtype.element_ty), mask=d < width)
    tl.store(dweights + place, tl.sum(acc, 0))


@triton.jit
def best(values, free):
    """Returns the first place of the largest of the values that are free. NaN is the largest, as in
    torch.sort."""
    i = tl.arange(0, values.shape[0])
    values = tl.where(values == values, values, float("inf"))
    top = tl.max(tl.where(free, values, float("-inf")), 0)
    return tl.min(tl.where(free & (values == top), i, values.shape[0] - 1), 0)


@triton.jit
def choose_experts(
    logits,
    bias,
    chosen,
    weights,
    scores,
    experts,
    top_k,
    groups,
    top_groups,
    scale,
    tiny,
    NORMALIZE: tl.constexpr,
    GROUPED: tl.constexpr,
    XP: tl.constexpr,
    TP: tl.constexpr,
    GP: tl.constexpr,
):
    """Writes the experts of one token, their weights and their scores, from logits [N, X]."""
    t = tl.program_id(0).to(tl.int64)
    x = tl.arange(0, XP)
    j = tl.arange(0, TP)
    real = x < experts
    s = tl.load(logits + t * experts + x, mask=real, other=0.0)
    s = 1.0 / (1.0 + tl.exp(-s))
    biased = s + tl.load(bias + x, mask=real, other=0.0)
    if GROUPED:
        size = experts // groups
        lane = tl.arange(0, GP)
        sums = tl.zeros((GP,), tl.float32)
        for g in range(0, groups):
            mine = real & (x // size == g)
            first = best(biased, mine)
            rest = mine & (x != first)
            total = tl.sum(tl.where(x == first, biased, 0.0), 0)
            second = tl.sum(tl.where(x == best(biased, rest), biased, 0.0), 0)
            total += tl.where(size > 1, second, 0.0)
            sums = tl.where(lane == g, total, sums)
        left = lane < groups
        kept = x < 0
        for _n in range(0, top_groups):
            g = best(sums, left)
            left = left & (lane != g)
            kept = kept | (x // size == g)
        real = real & kept
    places = tl.zeros((TP,), tl.int64)
    own = tl.zeros((TP,), tl.float32)
    for i in range(0, top_k):
        place = tl.minimum(best(biased, real), experts - 1)
        real = real & (x != place)
        places = tl.where(j == i, place.to(tl.int64), places)
        own = tl.where(j == i, tl.sum(tl.where(x == place, s, 0.0), 0), own)
    share = own
    if NORMALIZE:
        share = own / (tl.sum(own, 0) + tiny)
    at = t * top_k + j
    tl.store(chosen + at, places, mask=j < top_k)
    tl.store(weights + at, share * scale, mask=j < top_k)
    tl.store(scores + at, own, mask=j < top_k)


@triton.jit
def choice_gradient(
    dweights,
    chosen,
    scores,
    dlogits,
    experts,
    top_k,
    scale,
    tiny,
    NORMALIZE: tl.constexpr,
    XP: tl.constexpr,
    TP: tl.constexpr,
):
    """Writes one token of dlogits [N, X], zero but for its experts. With S the sum of the scores s:
    ds = (g - sum(g s) / S) / S, dlogit = ds s (1 - s)."""
    t = tl.program_id(0).to(tl.int64)
    x = tl.arange(0, XP)
    j = tl.arange(0, TP)
    at = t * top_k + j
    g = tl.load(dweights + at, mask=j < top_k, other=0.0) * scale
    s = tl.load(scores + at, mask=j < top_k, other=0.0)
    if NORMALIZE:
        total = tl.sum(s, 0) + tiny
        g = (g - tl.sum(g * (s / total), 0)) / total
    g = g * s * (1.0 - s)
    place = tl.load(chosen + at, mask=j < top_k, other=-1)
    row = tl.sum(tl.where(place[:, None] == x[None, :], g[:, None], 0.0), 0)
    tl.store(dlogits + t * experts + x, row, mask=x < experts)


def _inverse(order: Tensor) -> Tensor:
    """Returns where each place of a permutation went: out[order[i]] = i."""
    places = torch.arange(len(order), device=order.device)
    return torch.zeros_like(order).scatter_(0, order, places)


def _blocks(width: int) -> tuple[int, int]:
    """Returns how many blocks of columns a row has, and their size."""
    block = min(COLUMNS, triton.next_power_of_2(max(width, 1)))
    return triton.cdiv(width, block), block


def permute_forward(x: Tensor, experts: Tensor, num_experts: int) -> Three:
    """Returns rows [M, D], order [M] and counts [X]."""
    if x.dim() != 2 or experts.dim() != 2 or len(x) != len(experts):
        raise ShapeError(
            f"permute: x [N, D] needs experts [N, T]; received x {tuple(x.shape)}, experts "
            f"{tuple(experts.shape)}"
        )
    x, places = x.contiguous(), experts.reshape(-1)
    known = ((places >= 0) & (places < num_experts)).all()
    torch._assert_async(known, "permute: an expert is out of range")
    values, order = torch.sort(places, stable=True)
    every = torch.arange(num_experts, device=x.device)
    ends = torch.searchsorted(values, every, right=True)
    counts = ends.diff(prepend=ends.new_zeros(1))
    rows = x.new_empty(len(order), x.shape[1])
    if rows.numel():
        blocks, block = _blocks(x.shape[1])
        with torch.cuda.device_of(x):
            take_rows[len(order), blocks](x, order, rows, x.shape[1], experts.shape[1], BLOCK=block)
    return rows, order, counts


def permute_backward(drows: Tensor, order: Tensor, tokens: int) -> Tensor:
    """Returns dx [N, D]."""
    return _added(drows.contiguous(), order, None, tokens)


def unpermute_forward(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Returns y [N, D]."""
    if not len(rows) == len(order) == weights.numel():
        raise ShapeError(
            f"unpermute: weights [N, T] need N T rows and places; received rows "
            f"{tuple(rows.shape)}, order {tuple(order.shape)}, weights {tuple(weights.shape)}"
        )
    return _added(rows.contiguous(), order, weights.contiguous(), len(weights))


def _added(rows: Tensor, order: Tensor, weights: Tensor | None, tokens: int) -> Tensor:
    y = rows.new_empty(tokens, rows.shape[1])
    if y.numel():
        blocks, block = _blocks(y.shape[1])
        more, factors = weights is not None, rows if weights is None else weights
        args = (rows, _inverse(order), factors, y, y.shape[1], len(order) // tokens)
        with torch.cuda.device_of(rows):
            add_rows[tokens, blocks](*args, WEIGHTED=more, BLOCK=block)
    return y


def unpermute_backward(dy: Tensor, rows: Tensor, order: Tensor, weights: Tensor) -> Two:
    """Returns drows and dweights."""
    dy, rows, order, weights = (t.contiguous() for t in (dy, rows, order, weights))
    drows, dweights = torch.empty_like(rows), torch.empty_like(weights)
    if len(rows):
        _, block = _blocks(rows.shape[1])
        with torch.cuda.device_of(rows):
            spread_rows[(len(rows),)](
                *(dy, rows, order, weights, drows, dweights, rows.shape[1], weights.shape[1]),
                BLOCK=block,
            )
    return drows, dweights


def route_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    groups: int,
    top_groups: int,
    scale: float,
    normalize: bool,
) -> Three:
    """Returns experts, weights and scores, each [N, T]. The logits are products of float32 whatever
    torch allows its own products to be."""
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ShapeError(
            f"route: x [N, D] needs weight [X, D]; received x {tuple(x.shape)}, weight "
            f"{tuple(weight.shape)}"
        )
    one = torch.full((1,), len(x), dtype=torch.int64, device=x.device)
    logits = times_experts(x.float(), weight[None], one)
    chosen = torch.empty(len(x), top_k, dtype=torch.int64, device=x.device)
    weights, scores = (bias.new_empty(len(x), top_k) for _ in range(2))
    if len(x):
        sizes = (len(weight), top_k, groups, top_groups, scale, TINY)
        powers = (_power(n) for n in (len(weight), top_k, groups))
        with torch.cuda.device_of(x):
            choose_experts[(len(x),)](
                *(logits, bias.contiguous(), chosen, weights, scores, *sizes),
                *(normalize, top_groups < groups, *powers),
            )
    return chosen, weights, scores


def _power(n: int) -> int:
    return int(max(2, triton.next_power_of_2(n)))


def route_backward(
    dweights: Tensor,
    experts: Tensor,
    scores: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: float,
    normalize: bool,
) -> Two:
    """Returns dx and dweight."""
    dlogits = weight.new_empty(len(x), len(weight))
    if len(x):
        with torch.cuda.device_of(x):
            choice_gradient[(len(x),)](
                *(dweights.contiguous(), experts, scores, dlogits),
                *(len(weight), scores.shape[1], scale, TINY),
                *(normalize, _power(len(weight)), _power(scores.shape[1])),
            )
    return (dlogits @ weight).to(x.dtype), dlogits.t() @ x.float()
