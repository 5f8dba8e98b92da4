"""Reads the part of a parameter that a rank of a plan holds: of a published folder, no more than
the rank's own experts, rows and columns."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from glm_core.distributed.layout import Splits, chunks, part_shape, take
from glm_core.pretrained.weights.files import StoredTensor
from glm_core.pretrained.weights.reading import Checkpoint

Place = tuple[int, ...]
"""the offset in a whole parameter, for each dim"""


def read_part(checkpoint: Checkpoint, name: str, splits: Splits) -> Tensor:
    """Returns a rank's part of a parameter in floating point. What is stored as codes, by several
    ranks or with the rows of q, k and v mixed is read whole, and then cut."""
    if checkpoint.quantized(name) or checkpoint.num_ranks > 1 or checkpoint.layout.qkv == "heads":
        return take(checkpoint.dense(name), splits)
    pieces = list(_pieces(checkpoint, name))
    part = torch.empty(part_shape(checkpoint.shapes[name], splits), dtype=pieces[0][2].dtype)
    for begin, view in chunks(part, splits):
        for origin, shape, stored in pieces:
            low = [max(a, b) for a, b in zip(begin, origin, strict=True)]
            ends = zip(begin, view.shape, origin, shape, strict=True)
            high = [min(a + n, b + m) for a, n, b, m in ends]
            if all(a < b for a, b in zip(low, high, strict=True)):
                source = _slices(low, high, origin)[-len(stored.shape) :]
                view[_slices(low, high, begin)] = stored.read(source)
    return part


def _slices(low: list[int], high: list[int], origin: Place) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


def _pieces(c: Checkpoint, name: str) -> Iterator[tuple[Place, tuple[int, ...], StoredTensor]]:
    """Yields the stored tensors of a parameter, with their places and shapes in it: its rows follow
    each other, those of every expert apart where each is stored by itself."""
    stored = c.stored(name)
    apart = ".experts_" in name and len(stored) > 1
    each, row = len(stored) // c.config.num_experts if apart else len(stored), 0
    for i, piece in enumerate(stored):
        row = row if i % each else 0
        place = (row, *(0,) * (len(piece.shape) - 1))
        if apart:
            yield (i // each, *place), (1, *piece.shape), piece
        else:
            yield place, piece.shape, piece
        row += piece.shape[0]
