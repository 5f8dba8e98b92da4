"""How tensor-parallel ranks cut a parameter and how it is put together again; scales of quantized
weights follow their rows.

Shapes: H heads, E head dim, R ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glm_core.config import ModelConfig, divisors
from glm_core.errors import CheckpointError
from glm_core.pretrained.weights.layouts import sections, split_of


def from_heads(tensor: Tensor, heads: int) -> Tensor:
    """Rows [q_h, k_h, v_h] head by head -> all q, all k, all v. The number of k and v heads is that
    of q heads."""
    return tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)  # [3HE, ...]


def to_heads(tensor: Tensor, heads: int) -> Tensor:
    """The reverse of `from_heads`."""
    return tensor.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)


def require_divides(config: ModelConfig, size: int, subject: str) -> None:
    """Raises CheckpointError unless `size` ranks can share heads, inner width and vocabulary."""
    sizes = {
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "ffn": config.ffn,
        "vocab": config.vocab,
    }
    if size < 1 or any(n % size for n in sizes.values()):
        odd = ", ".join(f"{k}={n}" for k, n in sizes.items() if size < 1 or n % size)
        raise CheckpointError(
            f"{subject}: {size} tensor-parallel ranks do not divide {odd}; use "
            f"{divisors(math.gcd(*sizes.values()))}"
        )


def shard_shape(
    name: str, shape: tuple[int, ...], config: ModelConfig, size: int
) -> tuple[int, ...]:
    """A rank's shape of a parameter of ours."""
    dim = split_of(name).dim
    return tuple(n // size if i == dim else n for i, n in enumerate(shape))


def merge(name: str, parts: list[Tensor], config: ModelConfig, size: int, scale: bool) -> Tensor:
    """Puts consecutive ranks' parts together: the whole, or the part of one of `size` ranks."""
    dim = split_of(name).dim
    if dim is None or len(parts) == 1:
        return parts[0]
    if dim == 1:
        if scale:  # every rank scaled its own columns
            return torch.cat([p.reshape(len(p), -1) for p in parts], 1)
        return torch.cat(parts, 1)
    lengths = sections(name, config)
    if lengths is None:
        return torch.cat(parts)
    ranks = size * len(parts)
    pieces = [p.split([n // ranks for n in lengths]) for p in parts]
    return torch.cat([p[i] for i in range(len(lengths)) for p in pieces])


def cut(
    name: str, tensor: Tensor, config: ModelConfig, rank: int, size: int, held: int, scale: bool
) -> Tensor:
    """Rank `rank` of `size` of a tensor that is itself one of `held` ranks."""
    dim = split_of(name).dim
    if dim is None or size == 1:
        return tensor
    if dim == 1 and scale:
        # one scale for the row: each part needs it; one by group: the part has its groups'
        groups = tensor.reshape(len(tensor), -1)
        if groups.shape[1] == 1:
            return tensor
        if groups.shape[1] % size:
            raise CheckpointError(
                f"{name}: {groups.shape[1]} groups of scales cannot be shared by {size} ranks; "
                "dequantize first, then cut"
            )
        return groups.chunk(size, 1)[rank].squeeze(1)
    lengths = sections(name, config) if dim == 0 else None
    if lengths is None:
        return tensor.chunk(size, dim)[rank]
    pieces = tensor.split([n // held for n in lengths])
    return torch.cat([piece.chunk(size)[rank] for piece in pieces])
