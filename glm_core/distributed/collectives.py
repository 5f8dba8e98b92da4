"""Defines the collectives between tensor-parallel ranks with their gradients: the conjugate
pairs of Megatron-LM (Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2), on
torch's functional collectives; and the exchange of rows between ranks that share experts. Shapes: B
batch, L sequence, D width; L/t a sequence-parallel rank's part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as functional

from glm_core.versions import functional_all_gather, functional_reduce_scatter

SEQUENCE = 1
"""the dim that sequence parallelism splits"""


def all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    """Returns the sum over the group's ranks, on every rank. It has no gradient."""
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group))


def all_gather(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """Returns the ranks' tensors concatenated along `dim`, on every rank. It has no gradient."""
    return functional.wait_tensor(functional_all_gather(x.contiguous(), dim, group))


def reduce_scatter(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """Returns this rank's part, along `dim`, of the sum over the group's ranks. It has no
    gradient."""
    summed = functional_reduce_scatter(x.contiguous(), "sum", dim, group)
    return functional.wait_tensor(summed)


def all_to_all(x: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
    """Sends the first sent[0] rows of x to rank 0, the next sent[1] to rank 1, and so on. Returns
    the rows that the ranks sent here, in the ranks' order, received[r] of them from rank r. It has
    no gradient."""
    return functional.wait_tensor(
        functional.all_to_all_single(x.contiguous(), received, sent, group)
    )


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, received: list[int], sent: list[int], group: ProcessGroup
    ) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return all_to_all(x, received, sent, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return all_to_all(grads[0], ctx.sent, ctx.received, ctx.group), None, None, None


def exchange(x: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
    """Returns what `all_to_all` does, with the gradient sent back the same way."""
    y: Tensor = _Exchange.apply(x, received, sent, group)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return y


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return all_reduce(grads[0], ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, group, SEQUENCE)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return reduce_scatter(grads[0], ctx.group, SEQUENCE), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter(x, group, SEQUENCE)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return all_gather(grads[0], ctx.group, SEQUENCE), None


def enter(x: Tensor, group: ProcessGroup, sp: bool) -> Tensor:
    """Enters the part of a layer that is split over ranks. Returns x, whose gradient is summed over
    the ranks; where `sp`, gathers [B, L/t, D] -> [B, L, D]."""
    y: Tensor = _Gather.apply(x, group) if sp else _Copy.apply(x, group)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return y


def leave(x: Tensor, group: ProcessGroup, sp: bool) -> Tensor:
    """Leaves the part of a layer that is split over ranks. Returns the sum of the ranks' results;
    where `sp`, this rank's part of it, [B, L, D] -> [B, L/t, D]."""
    y: Tensor = _Scatter.apply(x, group) if sp else _Sum.apply(x, group)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return y
