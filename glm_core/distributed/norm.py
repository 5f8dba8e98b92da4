"""What the gradient norm over many ranks is: every element counted once, however it is placed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from glm_core.errors import GlmCoreError


class Piece(NamedTuple):
    """A gradient, or this rank's part of one, and on how many ranks the same elements are."""

    tensor: Tensor
    """plain, in any dtype and shape; scaled in place by `clip_`"""
    copies: int
    """of the ranks that `global_norm` sums over, how many hold these elements; 1: only this one"""


def pieces(gradients: Iterable[Tensor], ranks: int) -> list[Piece]:
    """Pieces of gradients that are equal on `ranks` ranks or, as DTensors, sharded over dimensions
    of their meshes; what lies outside a DTensor's mesh counts as a copy of it. The meshes may
    differ from gradient to gradient. `ranks`: the ranks of one pipeline stage; for a parameter tied
    over n stages, n times as many. Raises GlmCoreError for a DTensor whose sum is still pending."""
    return [_piece(g, ranks) for g in gradients]


def _piece(gradient: Tensor, ranks: int) -> Piece:
    if not isinstance(gradient, DTensor):
        return Piece(gradient, ranks)
    shards = 1
    for size, placement in zip(gradient.device_mesh.shape, gradient.placements, strict=True):
        if placement.is_partial():
            raise GlmCoreError(
                f"gradient norm: a gradient of shape {tuple(gradient.shape)} is placed "
                f"{gradient.placements}, a sum not yet taken; redistribute it to Replicate or Shard"
            )
        if not placement.is_replicate():
            shards *= size
    return Piece(gradient.to_local(), ranks // shards)


@torch.no_grad()
def global_norm(
    parts: Iterable[Piece], group: dist.ProcessGroup | None = None, device: str = "cpu"
) -> Tensor:
    """sqrt(sum of all squares), float32 scalar, the same on every rank of `group` (None: all).
    One all-reduce, in which each element is weighted by 1 / copies, so ranks may hold different
    numbers of pieces, or none. `device`: where a rank without pieces makes its zero. Not finite if
    any element is not. Outside a process group it is the norm of this process."""
    sums: dict[int, list[Tensor]] = {}
    for tensor, copies in parts:
        if tensor.numel():
            norm = torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, _LEAST))
            sums.setdefault(copies, []).append(norm)
    # float64: squares of float32 norms overflow and cancel in float32
    total = torch.zeros((), dtype=torch.float64, device=device)
    for copies, norms in sums.items():
        total = total.to(norms[0].device) + torch.stack(norms).double().square().sum() / copies
    if dist.is_initialized():
        dist.all_reduce(total, group=group)
    return total.sqrt().float()


_LEAST = torch.float32


@torch.no_grad()
def clip_(parts: Iterable[Piece], norm: Tensor, max_norm: float) -> None:
    """Scales every piece in place by min(1, max_norm / (norm + 1e-6)) (Pascanu et al. 2013, the
    constant as in torch and DeepSpeed); max_norm 0 leaves them alone."""
    if max_norm > 0:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for tensor, _ in parts:
            tensor.mul_(factor.to(tensor.dtype))
