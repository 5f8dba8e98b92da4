"""Holds attention's forward kernels in Triton, and what the backward kernels share with them.

A program of `attend_rows` takes BM rows of one kv head. Row r is query r // R of head
k * R + r % R, so that the heads of a group share the keys and values that are loaded.

The largest product m of a row and the reciprocal r of its sum are kept apart. Backward's
p = exp2((s - m) c) r, with c = scale log2(e), is then exact for a key that takes all;
exp2(s c - logsum) is not where the scores are near 1e5.

Shapes: B batch, L queries, S keys, H heads, K kv heads, R = H / K (`group`), E head dim, C head dim
of the values, EP and CP the powers of two that hold E and C, N splits of the keys; BM rows and BN
keys in a block."""

from __future__ import annotations

import triton
import triton.language as tl

DATA = ["queries", "keys", "splits", "parts"]
"""arguments whose values must not cause another compilation"""


@triton.jit
def load_rows(at, first, WIDTH: tl.constexpr, E: tl.constexpr):
    """Loads columns first ... first + WIDTH - 1 of the rows that begin at `at`, with zeros from
    column E on."""
    e = first + tl.arange(0, WIDTH)
    if E % WIDTH == 0:
        return tl.load(at[:, None] + e[None, :])
    return tl.load(at[:, None] + e[None, :], mask=(e < E)[None, :], other=0.0)


@triton.jit
def products(a, at_a, b, at_b, CHUNK: tl.constexpr, E: tl.constexpr, EP: tl.constexpr):
    """Returns a b^T of two tiles, whose rows begin at `at_a` and `at_b`. Without tensor cores they
    are read again, CHUNK columns at a time: a whole tile is more than the registers hold."""
    if CHUNK == EP:
        return tl.dot(a, tl.trans(b), input_precision="ieee")
    s = tl.zeros((at_a.shape[0], at_b.shape[0]), tl.float32)
    for first in range(0, E, CHUNK):
        x = load_rows(at_a, first, CHUNK, E)
        s = tl.dot(x, tl.trans(load_rows(at_b, first, CHUNK, E)), s, input_precision="ieee")
    return s


@triton.jit
def intervals(key_start, key_end, i, keys):
    """Loads the intervals of queries i, cut to the keys that exist; (0, 0) for an empty one."""
    start = tl.maximum(tl.load(key_start + i), 0)
    end = tl.minimum(tl.load(key_end + i), keys)
    return tl.where(start < end, start, 0), tl.where(start < end, end, 0)


@triton.jit
def softmax_step(
    q,
    at_q,
    k,
    v,
    k_s,
    v_s,
    n,
    start,
    end,
    high,
    c,
    top,
    total,
    acc,
    MASKED: tl.constexpr,
    CHUNK: tl.constexpr,
    BN: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
):
    """Takes BN keys from n on into the running maximum, sum and weighted values. MASKED: some rows
    do not see some of them."""
    j = n + tl.arange(0, BN)
    real = j
    if MASKED:
        real = tl.minimum(j, high - 1)
    at_k = k + real.to(tl.int64) * k_s
    s = products(q, at_q, load_rows(at_k, 0, EP, E), at_k, CHUNK, E, EP)
    if MASKED:
        seen = (j[None, :] >= start[:, None]) & (j[None, :] < end[:, None])
        s = tl.where(seen, s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2((s - base[:, None]) * c)
    shrink = tl.exp2((top - base) * c)
    values = load_rows(v + real.to(tl.int64) * v_s, 0, CP, C)
    acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return new, total * shrink + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=DATA)
def attend_rows(
    q,
    k,
    v,
    key_start,
    key_end,
    y,
    tops,
    shares,
    q_b,
    q_l,
    q_h,
    k_b,
    k_s,
    k_h,
    v_b,
    v_s,
    v_h,
    queries,
    keys,
    kv_heads,
    group,
    splits,
    c,
    SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
):
    """Writes y [B, L, H, C] of BM rows and their maxima and reciprocal sums [B, H, L]. SPLIT: what
    one share of the keys contributes, weighted values [B K, N, rows, C], maxima and sums."""
    rows = queries * group
    blocks = tl.cdiv(rows, BM)
    bk = tl.program_id(0) // blocks
    b = (bk // kv_heads).to(tl.int64)
    row = (blocks - 1 - tl.program_id(0) % blocks) * BM + tl.arange(0, BM)  # the longest first
    stored = row < rows
    row = tl.minimum(row, rows - 1)
    i = row // group
    head = bk % kv_heads * group + row % group
    start, end = intervals(key_start + b * queries, key_end + b * queries, i, keys)
    low = tl.min(tl.where(end > 0, start, keys), 0)
    high = tl.max(end, 0)
    if SPLIT:
        share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), splits), BN) * BN
        low += tl.program_id(1) * share
        high = tl.minimum(high, low + share)
    at_q = q + b * q_b + i.to(tl.int64) * q_l + head.to(tl.int64) * q_h
    mine = load_rows(at_q, 0, EP, E)
    h = (bk % kv_heads).to(tl.int64)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, CP), tl.float32)
    # every row sees the blocks in [first, last) whole; the others are masked
    ceiling = low + tl.cdiv(tl.maximum(high - low, 0), BN) * BN
    first = tl.minimum(low + tl.cdiv(tl.maximum(tl.max(start, 0) - low, 0), BN) * BN, ceiling)
    last = first + tl.maximum(tl.minimum(tl.min(end, 0), high) - first, 0) // BN * BN
    for n in range(low, high - (last - first), BN):
        j = tl.where(n < first, n, n + last - first)
        top, total, acc = softmax_step(
            mine,
            at_q,
            k,
            v,
            k_s,
            v_s,
            j,
            start,
            end,
            high,
            c,
            top,
            total,
            acc,
            True,
            CHUNK,
            BN,
            E,
            EP,
            C,
            CP,
        )
    for n in range(first, last, BN):
        top, total, acc = softmax_step(
            mine,
            at_q,
            k,
            v,
            k_s,
            v_s,
            n,
            start,
            end,
            high,
            c,
            top,
            total,
            acc,
            False,
            CHUNK,
            BN,
            E,
            EP,
            C,
            CP,
        )
    if SPLIT:
        at = (bk.to(tl.int64) * splits + tl.program_id(1)) * rows + row
        tl.store(tops + at, top, mask=stored)
        tl.store(shares + at, total, mask=stored)
        out = at
    else:
        out = (b * queries + i) * kv_heads * group + head
        at = (b * kv_heads * group + head) * queries + i
        total = tl.where(total == 0.0, 0.0, 1.0 / total)
        tl.store(tops + at, tl.where(top == float("-inf"), 0.0, top), mask=stored)
        tl.store(shares + at, total, mask=stored)
        acc *= total[:, None]
    e = tl.arange(0, CP)
    at = y + out[:, None] * C + e[None, :]
    tl.store(at, acc.to(y.dtype.element_ty), mask=stored[:, None] & (e < C)[None, :])


@triton.jit(do_not_specialize=DATA)
def join_splits(
    values,
    maxima,
    sums,
    y,
    tops,
    shares,
    queries,
    kv_heads,
    group,
    splits,
    c,
    BLOCK: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
):
    """Writes what `attend_rows` would have written for one row, from the contributions of the
    splits."""
    rows = queries * group
    bk = (tl.program_id(0) // rows).to(tl.int64)
    row = tl.program_id(0) % rows
    e = tl.arange(0, CP)
    n = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(0, splits, BLOCK):
        at = maxima + (bk * splits + first + n) * rows + row
        top = tl.maximum(top, tl.load(at, mask=first + n < splits, other=float("-inf")))
    largest = tl.max(top, 0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((CP,), tl.float32)
    for first in range(0, splits, BLOCK):
        at = (bk * splits + first + n) * rows + row
        inside = first + n < splits
        top = tl.load(maxima + at, mask=inside, other=float("-inf"))
        weight = tl.exp2((top - largest) * c)
        total += weight * tl.load(sums + at, mask=inside, other=0.0)
        at = values + at[:, None] * C + e[None, :]
        part = tl.load(at, mask=inside[:, None] & (e < C)[None, :], other=0.0)
        acc += tl.sum(weight[:, None] * part, 0)
    share = tl.sum(total, 0)
    share = tl.where(share == 0.0, 0.0, 1.0 / share)
    head = bk % kv_heads * group + row % group
    b = bk // kv_heads
    at = (b * kv_heads * group + head) * queries + row // group
    tl.store(tops + at, largest)
    tl.store(shares + at, share)
    at = y + ((b * queries + row // group) * kv_heads * group + head) * C + e
    tl.store(at, (acc * share).to(y.dtype.element_ty), mask=e < C)
