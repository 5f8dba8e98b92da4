"""Where a rank's part of a tensor lies in the whole one: the convention of every sharded state.

**Names and shapes are those of the model on one process.** A checkpoint, a gathered gradient and
an initial value all speak of `blocks.3.attention.qkv.weight` [(H + 2K) E, D], whatever the plan:

- tensor parallel: `split_of(name, config, tp, rank)` says which spans of which dim a rank holds,
  one after the other. Fused rows are cut by meaning: [q | k | v] each by whole heads, the two
  halves of a gated feed-forward each for itself. None: every rank holds the whole.
- pipeline: a stage holds the names of its own layers, under the same names. A tied embedding is
  held by the first and by the last stage, always equal.
- ZeRO: a DTensor that is Shard(0) over dp, of the tensor-parallel rank's own tensor.

`chunks` puts all three together: views of what a rank holds, each with its place in the whole."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from glm_core.config import ModelConfig


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """A tensor-parallel rank's part: these spans along `dim`, concatenated."""

    dim: int
    spans: tuple[tuple[int, int], ...]
    """(first index in the whole, length)"""

    @property
    def length(self) -> int:
        """Of the part, along `dim`."""
        return sum(length for _, length in self.spans)


def split_of(name: str, config: ModelConfig, tp: int, rank: int) -> Split | None:
    """The part of parameter `name` on tensor-parallel rank `rank` of `tp`; None: all of it. The
    optimizer's tensors are split as their parameter is."""
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
    """One span of each section, whose spans have these lengths on every rank."""
    spans, begin = [], 0
    for length in lengths:
        spans.append((begin + rank * length, length))
        begin += length * tp
    return Split(dim, tuple(spans))


def take(whole: Tensor, split: Split | None) -> Tensor:
    """A rank's part of the whole tensor."""
    if split is None:
        return whole
    parts = [whole.narrow(split.dim, start, length) for start, length in split.spans]
    return torch.cat(parts, split.dim)


def chunks(
    local: Tensor, split: Split | None, first_row: int = 0
) -> list[tuple[tuple[int, ...], Tensor]]:
    """(place in the whole, view) of every piece of a plain tensor that holds the rows from
    `first_row` on of a tensor-parallel rank's part."""
    rest = (0,) * (local.ndim - 1)
    if split is None:
        return [((first_row, *rest), local)]
    if split.dim == 1:
        return [((first_row, split.spans[0][0]), local)]
    found, begin, end = [], 0, first_row + len(local)
    for start, length in split.spans:
        low, high = max(begin, first_row), min(begin + length, end)
        if low < high:
            rows = local[low - first_row : high - first_row]
            found.append(((start + low - begin, *rest), rows))
        begin += length
    return found
