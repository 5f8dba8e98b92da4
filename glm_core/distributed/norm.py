"""Computes the gradient norm over many ranks, with every element counted once wherever it is
placed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from glm_core.errors import GlmCoreError

STRETCH = 1024
"""elements whose squares may be added up one after another"""


class GradientPart(NamedTuple):
    """A gradient, or the elements of one that this rank holds."""

    tensor: Tensor
    """plain, in any dtype and shape; scaled in place by `clip_`"""
    copies: int
    """how many of the ranks that `global_norm` sums over hold these elements; 1: only this one"""


def gradient_parts(gradients: Iterable[Tensor], ranks: int) -> list[GradientPart]:
    """Returns the parts of gradients that are equal on `ranks` ranks or, as DTensors, sharded over
    dimensions of their meshes; ranks outside a DTensor's mesh hold copies of it. The meshes may
    differ from gradient to gradient. `ranks`: the ranks of one pipeline stage; for a parameter tied
    over n stages, n times as many. Raises GlmCoreError for a DTensor whose sum is still pending."""
    return [_gradient_part(g, ranks) for g in gradients]


def _gradient_part(gradient: Tensor, ranks: int) -> GradientPart:
    if not isinstance(gradient, DTensor):
        return GradientPart(gradient, ranks)
    shards = 1
    for size, placement in zip(gradient.device_mesh.shape, gradient.placements, strict=True):
        if placement.is_partial():
            raise GlmCoreError(
                f"gradient norm: a gradient of shape {tuple(gradient.shape)} is placed "
                f"{gradient.placements}, a sum not yet taken; redistribute it to Replicate or Shard"
            )
        if not placement.is_replicate():
            shards *= size
    return GradientPart(gradient.to_local(), ranks // shards)


@torch.no_grad()
def global_norm(
    parts: Iterable[GradientPart], group: dist.ProcessGroup | None = None, device: str = "cpu"
) -> Tensor:
    """Returns sqrt(sum of all squares), a float32 scalar that is the same on every rank of `group`
    (None: all). It takes one all-reduce, in which each element is weighted by 1 / copies, so ranks
    may hold different numbers of parts, or none. `device`: where ranks sum, wherever the parts are.
    The norm is not finite if any element is not. Outside a process group it is the norm of this
    process."""
    sums: dict[int, list[Tensor]] = {}
    for tensor, copies in parts:
        if tensor.numel():
            sums.setdefault(copies, []).extend(_norms(tensor))
    # float64: squares of float32 norms overflow and cancel in float32
    total = torch.zeros((), dtype=torch.float64, device=device)
    for copies, norms in sums.items():
        total += (torch.cat(norms).double().square().sum() / copies).to(total.device)
    if dist.is_initialized():
        dist.all_reduce(total, group=group)
    return total.sqrt().float()


def _norms(tensor: Tensor) -> list[Tensor]:
    """Returns the norms of a tensor's stretches of STRETCH elements, in float32 at least, and of
    what is left over. On CPUs torch adds up one square after another: of a whole embedding's it
    loses the small ones."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    flat = tensor.reshape(-1)
    whole = flat.numel() // STRETCH * STRETCH
    stretches = (flat[:whole].view(-1, STRETCH), flat[whole:].view(1, -1))
    return [torch.linalg.vector_norm(s, dim=1, dtype=dtype) for s in stretches if s.numel()]


@torch.no_grad()
def clip_(parts: Iterable[GradientPart], norm: Tensor, max_norm: float) -> None:
    """Scales every part in place by min(1, max_norm / (norm + 1e-6)) (Pascanu et al. 2013; torch
    and DeepSpeed use the same constant). A max_norm of 0 leaves them as they are."""
    if max_norm > 0:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for tensor, _ in parts:
            tensor.mul_(factor.to(tensor))
