"""Rotates a decode step's queries and keys and writes keys and values into the cache, in one Triton
kernel instead of three launches. Needs triton.

Shapes: B rows, H heads, K kv heads, E head dim, EP the power of two that holds E, S tokens a slot
holds, N positions, G position rows that are rotated, P pairs of rotated dimensions per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["rows", "known"])
def keep_rows(
    qkv,
    angles,
    positions,
    places,
    memory,
    q,
    rows,
    known,
    heads,
    kv_heads,
    m_side,
    m_slot,
    m_head,
    m_place,
    G: tl.constexpr,
    P: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
):
    """Takes one head of one row of qkv [B, H + 2K, E], with angles [2, N, G, P] and positions
    [2, B]; writes q [B, H, E] or into memory [2, slots, K, S, E]."""
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    e = tl.arange(0, EP)
    mine = qkv + (b * (heads + 2 * kv_heads) + h) * E + e
    y = tl.load(mine, mask=e < E, other=0.0).to(tl.float32)
    if G > 0:
        g = e // (2 * P)
        r = e % (2 * P)
        i = r // 2 if INTERLEAVED else r % P
        is_first = r % 2 == 0 if INTERLEAVED else r < P
        apart = 1 if INTERLEAVED else P
        turned = e < tl.where(h < heads + kv_heads, 2 * G * P, 0)
        other = tl.load(mine + tl.where(is_first, apart, -apart), mask=turned, other=0.0)
        other = other.to(tl.float32)
        position = tl.load(positions + g * rows + b, mask=turned, other=0)
        at = angles + (position * G + g) * P + i
        cos = tl.load(at, mask=turned, other=1.0)
        sin = tl.load(at + known.to(tl.int64) * G * P, mask=turned, other=0.0)
        # rounded as csrc/cuda/rope.cu does
        rotated = tl.where(is_first, y * cos - other * sin, tl.fma(y, cos, other * sin))
        y = tl.where(turned, rotated, y)
    y = y.to(q.dtype.element_ty)
    if h < heads:
        tl.store(q + (b * heads + h) * E + e, y, mask=e < E)
    else:
        side = ((h - heads) // kv_heads).to(tl.int64)
        head = ((h - heads) % kv_heads).to(tl.int64)
        place = tl.load(places + b)
        token = memory + side * m_side + b * m_slot + head * m_head + place * m_place
        tl.store(token + e, y, mask=e < E)


def keep(
    qkv: Tensor,
    angles: Tensor | None,
    positions: Tensor,
    places: Tensor,
    memory: Tensor,
    heads: int,
    interleaved: bool,
) -> Tensor:
    """Returns the rotated queries [B, 1, H, E] of qkv [B, 1, H + 2K, E]; writes into memory."""
    b, _, total, e = qkv.shape
    q = qkv.new_empty(b, 1, heads, e)
    known, g, p = (0, 0, 1) if angles is None else angles.shape[1:]
    with torch.cuda.device_of(qkv):
        keep_rows[b, total](
            *(qkv.contiguous(), qkv if angles is None else angles, positions, places, memory, q),
            *(b, known, heads, (total - heads) // 2, *memory.stride()[:4]),
            *(g, p, interleaved, e, triton.next_power_of_2(e)),
            num_warps=1,
            enable_fp_fusion=False,
        )
    return q
