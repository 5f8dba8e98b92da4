"""Cuts a parameter into the parts of tensor-parallel ranks, and merges the parts.

Scales of quantized weights are cut with the rows or columns that they belong to.
Shapes: F rows, D columns, H heads, E head dim, G groups of scales."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glm_core.config import ModelConfig, divisors
from glm_core.errors import CheckpointError
from glm_core.pretrained.weights.layouts import sections, split_of


def from_heads(tensor: Tensor, heads: int) -> Tensor:
    """Returns rows in the order all q, all k, all v, from rows in the order q, k, v of head 0, then
    of head 1, ...; q, k and v have the same number of heads."""
    by_head = tensor.unflatten(0, (heads, 3, -1))  # [H, 3, E, ...]
    return by_head.transpose(0, 1).flatten(0, 2)  # [3HE, ...]


def to_heads(tensor: Tensor, heads: int) -> Tensor:
    """Returns rows in the order q, k, v of each head: the reverse of `from_heads`."""
    by_kind = tensor.unflatten(0, (3, heads, -1))  # [3, H, E, ...]
    return by_kind.transpose(0, 1).flatten(0, 2)  # [3HE, ...]


def require_divides(config: ModelConfig, size: int, subject: str) -> None:
    """Raises CheckpointError unless `size` ranks divide the heads, the ffn width and the
    vocabulary, or for ranks of a model that is not cut yet."""
    if size > 1 and (config.num_experts or config.kv_latent):
        raise CheckpointError(
            f"{subject}: experts and latent attention are not cut for tensor-parallel ranks; use 1"
        )
    sizes = {
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "ffn": config.ffn,
        "vocab": config.vocab,
    }
    if size < 1 or any(n % size for n in sizes.values()):
        undivided = ", ".join(f"{k}={n}" for k, n in sizes.items() if size < 1 or n % size)
        raise CheckpointError(
            f"{subject}: {size} tensor-parallel ranks do not divide {undivided}; use "
            f"{divisors(math.gcd(*sizes.values()))}"
        )


def shard_shape(
    name: str, shape: tuple[int, ...], config: ModelConfig, size: int
) -> tuple[int, ...]:
    """Returns the shape of one rank's part of our parameter `name`, whose whole has `shape`."""
    dim = split_of(name).dim
    return tuple(n // size if i == dim else n for i, n in enumerate(shape))


def merge(name: str, parts: list[Tensor], config: ModelConfig, size: int, scale: bool) -> Tensor:
    """Joins the parts of consecutive ranks into the part of one of `size` ranks (1: the whole)."""
    dim = split_of(name).dim
    if dim is None or len(parts) == 1:
        return parts[0]
    if dim == 1:
        if scale:  # every rank scaled its own columns
            return torch.cat([p.reshape(len(p), -1) for p in parts], 1)  # [F, G]
        return torch.cat(parts, 1)
    lengths = sections(name, config)
    if lengths is None:
        return torch.cat(parts)
    ranks = size * len(parts)
    by_part = [p.split([n // ranks for n in lengths]) for p in parts]
    return torch.cat([p[i] for i in range(len(lengths)) for p in by_part])


def cut(
    name: str,
    tensor: Tensor,
    config: ModelConfig,
    rank: int,
    size: int,
    stored_ranks: int,
    scale: bool,
) -> Tensor:
    """Returns part `rank` of `size` of a tensor, which is itself the part of one of `stored_ranks`
    ranks (1: the whole)."""
    dim = split_of(name).dim
    if dim is None or size == 1:
        return tensor
    if dim == 1 and scale:
        # a scale of the whole row goes to every part, scales of groups go with their columns
        groups = tensor.reshape(len(tensor), -1)  # [F, G]
        if groups.shape[1] == 1:
            return tensor
        if groups.shape[1] % size:
            raise CheckpointError(
                f"{name}: {groups.shape[1]} groups of scales cannot be shared by {size} ranks; "
                "dequantize first, then cut"
            )
        return groups.chunk(size, 1)[rank].squeeze(1)  # [F, G / size], or [F] of one group
    lengths = sections(name, config) if dim == 0 else None
    if lengths is None:
        return tensor.chunk(size, dim)[rank]
    section_parts = tensor.split([n // stored_ranks for n in lengths])
    return torch.cat([section.chunk(size)[rank] for section in section_parts])
