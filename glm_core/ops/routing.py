"""Declares the router of a mixture of experts: which experts a token goes to, and with which
weights.

Shapes: N tokens, D width, X experts, G groups of X / G experts, T experts chosen for a token."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from glm_core.choice import Choice
from glm_core.dispatch import op
from glm_core.errors import ShapeError
from glm_core.ops.layout import gapped
from glm_core.ops.precision import num_bytes, wide
from glm_core.spec import Cost, Sample, exact, normal

EDGE = 2
"""ranks on each side of the last chosen expert whose scores may all come close at once"""
TINY = 1e-20
"""added to the sum that weights are divided by, as in DeepSeek-V3's code"""


def route_samples() -> Iterator[Sample]:
    def make(
        id: str,
        tokens: int,
        width: int,
        experts: int,
        top_k: int,
        groups: tuple[int, int] = (1, 1),
        std: float = 1.0,
        strided: bool = False,
        bias: float = 0.2,
        scale: float = 1.0,
        normalize: bool = True,
    ) -> Sample:
        args = {
            "x": normal(tokens, width, std=std, strided=strided),
            "weight": normal(experts, width, std=width**-0.5, strided=strided, wide=True),
            "bias": normal(experts, std=bias, wide=True),
            "top_k": top_k,
            "groups": groups[0],
            "top_groups": groups[1],
            "scale": scale,
            "normalize": normalize,
        }
        return Sample(id, args, real="2048" in id)

    yield make("6x16-8-top2", 6, 16, 8, 2, scale=1.8)
    yield make("9x33-15-top4-groups5of3", 9, 33, 15, 4, (5, 3), scale=2.5)
    yield make("5x24-12-top3-unnormalised-strided", 5, 24, 12, 3, strided=True, normalize=False)
    yield make("7x16-9-top1", 7, 16, 9, 1, bias=1.0)  # the bias decides most choices
    yield Sample("5x33-8-top2-groups4of2-gapped", gapped(make("", 5, 33, 8, 2, (4, 2)).args))
    yield make("1x1-1-top1", 1, 1, 1, 1)
    yield make("0x16-8-top2", 0, 16, 8, 2)
    yield make("6x16-8-top2-tiny", 6, 16, 8, 2, std=1e-3)
    yield make("6x16-8-top2-huge", 6, 16, 8, 2, std=30.0)
    yield Sample("4x2-12-top3-groups4of2-tied", _tied())
    large = make("", 1025, 65, 36, 5, (6, 3), strided=True).args
    yield Sample("1025x65-36-top5-groups6of3", large, large=True)
    yield make("64x2048-64-top4", 64, 2048, 64, 4, scale=1.8)  # GLM-4.7-Flash


def _tied() -> dict[str, Any]:
    """Returns arguments whose logits are exact in any order of summation, and mostly equal."""
    rows = [[0.5, 0.25]] * 5 + [[1.0, 0.5]] * 2 + [[0.5, 0.25]] * 5
    fixed = {"top_k": 3, "groups": 4, "top_groups": 2, "scale": 1.5, "normalize": True}
    tokens = [[0.0, 0.0], [1.0, 2.0], [-1.0, 0.5], [-2.0, -1.0]]

    def x(draw: Any) -> Tensor:
        return exact(tokens, draw.dtype)(draw)

    def wide_values(values: Any) -> Any:
        return lambda draw: exact(values, torch.promote_types(draw.dtype, torch.float32))(draw)

    return {"x": x, "weight": wide_values(rows), "bias": wide_values([0.25] * 12), **fixed}


def route_cost(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    normalize: bool = True,
) -> Cost:
    """Counts the product and four operations a score; choosing is counted as none."""
    tokens, experts = len(x), len(weight)
    product = 2 * x.numel() * experts
    moved, chosen = num_bytes(x, weight, bias), tokens * top_k * (8 + 4)
    flops = product + 4 * tokens * experts
    return Cost(flops, moved + chosen, 2 * product, 2 * num_bytes(x, weight) + chosen)


def _scores(x: Tensor, weight: Tensor) -> Tensor:
    """Returns the sigmoid of the logits [N, X], in float32 at least."""
    a = wide(x)
    return torch.sigmoid(torch.nn.functional.linear(a, weight.to(a.dtype)))


def _biased(x: Tensor, weight: Tensor, bias: Tensor, **_: Any) -> Tensor:
    scores = _scores(x, weight).detach()
    return scores + bias.detach().to(scores.dtype)


def _ranked(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns values and places from the largest to the smallest; equal ones keep their order."""
    return torch.sort(x, dim=-1, descending=True, stable=True)


def _group_scores(scores: Tensor, groups: int) -> Tensor:
    """Returns the sum of each group's two best scores [N, G]."""
    by_group = scores.unflatten(-1, (groups, -1))  # [N, G, X / G]
    return _ranked(by_group)[0][..., :2].sum(-1)


def _choose(scores: Tensor, top_k: int, groups: int, top_groups: int) -> Tensor:
    """Returns the experts [N, T] of each token, the best first."""
    if top_groups < groups:
        scores = _within(
            scores, _ranked(_group_scores(scores, groups))[1][..., :top_groups], groups
        )
    return _ranked(scores)[1][..., :top_k]


def _within(scores: Tensor, kept: Tensor, groups: int) -> Tensor:
    """Returns the scores [N, X], -inf for experts outside the groups `kept`."""
    dropped = torch.ones(len(scores), groups, dtype=torch.bool, device=scores.device)
    dropped = dropped.scatter(-1, kept, torch.zeros_like(kept, dtype=torch.bool))  # [N, G]
    by_group = scores.unflatten(-1, (groups, -1))  # [N, G, X / G]
    return by_group.masked_fill(dropped[..., None], -torch.inf).flatten(-2)  # [N, X]


def _others(
    scores: Tensor, top_k: int, groups: int = 1, top_groups: int = 1, **_: Any
) -> Iterator[Tensor]:
    """Yields choices [N, T] in which the last one or two experts give way to the next ones, within
    the best groups and with the next group in place of the last. See Choice."""
    ranked = [_ranked(scores)[1]]
    if top_groups < groups:
        order = _ranked(_group_scores(scores, groups))[1]
        following = torch.cat((order[..., : top_groups - 1], order[..., top_groups, None]), -1)
        within = [_within(scores, kept, groups) for kept in (order[..., :top_groups], following)]
        ranked = [_ranked(own)[1] for own in within]
    last = min(EDGE, top_k)
    window = range(top_k - last, min(top_k + EDGE, scores.shape[-1]))
    for own in ranked:
        for places in combinations(window, last):
            yield torch.cat((own[..., : top_k - last], own[..., list(places)]), -1)


def check_choice(experts: int, top_k: int, groups: int, top_groups: int) -> None:
    """Raises ShapeError where so many experts, in such groups, cannot be chosen from."""
    if groups < 1 or experts % groups:
        raise ShapeError(f"route: groups={groups} must divide the {experts} experts")
    if not 1 <= top_groups <= groups:
        raise ShapeError(f"route: top_groups must be 1 ... groups={groups}; received {top_groups}")
    most = experts // groups * top_groups
    if not 1 <= top_k <= most:
        raise ShapeError(
            f"route: top_k must be 1 ... {most}, the experts in {top_groups} of {groups} groups; "
            f"received {top_k}"
        )


def shortfall(
    scores: Tensor,
    slack: Tensor,
    chosen: Tensor,
    top_k: int,
    groups: int = 1,
    top_groups: int = 1,
    **_: Any,
) -> Tensor:
    """Returns for each token [N] how far its choice is from the best, see Choice. A group near the
    edge of the kept ones may count as kept or dropped."""
    own, give = scores.gather(-1, chosen), slack.gather(-1, chosen)  # [N, T]
    index = torch.arange(scores.shape[-1], device=scores.device)
    taken = (chosen[..., None] == index).any(-2)  # [N, X]
    surely, maybe = _kept(scores, slack, groups, top_groups)  # [N, X]
    strange = (taken & ~maybe).any(-1) | (taken.sum(-1) < top_k)
    gap = scores[..., None, :] - own[..., None]  # [N, T, X]
    units = gap / (slack[..., None, :] + give[..., None])
    units = units.masked_fill((gap == 0) & (index < chosen[..., None]), torch.inf)
    units = units.masked_fill((gap == 0) & (index >= chosen[..., None]), 0.0)
    later = ~taken[..., None, :] & surely[..., None, :]
    after = (chosen[..., None, :] == index[:, None]).int().argmax(-1)  # [N, X]: place if taken
    place = torch.arange(chosen.shape[-1], device=scores.device)[:, None]  # [T, 1]
    later = later | (taken[..., None, :] & (after[..., None, :] > place))
    worst = units.masked_fill(~later, 0.0).amax((-2, -1)) if units.numel() else own.sum(-1)
    return worst.masked_fill(strange, torch.inf)


def _kept(scores: Tensor, slack: Tensor, groups: int, top_groups: int) -> tuple[Tensor, Tensor]:
    """Returns which experts' groups are kept whatever the rounding, and which may be [N, X]."""
    if top_groups == groups:
        return (torch.ones_like(scores, dtype=torch.bool),) * 2
    sums = _group_scores(scores, groups)
    ranked = _ranked(sums)[0]
    give = 4 * slack.unflatten(-1, (groups, -1)).amax(-1).amax(-1, keepdim=True)  # [N, 1]
    cut, following = ranked[..., top_groups - 1, None], ranked[..., top_groups, None]
    place = _ranked(_ranked(sums)[1].neg())[1]  # a group's rank, equal sums in order
    exact_tie = cut == following
    surely = torch.where(exact_tie, place < top_groups, sums > following + give)
    maybe = torch.where(exact_tie, place < top_groups, sums >= cut - give)
    size = scores.shape[-1] // groups
    return surely.repeat_interleave(size, -1), maybe.repeat_interleave(size, -1)


def _gaps(scores: Tensor, top_k: int, groups: int = 1, top_groups: int = 1, **_: Any) -> Tensor:
    """Returns for each token the distances [N, K] between neighbouring scores, down to the first
    expert that is left out, and that between the last group kept and the next, over sqrt(2): its
    scores are sums of two. See Choice."""
    kept = _kept(scores, torch.zeros_like(scores), groups, top_groups)[0]
    ranked = _ranked(scores.masked_fill(~kept, -torch.inf))[0][..., : top_k + 1]
    found = [ranked[..., :-1] - ranked[..., 1:]]
    if top_groups < groups:
        sums = _ranked(_group_scores(scores, groups))[0]
        found.append((sums[..., top_groups - 1, None] - sums[..., top_groups, None]) / 2**0.5)
    return torch.cat(found, -1).clamp(max=1e9)  # beyond the last expert it is infinite


def _given(chosen: Tensor, x: Tensor, weight: Tensor, **a: Any) -> tuple[Tensor, Tensor]:
    scores = _scores(x, weight)
    return chosen, _weights(scores, chosen, a.get("scale", 1.0), a.get("normalize", True))


def _weights(scores: Tensor, experts: Tensor, scale: float, normalize: bool) -> Tensor:
    weights = scores.gather(-1, experts)  # [N, T]
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + TINY)
    return weights * scale


@op(
    samples=route_samples,
    cost=route_cost,
    differentiable=("x", "weight"),
    choice=Choice(_biased, shortfall, _gaps, _others, _given),
)
def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """Computes s = sigmoid(x weight^T); the experts are the top_k largest of s + bias, the largest
    first, and their weights are s (not s + bias), divided by their sum + 1e-20 if `normalize`, and
    times `scale`. Of equal values the one with the lower index comes first. If top_groups < groups,
    the experts form equal groups in order; a group's score is the sum of its two largest s + bias,
    and only experts of the top_groups best groups are chosen.

    Shapes: x [N, D], weight [X, D], bias [X], weight and bias in float32 -> experts [N, top_k]
    int64, weights [N, top_k] float32. Logits, scores and weights in float32 at least, never in x's
    dtype. Only x and weight have gradients, through the weights of the chosen. Accumulates in
    float32: logits over D, the gradient of x over experts, that of weight over tokens. Raises
    ShapeError for a top_k or groups that the experts do not have. Source: DeepSeek-AI 2024
    (DeepSeek-V3), eq. 12 to 16; Wang et al. 2024 (loss-free balancing); transformers' glm4_moe."""
    check_choice(len(weight), top_k, groups, top_groups)
    scores = _scores(x, weight)
    experts = _choose((scores + bias.to(scores.dtype)).detach(), top_k, groups, top_groups)
    return experts, _weights(scores, experts, scale, normalize)
