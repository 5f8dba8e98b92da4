"""Runs attention by torch's fused kernels: SDPA (flash or memory-efficient) where every query sees
all keys or a causal part, FlexAttention for any other interval. No [L, S] tensor is ever formed:
the block mask is computed from the intervals, block by block.

Shapes: B batch, L queries, S keys, H heads, K kv heads, E head dim, M blocks of queries, N of keys.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from glm_core.backends.base import Backend
from glm_core.spec import Support, unsupported
from glm_core.versions import torch_has

BLOCK = 128
"""queries and keys in a block: FlexAttention's default"""
HAS_TRITON = importlib.util.find_spec("triton") is not None
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def mask_kind(key_start: Tensor, key_end: Tensor, keys: int) -> str:
    """Returns full, causal or interval. Reading the values waits for the device, so the result is
    stored on the tensor and read once. Tensors without values count as an interval."""
    if torch.compiler.is_compiling():
        return "interval"
    stamp = (id(key_end), key_start._version, key_end._version, keys)
    known = getattr(key_start, "_glm_core_mask", None)
    if known is None or known[0] != stamp:
        known = (stamp, _read(key_start, key_end, keys))
        key_start._glm_core_mask = known  # type: ignore[attr-defined]  # tensors take attributes
    return str(known[1])


def _read(key_start: Tensor, key_end: Tensor, keys: int) -> str:
    if is_fake(key_start) or key_start.is_meta:
        return "interval"
    length = key_start.shape[1]
    seen = torch.arange(1, length + 1, device=key_end.device)
    facts = torch.stack((key_start.any(), (key_end != keys).any(), (key_end != seen).any()))
    starts_late, not_full, not_causal = facts.tolist()
    if starts_late or (not_full and (not_causal or length != keys)):
        return "interval"
    return "causal" if not_full else "full"


def block_mask(key_start: Tensor, key_end: Tensor, keys: int) -> BlockMask:
    """Returns the intervals as FlexAttention reads them: for each block of queries, the blocks of
    keys that some query sees, and those that all its queries see whole."""
    length = key_start.shape[1]
    rows = -(-length // BLOCK)
    pad = (0, rows * BLOCK - length)
    start = torch.nn.functional.pad(key_start, pad, value=keys)
    start = start.unflatten(1, (rows, BLOCK))  # [B, M, BLOCK]
    end = torch.nn.functional.pad(key_end, pad).unflatten(1, (rows, BLOCK))  # [B, M, BLOCK]
    sees = end > start
    first = torch.where(sees, start, keys).amin(-1)[..., None]  # [B, M, 1]
    last = torch.where(sees, end, 0).amax(-1)[..., None]  # [B, M, 1]
    block = torch.arange(-(-keys // BLOCK), device=start.device, dtype=torch.int32)  # [N]
    some = (block * BLOCK < last) & ((block + 1) * BLOCK > first)  # [B, M, N]
    inside = start.amax(-1)[..., None] <= block * BLOCK
    whole = some & inside & ((block + 1) * BLOCK <= end.amin(-1)[..., None])

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j >= key_start[b, i]) & (j < key_end[b, i])

    partial, full = _listed(some & ~whole), _listed(whole)
    return BlockMask.from_kv_blocks(
        *partial, *full, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(length, keys)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Turns blocks [B, M, N] into their counts [B, 1, M] and indices [B, 1, M, N], chosen blocks
    first."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order[:, None].contiguous()


def _flex(q: Tensor) -> Callable[..., Any]:
    """Returns the compiled (fused) FlexAttention on a device, the plain one where torch.compile is
    already at work or nothing runs."""
    eager = q.is_cpu or torch.compiler.is_compiling() or is_fake(q)
    chosen: Callable[..., Any] = cast("Any", flex_attention) if eager else _compiled()
    return chosen


@functools.cache
def _compiled() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    return compiled


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
    # layer_scale and pb_relax keep half-precision scores in range; the kernels' are float32
    kind = mask_kind(key_start, key_end, k.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, L, E]
    grouped = q.shape[1] != k.shape[1]
    if kind == "interval":
        mask = block_mask(key_start, key_end, k.shape[2])
        y = _flex(q)(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)
    else:
        if grouped and not torch_has("sdpa_grouped_heads"):
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            grouped = False
        with sdpa_kernel(FUSED):
            y = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=kind == "causal", scale=scale, enable_gqa=grouped
            )
    return y.transpose(1, 2).contiguous()  # [B, L, H, E]


def head_size(e: int) -> str:
    """Says why torch's fused kernels refuse this head size; '' where they take it."""
    if e % 8 or not 16 <= e <= 256:
        return f"head size {e}: torch's fused attention takes multiples of 8 from 16 to 256"
    return ""


def supports(
    backend: Backend,
    takes: Callable[..., Support],
    fused_trouble: Callable[[torch.device, torch.dtype], str] = lambda device, dtype: "",
) -> Callable[..., Support]:
    """Returns attention's predicate; `takes` is the rule of all kernels, on devices and dtypes.
    `fused_trouble` says why torch's fused attention cannot run on a device, or ''."""

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_start: Tensor,
        key_end: Tensor,
        scale: float,
        layer_scale: float = 1.0,
        pb_relax: float = 0.0,
    ) -> Support:
        support = takes(q, k, v, key_start, key_end, scale, layer_scale, pb_relax)
        if not support.ok:
            return support
        if reason := head_size(q.shape[-1]):
            return unsupported(reason)
        if not q.numel():
            return unsupported("an empty batch: torch's fused attention takes none")
        if mask_kind(key_start, key_end, k.shape[1]) != "interval":
            reason = "" if is_fake(q) else fused_trouble(q.device, q.dtype)
        elif not HAS_TRITON:
            reason = (
                "masks other than full and causal need FlexAttention, which needs Triton; "
                "pip install triton"
            )
        return unsupported(reason) if reason else support

    return attention
