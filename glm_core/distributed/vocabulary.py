"""Cross-entropy over a vocabulary whose rows the ranks share out. Shapes: N tokens, D width, V
vocabulary of all ranks, t ranks."""

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
"""float32 logits that exist at once: 16 MiB, whatever N and V"""


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
        stats = []  # of each chunk [2, n]: logsumexp and the label's logit, over this rank's rows
        for rows in _chunks(x, weight):
            z = wide(ops.linear(x[rows], weight))  # [n, V/t]
            at, mine = _own(local[rows], weight)
            target = z.gather(1, at[:, None])[:, 0].where(mine, z.new_zeros(()))
            stats.append(torch.stack((z.logsumexp(1), target)))
        every = all_gather(torch.cat(stats, 1)[None], group, 0)  # [t, 2, N]
        total = every[:, 0].logsumexp(0)
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
                z = wide(ops.linear(x[rows], weight))
                at, mine = _own(local[rows], weight)
                p = (z - total[rows, None]).exp_()  # softmax over all ranks' rows, this rank's part
                p.scatter_add_(1, at[:, None], -mine.to(p.dtype)[:, None])
                dz = p.mul_(scale[rows, None]).to(x.dtype)
                dx[rows] = dz @ weight
                dw += dz.T @ x[rows]
        return dx, dw.to(weight.dtype), None, None, None


def _chunks(x: Tensor, weight: Tensor) -> Iterator[slice]:
    n = max(1, CHUNK // weight.shape[0])
    return (slice(i, i + n) for i in range(0, x.shape[0], n))


def _own(local: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Row of each label on this rank, any row where it is another's; and whether it is its own."""
    mine = (local >= 0) & (local < weight.shape[0])
    return local.clamp(0, weight.shape[0] - 1), mine


def parallel_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor, group: ProcessGroup
) -> Tensor:
    """ops.linear_cross_entropy with `weight` [V/t, D] the rank's rows; x [N, D], labels and
    token_weight [N] the same on every rank -> float32 scalar, the same on every rank. Two numbers a
    token travel. The gradient of x is this rank's share: the shares' sum is the whole."""
    loss: Tensor = _Loss.apply(x, weight, labels, token_weight, group)  # type: ignore[no-untyped-call]
    return loss
