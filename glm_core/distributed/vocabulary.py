"""Computes cross-entropy over a vocabulary whose rows are split over ranks. Shapes: N tokens, D
width, V vocabulary of all ranks, t ranks; n tokens of a chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from glm_core import dispatch, ops
from glm_core.distributed.collectives import all_gather
from glm_core.ops.precision import wide

CHUNK = 1 << 22
"""float32 logits that exist at once: 16 MiB, whatever N and V are"""


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        token_weight: Tensor,
        group: ProcessGroup,
    ) -> Tensor:
        local = labels - group.rank() * weight.shape[0]
        stats = []  # each [2, n]: logsumexp and the label's logit, over this rank's rows
        for rows in _chunks(x, weight):
            z = wide(ops.linear(x[rows], weight))  # [n, V/t]
            row, mine = _own_rows(local[rows], weight)
            target = z.gather(1, row[:, None])[:, 0].where(mine, z.new_zeros(()))  # [n]
            stats.append(torch.stack((z.logsumexp(1), target)))
        every = all_gather(torch.cat(stats, 1)[None], group, 0)  # [t, 2, N]
        total = every[:, 0].logsumexp(0)  # [N]
        ctx.save_for_backward(x, weight, local, token_weight, total)
        ctx.session = dispatch.session()
        return ((total - every[:, 1].sum(0)) * token_weight.to(total.dtype)).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, local, token_weight, total = ctx.saved_tensors
        scale = token_weight.to(total.dtype) * grads[0]
        dx, dw = torch.empty_like(x), torch.zeros_like(weight, dtype=total.dtype)
        with dispatch.resume(ctx.session):
            for rows in _chunks(x, weight):
                z = wide(ops.linear(x[rows], weight))  # [n, V/t]
                row, mine = _own_rows(local[rows], weight)
                # this rank's part of the softmax over all ranks' rows
                p = (z - total[rows, None]).exp_()  # [n, V/t]
                p.scatter_add_(1, row[:, None], -mine.to(p.dtype)[:, None])
                dz = p.mul_(scale[rows, None]).to(x.dtype)
                dx[rows] = dz @ weight
                dw += dz.T @ x[rows]
        return dx, dw.to(weight.dtype), None, None, None


def _chunks(x: Tensor, weight: Tensor) -> Iterator[slice]:
    n = max(1, CHUNK // weight.shape[0])
    return (slice(i, i + n) for i in range(0, x.shape[0], n))


def _own_rows(local: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the row of each label on this rank, and whether the rank holds it; where it does not,
    the row is arbitrary."""
    mine = (local >= 0) & (local < weight.shape[0])
    return local.clamp(0, weight.shape[0] - 1), mine


def parallel_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor, group: ProcessGroup
) -> Tensor:
    """Computes ops.linear_cross_entropy where `weight` [V/t, D] holds this rank's rows;  x [N, D],
    labels and token_weight [N], the same on every rank -> float32 scalar, the same on every rank.
    Ranks exchange two numbers for each token. The gradient of x is this rank's share, which must be
    summed over ranks."""
    loss: Tensor = _Loss.apply(x, weight, labels, token_weight, group)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return loss
