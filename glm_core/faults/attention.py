"""Wrong attention. Shapes: B batch, L queries, S keys, H heads, K kv heads, E head dim."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm_core.faults.mutant import mutant, pulled
from glm_core.ops import attention
from glm_core.ops.precision import wide


def _edited(arguments: dict[str, Any], **changes: Any) -> Tensor:
    y: Tensor = attention.reference(**{**arguments, **changes})
    return y


@mutant(attention, wrong="key_start is taken for 0")
def start_ignored(**a: Any) -> Tensor:
    return _edited(a, key_start=torch.zeros_like(a["key_start"]))


@mutant(attention, wrong="one key too many is visible")
def end_inclusive(**a: Any) -> Tensor:
    return _edited(a, key_end=a["key_end"] + 1)


@mutant(attention, wrong="always causal: query i sees keys up to i")
def always_causal(**a: Any) -> Tensor:
    n, keys = a["q"].shape[1], a["k"].shape[1]
    ends = torch.arange(1, n + 1, dtype=torch.int32) + keys - n
    return _edited(a, key_end=ends.expand_as(a["key_end"]))


@mutant(attention, wrong="causal from key 0 though earlier keys are cached")
def cache_ignored(**a: Any) -> Tensor:
    n, keys = a["q"].shape[1], a["k"].shape[1]
    return _edited(a, key_end=a["key_end"] - (keys - n))


@mutant(attention, wrong="the first row's intervals serve the whole batch")
def intervals_of_first_row(**a: Any) -> Tensor:
    first = {k: a[k][:1].expand_as(a[k]) for k in ("key_start", "key_end")}
    return _edited(a, **first)


@mutant(attention, wrong="a query that sees nothing gets the mean of all values")
def empty_row_mean(**a: Any) -> Tensor:
    empty = a["key_end"] <= a["key_start"]
    means = wide(a["v"]).mean(1, keepdim=True)  # [B, 1, K, E]
    means = means.repeat_interleave(a["q"].shape[2] // means.shape[2], 2)
    return torch.where(empty[..., None, None], means.to(a["q"].dtype), attention.reference(**a))


@mutant(attention, wrong="a query that sees nothing gets NaN")
def empty_row_nan(**a: Any) -> Tensor:
    empty = a["key_end"] <= a["key_start"]
    return torch.where(empty[..., None, None], torch.nan, attention.reference(**a))


@mutant(attention, wrong="query head h reads kv head h mod K")
def heads_interleaved(**a: Any) -> Tensor:
    q, groups = a["q"], a["k"].shape[2]
    order = torch.arange(q.shape[2]).view(-1, groups).t().flatten()  # heads of kv head 0 first
    return _edited(a, q=q[:, :, order])[:, :, order.argsort()]


@mutant(attention, wrong="the scale is E^-1/2 whatever was asked")
def scale_fixed(**a: Any) -> Tensor:
    return _edited(a, scale=a["q"].shape[-1] ** -0.5)


@mutant(attention, wrong="scores are divided by the layer scale and not multiplied back")
def layer_scale_half_applied(**a: Any) -> Tensor:
    return _edited(a, scale=a["scale"] / a.get("layer_scale", 1.0), layer_scale=1.0)


@mutant(attention, wrong="PB-relax divides by a and does not multiply back")
def relax_half_applied(**a: Any) -> Tensor:
    return _edited(a, scale=a["scale"] / (a.get("pb_relax") or 1.0), pb_relax=0.0)


@mutant(attention, wrong="softmax without subtracting the maximum")
def maximum_not_subtracted(**a: Any) -> Tensor:
    return _softmax_by_hand(a, shift=False, narrow=False)


@mutant(attention, wrong="scores are rounded to the working dtype before the softmax")
def narrow_scores(**a: Any) -> Tensor:
    return _softmax_by_hand(a, shift=True, narrow=True)


def _softmax_by_hand(a: dict[str, Any], shift: bool, narrow: bool) -> Tensor:
    q, k, v = (wide(a[n]) for n in "qkv")
    qs = q.unflatten(2, (k.shape[2], -1)) * a["scale"]  # [B, L, K, H/K, E]
    scores = torch.einsum("blkre,bske->bkrls", qs, k)
    if narrow:
        scores = scores.to(a["q"].dtype).to(q.dtype)
    j = torch.arange(k.shape[1])
    visible = (j >= a["key_start"][..., None]) & (j < a["key_end"][..., None])  # [B, L, S]
    scores = scores.masked_fill(~visible[:, None, None], torch.finfo(q.dtype).min)
    if shift and scores.numel():
        scores = scores - scores.amax(-1, keepdim=True).detach()
    weights = scores.exp() * visible[:, None, None]
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1, total)
    return torch.einsum("bkrls,bske->blkre", weights, v).flatten(2, 3).to(a["q"].dtype)


@mutant(attention, wrong="keys past the last whole tile of 16 are dropped")
def last_tile_dropped(**a: Any) -> Tensor:
    keys = a["k"].shape[1]
    return _edited(
        a, key_end=a["key_end"].clamp(max=keys // 16 * 16) if keys > 16 else a["key_end"]
    )


@mutant(attention, wrong="keys past the last whole tile of 128 are dropped")
def last_large_tile_dropped(**a: Any) -> Tensor:
    keys = a["k"].shape[1]
    ends = a["key_end"]
    return _edited(a, key_end=ends.clamp(max=keys // 128 * 128) if keys > 128 else ends)


@mutant(attention, wrong="the gradient of k lacks the scale")
def gradient_of_k_unscaled(**a: Any) -> Tensor:
    return _edited(a, k=pulled(a["k"], lambda g: g / a["scale"]))


@mutant(attention, wrong="the gradient of v comes from the first query head of each group only")
def gradient_of_group_lost(**a: Any) -> Tensor:
    full = _edited(a, v=a["v"].detach())
    share = a["q"].shape[2] // a["k"].shape[2]
    first = torch.arange(a["q"].shape[2]) % share == 0
    other = attention.reference(**a) * first[:, None]
    return full + (other - other.detach())


@mutant(attention, wrong="backward of softmax without its row sum: ds = p dp")
def gradient_without_row_sum(**a: Any) -> Tensor:
    q, k, v = (wide(a[n]) for n in "qkv")
    qs = q.unflatten(2, (k.shape[2], -1)) * a["scale"]
    scores = torch.einsum("blkre,bske->bkrls", qs, k)
    j = torch.arange(k.shape[1])
    visible = (j >= a["key_start"][..., None]) & (j < a["key_end"][..., None])
    filled = scores.masked_fill(~visible[:, None, None], torch.finfo(q.dtype).min)
    p = torch.softmax(filled.detach(), -1) * visible[:, None, None]
    p = p + p.detach() * (scores - scores.detach())  # dp/ds = p on the diagonal only
    y = torch.einsum("bkrls,bske->blkre", p, v).flatten(2, 3)
    exact = _edited(a, q=a["q"].detach(), k=a["k"].detach(), v=a["v"].detach())
    return exact + (y - y.detach()).to(exact.dtype)
