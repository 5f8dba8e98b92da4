"""Declares attention, whose mask is data: one interval of visible keys per query.

Every mask of the family is an interval [key_start, key_end) per query i: causal is (0, i + 1),
prefix-LM (0, max(i + 1, sep)), packed samples (start, max(i + 1, start + sep)), left padding (pads,
i + 1), and a KV cache (0, position + 1). So a mask takes 8 bytes per query, and no [L, L] matrix
exists.

Shapes: B batch, L queries, S keys, H heads, K kv heads, E head dim, C head dim of the values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from glm_core.dispatch import op
from glm_core.ops.layout import gapped
from glm_core.ops.precision import num_bytes, wide
from glm_core.spec import Cost, Draw, Maker, Sample, exact, normal, realize


def intervals(b: int, length: int, kind: str, keys: int) -> dict[str, Any]:
    """Returns key_start and key_end [b, length] of a named mask: causal, prefix, packed, padded,
    static (one query per sequence over a cache whose sequences differ in length) or empty (some
    rows see nothing)."""
    starts, ends = [], []
    for row in range(b):
        sep, half, pads = (row + 1) * keys // (b + 1), length // 2, row % 3
        for i in range(length):
            seen = i + 1 + keys - length
            start = {"packed": half if i >= half else 0, "padded": pads}.get(kind, 0)
            reach = {"prefix": sep, "packed": start + half // 2, "padded": pads}.get(kind, 0)
            end = max(seen, reach)
            starts.append(start)
            ends.append(start if kind == "empty" and i % 2 else end)
    if kind == "static":  # a query per sequence, each of another length, of the cache's last one
        ends = [keys * (row + 1) // b for row in range(b) for _ in range(length)]
        starts = [row % 3 * (end // 5) for row, end in enumerate(ends)]
    named = (("key_start", starts), ("key_end", ends))
    return {k: exact(v, torch.int32, b, length) for k, v in named}


def preallocated(maker: Maker) -> Maker:
    """Makes the same [B, S, K, E] as a view of a cache's storage [B, K, S + 3, E]."""

    def make(draw: Draw) -> Tensor:
        x: Tensor = realize(maker, draw)
        storage = x.new_zeros(x.shape[0], x.shape[2], x.shape[1] + 3, x.shape[3])
        storage[:, :, : x.shape[1]] = x.transpose(1, 2)  # [B, K, S, E]
        return storage.transpose(1, 2)[:, : x.shape[1]]  # [B, S, K, E]

    return make


def attention_samples() -> Iterator[Sample]:
    def make(
        id: str,
        b: int,
        n: int,
        h: int,
        k: int,
        e: int,
        kind: str = "prefix",
        keys: int = 0,
        std: float = 1.0,
        strided: bool = False,
        cache: bool = False,
        values: int = 0,
        **rest: Any,
    ) -> Sample:
        keys = keys or n
        q = normal(b, n, h, e, std=std, strided=strided)
        kv = [normal(b, keys, k, d, std=std, strided=strided) for d in (e, values or e)]
        if cache:
            kv = [preallocated(x) for x in kv]
        args = {
            "q": q,
            "k": kv[0],
            "v": kv[1],
            **intervals(b, n, kind, keys),
            "scale": e**-0.5,
            **rest,
        }
        return Sample(id, args, real="128" in id)

    yield make("2x9x3x16-prefix", 2, 9, 3, 3, 16)
    yield make("2x9x3x16-causal", 2, 9, 3, 3, 16, "causal")
    yield make("2x33x4x16-gqa2-packed", 2, 33, 4, 2, 16, "packed")
    yield make("3x17x4x24-mqa-padded-strided", 3, 17, 4, 1, 24, "padded", strided=True)
    plain = make("", 2, 7, 4, 2, 10, "packed").args
    yield Sample("2x7x4x10-gqa2-packed-gapped", gapped(plain))
    yield make("2x6x2x8-empty-rows", 2, 6, 2, 2, 8, "empty")
    yield make("1x131x2x33-prefix", 1, 131, 2, 2, 33)  # past the tiles of most kernels
    yield make("1x1x1x1", 1, 1, 1, 1, 1, "causal")
    yield make("2x1x4x16-cache13", 2, 1, 4, 2, 16, "causal", keys=13)
    yield make("3x1x6x24-gqa6-static40", 3, 1, 6, 1, 24, "static", keys=40, cache=True)
    yield make("2x1x2x33-static300", 2, 1, 2, 2, 33, "static", keys=300, cache=True)
    yield make("2x5x4x16-static19", 2, 5, 4, 2, 16, "causal", keys=19, cache=True)
    yield make("4x1x32x128-mqa16-static256", 4, 1, 32, 2, 128, "static", keys=256, cache=True)
    yield make("2x9x4x12-gqa2-values20-packed", 2, 9, 4, 2, 12, "packed", values=20)
    yield make("2x3x6x36-mqa-values32-static40", 2, 3, 6, 1, 36, keys=40, cache=True, values=32)
    yield make("1x9x2x16-huge", 1, 9, 2, 2, 16, std=200.0)  # past exp's range: one key takes all
    yield make("1x9x2x16-tiny", 1, 9, 2, 2, 16, std=1e-3)
    yield make("2x9x2x16-scale0.4", 2, 9, 2, 2, 16, scale=0.4)
    yield make("2x9x2x16-scaled", 2, 9, 2, 2, 16, layer_scale=5.0)
    yield make("2x9x2x16-pb-relax", 2, 9, 2, 2, 16, pb_relax=32.0)
    yield make("0x4x2x8", 0, 4, 2, 2, 8)
    for id, sizes, kind, keys in (
        ("1x257x2x160-causal", (1, 257, 2, 2, 160), "causal", 0),
        ("2x1x4x40-gqa2-static4097", (2, 1, 4, 2, 40), "static", 4097),
    ):
        args = make("", *sizes, kind, keys, cache=bool(keys)).args
        yield Sample(id, args, large=True)
    yield make("1x128x8x128-gqa4-prefix", 1, 128, 8, 2, 128)


def attention_cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    scale: float,
    layer_scale: float = 1.0,
    pb_relax: float = 0.0,
) -> Cost:
    """Counts the FLOPs of visible pairs only; of all pairs for meta tensors, whose intervals have
    no values."""
    b, n, h, e = q.shape
    c = v.shape[-1]
    if q.is_meta:
        pairs = b * n * k.shape[1] * h
    else:
        pairs = int((key_end - key_start).clamp(min=0).sum()) * h
    moved, out = num_bytes(q, k, v, key_start, key_end), b * n * h * c * q.element_size()
    backward = (6 * e + 4 * c) * pairs  # scores again, dq and dk; dv and the probabilities'
    return Cost(2 * (e + c) * pairs, moved + out, backward, 2 * moved + out)


@op(samples=attention_samples, cost=attention_cost, differentiable=("q", "k", "v"))
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    scale: float,
    layer_scale: float = 1.0,
    pb_relax: float = 0.0,
) -> Tensor:
    """Computes y = softmax(scale q k^T) v, over the keys that each query sees. Query i of row b
    sees key j if and only if key_start[b, i] <= j < key_end[b, i]; a query that sees nothing gives
    zeros. KV head h serves the query heads h*H/K ... (h+1)*H/K - 1.

    Shapes: q [B, L, H, E]; k [B, S, K, E], v [B, S, K, C], possibly views of a larger cache;
    key_start, key_end [B, L] int32 -> [B, L, H, C]. C is E except in latent attention. Computed in
    float32 and rounded once to q's dtype. Accumulates in float32: scores over E, softmax and y over
    keys, the gradient of q over keys, those of k and v over queries and the query heads that a kv
    head serves.

    layer_scale c: scores are formed from q/c and multiplied by c inside the softmax (GLM-130B's
    query-key layer scaling). pb_relax a > 0: the softmax is taken as softmax((s/a - max(s/a)) a).
    In real arithmetic neither changes the result; both keep half-precision scores in range.
    Sources: Vaswani et al. 2017, eq. 1; Zeng et al. 2022 (GLM-130B); Ding et al. 2021 (CogView),
    eq. 5."""
    groups = k.shape[2]
    qs = wide(q).unflatten(2, (groups, -1)) * (scale / layer_scale)  # [B, L, K, H/K, E]
    scores = torch.einsum("blkre,bske->bkrls", qs, wide(k))  # [B, K, H/K, L, S]
    j = torch.arange(k.shape[1], device=q.device, dtype=torch.int32)
    visible = (j >= key_start[..., None]) & (j < key_end[..., None])  # [B, L, S]
    hidden = ~visible[:, None, None]  # [B, 1, 1, L, S]
    scores = scores.masked_fill(
        hidden, torch.finfo(scores.dtype).min / max(layer_scale, pb_relax, 1.0)
    )
    if pb_relax:
        scores = scores / pb_relax
        scores = (scores - scores.amax(-1, keepdim=True).detach()) * pb_relax
    probabilities = torch.softmax(scores * layer_scale, -1).masked_fill(hidden, 0.0)
    y = torch.einsum("bkrls,bskc->blkrc", probabilities, wide(v))  # [B, L, K, H/K, C]
    return y.flatten(2, 3).to(q.dtype)  # [B, L, H, C]
