"""Tells what a checkpoint takes in memory, from its headers alone."""

from __future__ import annotations

import math

import torch

from glm_core.model.fit import Sizes, token_bytes
from glm_core.model.quantize import VALUE_BYTES
from glm_core.pretrained.weights.heads import is_heads
from glm_core.pretrained.weights.reading import Checkpoint, is_linear


def sizes(
    c: Checkpoint,
    dtype: torch.dtype,
    bits: int | None = None,
    head_bits: int | None = None,
    speculate: bool = False,
) -> Sizes:
    """Returns the sizes of the model that `c.load(dtype, quantized=True)` makes. bits: as if its
    linears were quantised so, a scale a row. head_bits: with a quantised copy of the head.
    speculate: the cache holds keys and values of a layer of multi-token prediction too."""
    by_layer = [0] * c.config.num_layers
    ends = 0
    for name, shape in c.shapes.items():
        size = _bytes(c, name, shape, dtype, bits)
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else len(by_layer)
        if layer < len(by_layer):
            by_layer[layer] += size
        else:  # layers of multi-token prediction too
            ends += size
    if head_bits:
        values = math.prod(c.shapes["embedding"])
        ends += values * head_bits // 8 + values // 32 * VALUE_BYTES
    token = token_bytes(c.config, dtype.itemsize, int(speculate))
    return Sizes(ends, max(by_layer), c.config.num_layers, token)


def _bytes(
    c: Checkpoint, name: str, shape: tuple[int, ...], dtype: torch.dtype, bits: int | None
) -> int:
    if c.quantized(name):
        ranks = range(c.num_ranks)
        return sum(s.num_bytes for r in ranks for k in (False, True) for s in c.stored(name, r, k))
    if bits is not None and (is_linear(name) or is_heads(name)):
        return math.prod(shape) * bits // 8 + VALUE_BYTES * math.prod(shape[:-1])
    return math.prod(shape) * dtype.itemsize
