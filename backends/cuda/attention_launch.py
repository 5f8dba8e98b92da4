"""Runs attention over intervals of keys by the Triton kernels beside this file: forward with the
keys split over the chip where there are few queries, and backward. Nothing of size [L, S] exists,
lengths and scale are data, and keys that no query of a program sees are skipped (Dao 2023,
FlashAttention-2; Dao et al. 2023, Flash-Decoding). Needs triton.

Shapes: as in attention_forward.py."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional

from glm_core.backends.cuda import probe
from glm_core.backends.cuda.attention import MATRIX_CORES, MAX_HEAD_SIZE
from glm_core.backends.cuda.attention_backward import grad_keys, grad_rows
from glm_core.backends.cuda.attention_forward import attend_rows, join_splits

Three = tuple[Tensor, Tensor, Tensor]
MAX_SPLITS = 128
MIN_KEYS = 128
"""a split has at least so many keys"""
SCAN = 1024
"""intervals that `grad_keys` looks at in one step"""
JOINED = 16
"""splits that `join_splits` adds in one step"""
COLUMNS = {"fma": 32, "vector": 16}
"""columns of a product's factors that are read at a time where there are no tensor cores"""


class Cut(NamedTuple):
    """How a kernel is cut: rows and keys of a block, warps, blocks whose loads are in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


CUTS: dict[str, dict[str, dict[int, Cut]]] = {
    "mma": {
        "attend_rows": {
            32: Cut(128, 64, 4, 2),
            64: Cut(128, 128, 8, 2),
            128: Cut(128, 64, 8, 2),
            256: Cut(64, 32, 8, 2),
            512: Cut(64, 32, 8, 1),
            1024: Cut(32, 32, 8, 2),
        },
        "few_rows": {
            64: Cut(16, 128, 4, 3),
            128: Cut(16, 64, 4, 3),
            512: Cut(16, 32, 4, 3),
            1024: Cut(16, 32, 4, 2),
        },
        "grad_rows": {
            64: Cut(128, 64, 8, 2),
            128: Cut(64, 64, 8, 2),
            256: Cut(32, 32, 8, 2),
            512: Cut(32, 32, 8, 1),
        },
        "grad_keys": {32: Cut(64, 128, 8, 2), 128: Cut(64, 32, 8, 2), 512: Cut(32, 32, 8, 2)},
    },
    "mfma": {
        "attend_rows": {64: Cut(128, 64, 4, 1), 128: Cut(128, 32, 4, 1), 256: Cut(64, 32, 4, 1)},
        "few_rows": {256: Cut(16, 64, 4, 1)},
        "grad_rows": {128: Cut(64, 64, 4, 1), 256: Cut(16, 32, 4, 1)},
        "grad_keys": {128: Cut(32, 64, 4, 1), 256: Cut(16, 32, 4, 1)},
    },
    "fma": {
        "attend_rows": {
            32: Cut(64, 32, 8, 1),
            64: Cut(32, 16, 4, 1),
            128: Cut(32, 32, 4, 1),
            256: Cut(64, 32, 8, 1),
        },
        "few_rows": {64: Cut(16, 64, 4, 1), 128: Cut(16, 32, 8, 1), 256: Cut(16, 32, 4, 1)},
        "grad_rows": {
            16: Cut(32, 32, 8, 1),
            32: Cut(32, 32, 4, 1),
            80: Cut(16, 32, 8, 1),
            128: Cut(32, 32, 8, 1),
            256: Cut(16, 32, 4, 1),
        },
        "grad_keys": {32: Cut(32, 32, 8, 1), 128: Cut(16, 32, 8, 1), 256: Cut(16, 16, 8, 1)},
    },
    "vector": {
        "attend_rows": {128: Cut(32, 16, 4, 1), 256: Cut(16, 16, 4, 1)},
        "few_rows": {128: Cut(16, 32, 4, 1), 256: Cut(16, 16, 4, 1)},
        "grad_rows": {128: Cut(16, 32, 4, 1), 256: Cut(16, 16, 4, 1)},
        "grad_keys": {128: Cut(16, 16, 4, 1), 256: Cut(8, 16, 4, 1)},
    },
}
"""kind of multiplier -> kernel -> largest head size -> cut; 512 is for sizes that `Call.cut`
doubles. `few_rows` is `attend_rows` where a kv head has at most 16 rows, as in decoding. Chosen by
what compiles without spills, not by speed: no GPU has run them
(docs/adr/0013-attention-in-triton.md)"""


@functools.cache
def _processors(device: torch.device) -> int:
    """Returns how many multiprocessors the device has; 4 for the CPU, where this is interpreted."""
    if device.type == "cpu":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _in_rows(x: Tensor) -> Tensor:
    """Returns x with a contiguous last dimension; the kernels read the others in place."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _factor(scale: float) -> float:
    """Returns the factor of the scores in base 2, above zero so that hidden keys keep -inf."""
    return max(scale * math.log2(math.e), 1e-30)


@functools.cache
def family(device: torch.device, itemsize: int) -> str:
    """Returns which entry of CUTS serves the device: `mma` for NVIDIA's tensor cores, `mfma` for
    AMD's, `fma` and `vector` where there are none for the dtype."""
    if torch.version.hip:
        return "mfma" if probe.architecture(device.index or 0) in MATRIX_CORES else "vector"
    return "mma" if itemsize < 4 else "fma"


LATENT_CUT, LATENT_COLUMNS = 1024, 64
"""the entry of CUTS for heads wider than 256, and the columns of a product's factors that are read
at a time there"""


class Call(NamedTuple):
    """The sizes of one call, and how its kernels are cut."""

    batch: int
    queries: int
    keys: int
    kv_heads: int
    group: int
    e: int
    c: int
    family: str
    processors: int

    @property
    def rows(self) -> int:
        """Returns the rows of one kv head."""
        return self.queries * self.group

    def cut(self, kernel: str) -> Cut:
        """Returns the kernel's cut for this head size. Masks and narrow loads of a size that 8 does
        not divide take registers: it is cut like one of twice the size."""
        larger = max(self.e, self.c)
        odd = self.family == "mma" and (self.e % 8 or self.c % 8)
        e = LATENT_CUT if larger > MAX_HEAD_SIZE else 2 * larger if odd else larger
        return next(cut for size, cut in CUTS[self.family][kernel].items() if e <= size)

    def options(self, cut: Cut) -> dict[str, int]:
        """Returns what a kernel is compiled for."""
        width = _power(self.e)
        columns = LATENT_COLUMNS if self.e > MAX_HEAD_SIZE else width
        return {
            "BM": cut.rows,
            "BN": cut.keys,
            "E": self.e,
            "EP": width,
            "CHUNK": min(columns, COLUMNS.get(self.family, width)),
            "num_warps": cut.warps,
            "num_stages": cut.stages,
        }


def _power(size: int) -> int:
    """Returns the least power of two that holds a head size, which tensor cores take."""
    return int(max(16, triton.next_power_of_2(size)))


def _call(q: Tensor, k: Tensor, v: Tensor) -> Call:
    (b, queries, h, e), (_, keys, kv_heads, _) = q.shape, k.shape
    kind = family(q.device, q.element_size())
    sizes = (h // kv_heads, e, v.shape[-1])
    return Call(b, queries, keys, kv_heads, *sizes, kind, _processors(q.device))


def _strides(*tensors: Tensor) -> list[int]:
    return [s for t in tensors for s in t.stride()[:3]]


def forward(
    q: Tensor, k: Tensor, v: Tensor, key_start: Tensor, key_end: Tensor, scale: float
) -> Three:
    """Returns y [B, L, H, E], and the maximum and the reciprocal sum of every row [B, H, L], which
    `backward` takes."""
    y = q.new_empty(*q.shape[:3], v.shape[-1])
    tops, shares = (
        q.new_empty((len(q), q.shape[2], q.shape[1]), dtype=torch.float32) for _ in range(2)
    )
    if not q.numel():
        return y, tops, shares
    q, k, v = _in_rows(q), _in_rows(k), _in_rows(v)
    call, c = _call(q, k, v), _factor(scale)
    b, queries, keys, kv_heads, group, *_ = call
    cut = call.cut("few_rows" if call.rows <= 16 else "attend_rows")
    options = call.options(cut) | {"C": call.c, "CP": _power(call.c)}
    blocks = triton.cdiv(call.rows, cut.rows) * b * kv_heads
    splits = max(1, min(2 * call.processors // blocks, triton.cdiv(keys, MIN_KEYS), MAX_SPLITS))
    parts = (y, tops, shares)
    if splits > 1:
        shape = (b * kv_heads, splits, call.rows)
        sizes = ((*shape, call.c), shape, shape)
        parts = tuple(q.new_empty(s, dtype=torch.float32) for s in sizes)  # type: ignore[assignment]
    with torch.cuda.device_of(q):
        attend_rows[blocks, splits](
            *(q, k, v, key_start.contiguous(), key_end.contiguous(), *parts),
            *_strides(q, k, v),
            *(queries, keys, kv_heads, group, splits, c, splits > 1),
            **options,
        )
        if splits > 1:
            join_splits[(b * kv_heads * call.rows,)](
                *(*parts, y, tops, shares, queries, kv_heads, group, splits, c),
                *(JOINED, call.c, options["CP"]),
            )
    return y, tops, shares


def backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    y: Tensor,
    tops: Tensor,
    shares: Tensor,
    scale: float,
) -> Three:
    """Returns dq, dk and dv. The kernels take one head size: the smaller is filled with zeros,
    which change no product."""
    e, values = q.shape[-1], v.shape[-1]
    if e != values:
        dy, q, k, v, y = (_filled(t, max(e, values)) for t in (dy, q, k, v, y))
        grads = backward(dy, q, k, v, key_start, key_end, y, tops, shares, scale)
        dq, dk, dv = (g[..., :n] for g, n in zip(grads, (e, e, values), strict=True))
        return dq.contiguous(), dk.contiguous(), dv.contiguous()
    call, c = _call(q, k, v), _factor(scale)
    b, queries, keys, kv_heads, group, *_ = call
    by_rows, by_keys = call.cut("grad_rows"), call.cut("grad_keys")
    blocks = triton.cdiv(keys, by_keys.keys) * b * kv_heads
    parts = max(1, min(2 * call.processors // max(blocks, 1), group))
    dq, deltas = torch.empty_like(y), torch.empty_like(tops)
    dtype = q.dtype if parts == 1 else torch.float32
    dk, dv = (q.new_empty((parts, *k.shape), dtype=dtype) for _ in range(2))
    if not q.numel() or not k.numel():
        return dq.zero_(), dk[0].zero_(), dv[0].zero_()
    intervals = (key_start.contiguous(), key_end.contiguous())
    dy, q, k, v = _in_rows(dy), _in_rows(q), _in_rows(k), _in_rows(v)
    strides = _strides(dy, q, k, v)
    with torch.cuda.device_of(q):
        grad_rows[(triton.cdiv(call.rows, by_rows.rows) * b * kv_heads,)](
            *(dy, q, k, v, *intervals, y, tops, shares, dq, deltas, *strides),
            *(queries, keys, kv_heads, group, c, scale),
            **call.options(by_rows),
        )
        grad_keys[blocks, parts](
            *(dy, q, k, v, *intervals, tops, shares, deltas, dk, dv, *strides),
            *(queries, keys, kv_heads, group, parts, c, scale, SCAN),
            **call.options(by_keys),
        )
    return dq, _summed(dk, q.dtype), _summed(dv, q.dtype)


def _filled(x: Tensor, size: int) -> Tensor:
    return functional.pad(x, (0, size - x.shape[-1]))


def _summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0).to(dtype)
