"""Defines where a rank's part of a tensor lies in the whole one, for every sharded state.

**Names and shapes are those of the model on one process.** Checkpoints, gathered gradients and
initial values all use `blocks.3.attention.qkv.weight` [(H + 2K) E, D], whatever the plan:

- Tensor parallelism: `split_of(name, config, tp, rank)` returns the spans that a rank holds of one
  dim; they are concatenated in its tensor. Fused rows are split by meaning: each of q, k and v by
  whole heads, each half of a gated feed-forward layer by itself. None: every rank holds the whole.
- Pipeline: a stage holds its own layers under the same names. The first and the last stage both
  hold a tied embedding and keep it equal.
- ZeRO: the tensor-parallel rank's tensor is a DTensor, Shard(0) over dp.

`chunks` combines all three: views of what a rank holds, each with its offsets in the whole."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from glm_core.config import ModelConfig


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """A tensor-parallel rank's part of a tensor: spans along one dim, concatenated."""

    dim: int
    spans: tuple[tuple[int, int], ...]
    """(first index in the whole, length)"""

    @property
    def length(self) -> int:
        """The length of the part along `dim`."""
        return sum(length for _, length in self.spans)


def split_of(name: str, config: ModelConfig, tp: int, rank: int) -> Split | None:
    """Returns the part of parameter `name` that tensor-parallel rank `rank` of `tp` holds; None
    where it holds all of it. Optimizer tensors are split like their parameter."""
    c, e = config, config.head_dim
    if name in ("embedding", "head"):
        return _even(0, rank, (c.vocab // tp,), tp)
    if ".qkv." in name:
        heads, kv_heads = c.num_heads // tp * e, c.num_kv_heads // tp * e
        return _even(0, rank, (heads, kv_heads, kv_heads), tp)
    if ".up." in name:
        return _even(0, rank, (c.ffn // tp,) * (1 if c.activation == "gelu" else 2), tp)
    if name.endswith("attention.out.weight"):
        return _even(1, rank, (c.num_heads // tp * e,), tp)
    if name.endswith("mlp.down.weight"):
        return _even(1, rank, (c.ffn // tp,), tp)
    return None


def _even(dim: int, rank: int, lengths: tuple[int, ...], tp: int) -> Split:
    """Returns one span of each section. `lengths` are a rank's lengths of the sections, the same on
    every rank."""
    spans, begin = [], 0
    for length in lengths:
        spans.append((begin + rank * length, length))
        begin += length * tp
    return Split(dim, tuple(spans))


def take(whole: Tensor, split: Split | None) -> Tensor:
    """Returns a rank's part of the whole tensor."""
    if split is None:
        return whole
    parts = [whole.narrow(split.dim, start, length) for start, length in split.spans]
    return torch.cat(parts, split.dim)


def chunks(
    local: Tensor, split: Split | None, first_row: int = 0
) -> list[tuple[tuple[int, ...], Tensor]]:
    """Returns (offsets in the whole, view) of every contiguous chunk of `local`, which holds the
    rows of a tensor-parallel rank's part from `first_row` on."""
    rest = (0,) * (local.ndim - 1)
    if split is None:
        return [((first_row, *rest), local)]
    if split.dim == 1:
        return [((first_row, split.spans[0][0]), local)]
    views, begin, end = [], 0, first_row + len(local)
    for start, length in split.spans:
        low, high = max(begin, first_row), min(begin + length, end)
        if low < high:
            rows = local[low - first_row : high - first_row]
            views.append(((start + low - begin, *rest), rows))
        begin += length
    return views
