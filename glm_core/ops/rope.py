"""Declares rotary position embedding, in every layout of the family.

Shapes: B batch, L sequence, H heads, E head dim, G sections, P pairs per section."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from glm_core.dispatch import op
from glm_core.ops.layout import gapped
from glm_core.ops.precision import num_bytes, wide
from glm_core.spec import Cost, Draw, Maker, Sample, normal


def angles(b: int, length: int, sections: int, pairs: int, function: Any) -> Maker:
    """Makes cos or sin [b, length, sections, pairs] (float32) of random positions at RoPE's
    frequencies."""

    def make(draw: Draw) -> Tensor:
        g = torch.Generator().manual_seed(7)  # the same positions for cos and sin
        positions = torch.randint(0, 2048, (b, length, sections, 1), generator=g).double()
        inverse = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        keep = torch.promote_types(draw.dtype, torch.float32)
        return function(positions * inverse).to(keep).to(draw.device)

    return make


def rope_samples() -> Iterator[Sample]:
    def make(
        id: str,
        b: int,
        n: int,
        h: int,
        e: int,
        sections: int = 1,
        share: float = 1.0,
        interleaved: bool = False,
        strided: bool = False,
        shared: bool = False,
        std: float = 1.0,
    ) -> Sample:
        pairs, rows = int(e * share) // sections // 2, 1 if shared else b
        tables = {f.__name__: angles(rows, n, sections, pairs, f) for f in (torch.cos, torch.sin)}
        args = {
            "x": normal(b, n, h, e, std=std, strided=strided),
            **tables,
            "interleaved": interleaved,
        }
        return Sample(id, args, real="32x128" in id)

    yield make("2x5x3x16", 2, 5, 3, 16)
    yield make("2x5x3x16-interleaved", 2, 5, 3, 16, interleaved=True)
    yield make("2x5x3x16-partial", 2, 5, 3, 16, share=0.5)
    yield make(
        "2x5x3x24-partial-interleaved-strided",
        2,
        5,
        3,
        24,
        share=0.5,
        interleaved=True,
        strided=True,
    )
    yield make("2x5x3x16-2d", 2, 5, 3, 16, sections=2)
    yield make("2x5x3x24-2d-partial-interleaved", 2, 5, 3, 24, 2, 2 / 3, interleaved=True)
    plain = make("", 2, 5, 3, 16, share=0.5).args
    yield Sample("2x5x3x16-partial-gapped", gapped(plain))
    yield make("3x7x1x2-shared", 3, 7, 1, 2, shared=True)
    yield make("3x7x5x22-partial", 3, 7, 5, 22, share=0.5)  # five pairs
    yield make("1x1x1x2", 1, 1, 1, 2)
    yield make("2x5x3x16-tiny", 2, 5, 3, 16, std=1e-3)
    yield make("2x5x3x16-huge", 2, 5, 3, 16, std=1e3)
    yield make("0x4x2x8", 0, 4, 2, 8)
    yield Sample("1x257x3x66", make("", 1, 257, 3, 66, strided=True).args, large=True)
    yield make(
        "1x16x32x128-partial-interleaved", 1, 16, 32, 128, share=0.5, interleaved=True
    )  # GLM-4
    yield make("1x16x32x128-2d", 1, 16, 32, 128, sections=2)  # ChatGLM-6B


def rope_cost(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Cost:
    moved = 2 * num_bytes(x) + num_bytes(cos, sin)
    return Cost(3 * x.numel(), moved, 3 * x.numel(), moved)


@op(samples=rope_samples, cost=rope_cost, differentiable=("x",))
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotates pairs of dimensions (a, b) -> (a cos - b sin, b cos + a sin) for all pairs.
    Section g holds dimensions [2gP, 2(g+1)P); its pairs are (i, i + P), or (2i, 2i + 1)
    if `interleaved`. Dimensions from 2GP on pass unchanged. G is 1, or 2 for ChatGLM-6B's 2D
    positions.

    Shapes: x [B, L, H, E]; cos, sin [B or 1, L, G, P] float32 -> [B, L, H, E]. Computed in float32
    and rounded once to x's dtype. Accumulates nothing. Source: Su et al. 2021 (RoFormer), eq.
    34."""
    sections, pairs = cos.shape[-2:]
    rotated = 2 * sections * pairs
    shape = (pairs, 2) if interleaved else (2, pairs)
    t = wide(x[..., :rotated]).unflatten(-1, (sections, *shape))  # [B, L, H, G, 2, P] or [.., P, 2]
    a, b = t.unbind(-1 if interleaved else -2)
    c, s = cos.unsqueeze(2), sin.unsqueeze(2)  # [B, L, 1, G, P]
    turned = torch.stack((a * c - b * s, b * c + a * s), -1 if interleaved else -2)
    turned = turned.flatten(-3).to(x.dtype)  # [B, L, H, 2GP]
    return torch.cat((turned, x[..., rotated:]), -1)  # [B, L, H, E]
