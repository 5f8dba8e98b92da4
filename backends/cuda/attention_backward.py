"""Holds attention's backward kernels in Triton. None adds by atomics, so equal calls give equal
bits: `grad_rows` owns rows of dq, `grad_keys` owns keys of dk and dv, and each forms the
probabilities again.

Shapes: as in attention_forward.py."""

from __future__ import annotations

import triton
import triton.language as tl

from glm_core.backends.cuda.attention_forward import DATA, intervals, load_rows, products


@triton.jit(do_not_specialize=DATA)
def grad_rows(
    dy,
    q,
    k,
    v,
    key_start,
    key_end,
    y,
    tops,
    shares,
    dq,
    deltas,
    d_b,
    d_l,
    d_h,
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
    c,
    scale,
    CHUNK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
):
    """Writes dq [B, L, H, E] of BM rows: with ds = p (dy v^T - delta), it is scale ds k. Writes
    delta = sum(dy y) [B, H, L] for `grad_keys`."""
    rows = queries * group
    blocks = tl.cdiv(rows, BM)
    bk = tl.program_id(0) // blocks
    b = (bk // kv_heads).to(tl.int64)
    row = (blocks - 1 - tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    stored = row < rows
    row = tl.minimum(row, rows - 1)
    i = row // group
    head = bk % kv_heads * group + row % group
    e = tl.arange(0, EP)
    column = (e < E)[None, :]
    start, end = intervals(key_start + b * queries, key_end + b * queries, i, keys)
    low = tl.min(tl.where(end > 0, start, keys), 0)
    high = tl.max(end, 0)
    at_q = q + b * q_b + i.to(tl.int64) * q_l + head.to(tl.int64) * q_h
    mine = load_rows(at_q, 0, EP, E)
    at_d = dy + b * d_b + i.to(tl.int64) * d_l + head.to(tl.int64) * d_h
    d = load_rows(at_d, 0, EP, E)
    out = ((b * queries + i) * kv_heads * group + head)[:, None] * E + e[None, :]
    result = tl.load(y + out, mask=column, other=0.0)
    delta = tl.sum(d.to(tl.float32) * result.to(tl.float32), 1)
    at = (b * kv_heads * group + head) * queries + i
    tl.store(deltas + at, delta, mask=stored)
    top = tl.load(tops + at)
    share = tl.load(shares + at)
    h = (bk % kv_heads).to(tl.int64)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    acc = tl.zeros((BM, EP), tl.float32)
    for n in range(low, high, BN):
        j = n + tl.arange(0, BN)
        real = tl.minimum(j, high - 1).to(tl.int64)
        at_k = k + real * k_s
        at_v = v + real * v_s
        key = load_rows(at_k, 0, EP, E)
        s = products(mine, at_q, key, at_k, CHUNK, E, EP)
        p = tl.exp2((s - top[:, None]) * c) * share[:, None]
        p = tl.where((j[None, :] >= start[:, None]) & (j[None, :] < end[:, None]), p, 0.0)
        dp = products(d, at_d, load_rows(at_v, 0, EP, E), at_v, CHUNK, E, EP)
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(key.dtype), key, acc, input_precision="ieee")
    tl.store(dq + out, (acc * scale).to(dq.dtype.element_ty), mask=stored[:, None] & column)


@triton.jit(do_not_specialize=DATA)
def grad_keys(
    dy,
    q,
    k,
    v,
    key_start,
    key_end,
    tops,
    shares,
    deltas,
    dk,
    dv,
    d_b,
    d_l,
    d_h,
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
    parts,
    c,
    scale,
    SCAN: tl.constexpr,
    CHUNK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
):
    """Writes what one part of a group's heads adds to dk = scale ds^T q and dv = p^T dy of BN keys,
    [parts, B, S, K, E]. Only queries between the first and the last that see one of the keys are
    read."""
    blocks = tl.cdiv(keys, BN)
    low = tl.program_id(0) % blocks * BN
    bk = tl.program_id(0) // blocks
    b = (bk // kv_heads).to(tl.int64)
    h = (bk % kv_heads).to(tl.int64)
    key_start += b * queries
    key_end += b * queries
    first = tl.full((), 0, tl.int32) + queries
    last = tl.full((), 0, tl.int32)
    for n in range(0, queries, SCAN):
        i = n + tl.arange(0, SCAN)
        start, end = intervals(key_start, key_end, tl.minimum(i, queries - 1), keys)
        sees = (start < low + BN) & (end > low)
        first = tl.minimum(first, tl.min(tl.where(sees, i, queries), 0))
        last = tl.maximum(last, tl.max(tl.where(sees & (i < queries), i + 1, 0), 0))
    j = low + tl.arange(0, BN)
    real = tl.minimum(j, keys - 1).to(tl.int64)
    at_k = k + b * k_b + h * k_h + real * k_s
    at_v = v + b * v_b + h * v_h + real * v_s
    key = load_rows(at_k, 0, EP, E)
    value = load_rows(at_v, 0, EP, E)
    sum_k = tl.zeros((BN, EP), tl.float32)
    sum_v = tl.zeros((BN, EP), tl.float32)
    share_of_heads = tl.cdiv(group, parts)
    begin = tl.program_id(1) * share_of_heads
    for g in range(begin, tl.minimum(begin + share_of_heads, group)):
        head = h * group + g
        of_head = (b * kv_heads * group + head) * queries
        for n in range(first, last, BM):
            i = tl.minimum(n + tl.arange(0, BM), last - 1)
            start, end = intervals(key_start, key_end, i, keys)
            end = tl.where(n + tl.arange(0, BM) < last, end, 0)
            at_q = q + b * q_b + head * q_h + i.to(tl.int64) * q_l
            query = load_rows(at_q, 0, EP, E)
            s = products(key, at_k, query, at_q, CHUNK, E, EP)  # [BN, BM]
            p = tl.exp2((s - tl.load(tops + of_head + i)[None, :]) * c)
            p *= tl.load(shares + of_head + i)[None, :]
            p = tl.where((j[:, None] >= start[None, :]) & (j[:, None] < end[None, :]), p, 0.0)
            at_d = dy + b * d_b + head * d_h + i.to(tl.int64) * d_l
            d = load_rows(at_d, 0, EP, E)
            sum_v = tl.dot(p.to(d.dtype), d, sum_v, input_precision="ieee")
            ds = (
                products(value, at_v, d, at_d, CHUNK, E, EP)
                - tl.load(deltas + of_head + i)[None, :]
            )
            ds = (p * ds).to(query.dtype)
            sum_k = tl.dot(ds, query, sum_k, input_precision="ieee")
    e = tl.arange(0, EP)
    part = tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // blocks // kv_heads) + b
    at = ((part * keys + j) * kv_heads + h)[:, None] * E + e[None, :]
    stored = (j < keys)[:, None] & (e < E)[None, :]
    tl.store(dk + at, (sum_k * scale).to(dk.dtype.element_ty), mask=stored)
    tl.store(dv + at, sum_v.to(dv.dtype.element_ty), mask=stored)
