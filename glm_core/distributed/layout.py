"""Defines where a rank's part of a tensor lies in the whole one, for every sharded state.

**Names and shapes are those of the model on one process.** Checkpoints, gathered gradients and
initial values all use `blocks.3.attention.qkv.weight` [(H + 2K) E, D], whatever the plan:

- Tensor and expert parallelism: `splits_of(name, config, place)` returns the spans that a rank
  holds along each split dim; they are concatenated in its tensor. Fused rows are split by meaning:
  each of q, k and v by whole heads, each half of a gated feed-forward layer by itself. Experts
  [X, F, D] are split by whole experts, and each by its inner width. None: every rank holds the
  whole.
- Pipeline: a stage holds its own layers under the same names. The first and the last stage both
  hold a tied embedding and keep it equal.
- ZeRO: the rank's tensor is a DTensor, Shard(0) over dp, for experts over the ranks that hold the
  same ones.

`chunks` combines all of them: views of what a rank holds, each with its offsets in the whole."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from glm_core.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A rank's place among those that split a layer's tensors."""

    tp: int = 1
    tp_rank: int = 0
    ep: int = 1
    ep_rank: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """A rank's part of a tensor along one dim: spans, concatenated."""

    dim: int
    spans: tuple[tuple[int, int], ...]
    """(first index in the whole, length)"""
    ranks: int
    """the number of such parts, all of one length"""


Splits = tuple[Split, ...]
"""at most one for each dim; empty where every rank holds the whole"""


def splits_of(name: str, config: ModelConfig, place: Place) -> Splits:
    """Returns the part of parameter `name` that a rank holds. Optimizer tensors are split like
    their parameter."""
    splits = []
    if is_expert(name) and place.ep > 1:
        splits.append(_even(0, place.ep_rank, (config.num_experts // place.ep,), place.ep))
    if place.tp > 1 and (sections := _sections(name, config)):
        dim, lengths = sections
        own = tuple(length // place.tp for length in lengths)
        splits.append(_even(dim, place.tp_rank, own, place.tp))
    return tuple(splits)


def is_expert(name: str) -> bool:
    """Returns whether a parameter, or a tensor of its optimizer, has a matrix for each expert that
    the router chooses from."""
    return ".experts_" in name


def _sections(name: str, config: ModelConfig) -> tuple[int, tuple[int, ...]] | None:
    """Returns the dim along which tensor-parallel ranks split a parameter, and the lengths of its
    sections; None where each rank holds it whole."""
    c, e = config, config.head_dim
    if name in ("embedding", "head"):
        return 0, (c.vocab,)
    ffn = c.expert_ffn if is_expert(name) else c.ffn
    if ".shared." in name:
        ffn = c.num_shared_experts * c.expert_ffn
    halves = 1 if c.activation == "gelu" else 2
    if ".q." in name or ".q_b." in name:
        return 0, (c.num_heads * e,)
    value = c.value_head_dim or e
    if ".kv_b." in name:
        return 0, (c.num_heads * (e - c.rope_head_dim + value),)
    if ".qkv." in name:
        return 0, (c.num_heads * e, c.num_kv_heads * e, c.num_kv_heads * e)
    if ".up." in name:
        return 0, (ffn,) * halves
    if name.endswith("attention.out.weight"):
        return 1, (c.num_heads * value,)
    if name.endswith(".down.weight"):
        return 1, (ffn,)
    if ".experts_up." in name:
        return 1, (ffn,) * halves
    return (2, (ffn,)) if ".experts_down." in name else None


def _even(dim: int, rank: int, lengths: tuple[int, ...], ranks: int) -> Split:
    """Returns one span of each section. `lengths` are a rank's lengths of the sections, the same on
    every rank."""
    spans, begin = [], 0
    for length in lengths:
        spans.append((begin + rank * length, length))
        begin += length * ranks
    return Split(dim, tuple(spans), ranks)


def part_shape(whole: tuple[int, ...], splits: Splits) -> tuple[int, ...]:
    """Returns the shape of a rank's part of a tensor of this shape."""
    parts = {split.dim: split.ranks for split in splits}
    return tuple(n // parts.get(dim, 1) for dim, n in enumerate(whole))


def take(whole: Tensor, splits: Splits) -> Tensor:
    """Returns a rank's part of the whole tensor."""
    for split in splits:
        parts = [whole.narrow(split.dim, start, length) for start, length in split.spans]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, split.dim)
    return whole


def joined(parts: list[Tensor], splits: list[Splits], whole: torch.Size) -> Tensor:
    """Returns the tensor of which ranks hold these parts: what `take` undoes."""
    joint = parts[0].new_empty(whole)
    for part, own in zip(parts, splits, strict=True):
        for place, view in chunks(part, own):
            lengths = zip(place, view.shape, strict=True)
            joint[tuple(slice(at, at + length) for at, length in lengths)] = view
    return joint


Chunk = tuple[tuple[int, ...], Tensor]
"""(offsets in the whole, view)"""


def chunks(local: Tensor, splits: Splits, first_row: int = 0) -> list[Chunk]:
    """Returns the views of `local`, which holds the rows of a rank's part from `first_row` on, that
    are contiguous in the whole tensor."""
    views: list[Chunk] = [((first_row, *(0,) * (local.ndim - 1)), local)]
    for split in splits:
        views = [cut for place, view in views for cut in _cut(place, view, split)]
    return views


def _cut(place: tuple[int, ...], view: Tensor, split: Split) -> list[Chunk]:
    """Returns the parts of a view in each span. Along the split's dim, `place` counts in the rank's
    part."""
    d, cuts, begin = split.dim, [], 0
    first, end = place[d], place[d] + view.shape[d]
    for start, length in split.spans:
        low, high = max(begin, first), min(begin + length, end)
        if low < high:
            offsets = (*place[:d], start + low - begin, *place[d + 1 :])
            cuts.append((offsets, view.narrow(d, low - first, high - low)))
        begin += length
    return cuts
