"""Where masters live besides flat shards: on every rank (stage 0, float32) or in FSDP2's DTensors
(stage 3), both with the interface of `zero.Shards`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from glm_core.distributed.norm import Piece, pieces
from glm_core.distributed.zero import Shards
from glm_core.training.optimizer import own_part


class Span(NamedTuple):
    """A run of a parameter's elements whose master, and optimizer state, this rank keeps."""

    param: nn.Parameter
    start: int
    """of the run in the flattened parameter"""
    master: nn.Parameter
    """the key of the optimizer's state"""
    of_master: slice
    """in the master's local tensor, flattened"""


Select = Callable[[nn.Parameter], Tensor | None]
"""of a master: itself, its gradient, or a moment"""


class Holder(Protocol):
    """The parameters of one optimizer group: gradients in, masters out."""

    enabled: bool
    params: list[nn.Parameter]

    @property
    def masters(self) -> list[nn.Parameter]: ...
    def backward_done(self, last: bool) -> None: ...
    def pieces(self, copies: Callable[[nn.Parameter], int]) -> list[Piece]: ...
    def publish(self) -> None: ...
    def adopt(self) -> None: ...
    def zero_grad(self) -> None: ...
    def spans(self, every_rank: bool = False) -> Iterator[Span]: ...
    def full(self, param: nn.Parameter, select: Select) -> Tensor | None: ...


class Flat(Shards):
    """`Shards` as a Holder."""

    @property
    def masters(self) -> list[nn.Parameter]:
        """What the optimizer updates."""
        return [self.master]

    def spans(self, every_rank: bool = False) -> Iterator[Span]:
        """See Span; in stage 0 rank 0 of the group stands for all, unless every_rank."""
        if self.shards == 1 and self.rank and not every_rank:
            return
        for param, there, here in self.segments():
            yield Span(param, there.start, self.master, here)

    def full(self, param: nn.Parameter, select: Select) -> Tensor | None:
        """All elements of a parameter's master, gradient or moment, in its shape; a collective."""
        flat = select(self.master)
        return None if flat is None else self.whole(flat)[param]


class Replicas:
    """Float32 parameters that are their own masters on every rank; gradients are all-reduced at the
    end of the accumulation, in place."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        group: dist.ProcessGroup | None,
        *,
        divide: float,
        predivide: float = 1.0,
        bucket: int,
    ) -> None:
        self.masters = self.params = list(params)
        self.group = group
        self.divide, self.predivide, self.bucket = divide, predivide, bucket
        self.enabled = True

    def backward_done(self, last: bool) -> None:
        """Sums over ranks, if it was the last micro-batch. A parameter without gradient counts as
        zero, since it may have one elsewhere."""
        if not last:
            return
        batch: list[nn.Parameter] = []
        for p in reversed(self.masters):
            if batch and sum(b.numel() for b in batch) + p.numel() > self.bucket:
                self._reduce(batch)
                batch = []
            batch.append(p)
        self._reduce(batch)

    def unreduced(self, param: nn.Parameter) -> Tensor:
        """See Shards.unreduced."""
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        return param.grad

    @torch.no_grad()
    def _reduce(self, params: list[nn.Parameter]) -> None:
        for p in params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in params if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in grads])
        if self.predivide != 1:
            flat /= self.predivide
        if dist.is_initialized() and dist.get_world_size(self.group) > 1:
            dist.all_reduce(flat, group=self.group)
        flat /= self.divide / self.predivide
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view(grad.shape))

    def pieces(self, copies: Callable[[nn.Parameter], int]) -> list[Piece]:
        """See Shards.pieces."""
        return [Piece(p.grad, copies(p)) for p in self.masters if p.grad is not None]

    def publish(self) -> None:
        """Nothing to do: the masters are the parameters."""

    adopt = publish

    def zero_grad(self) -> None:
        """Forgets all gradients."""
        for p in self.masters:
            p.grad = None

    def spans(self, every_rank: bool = False) -> Iterator[Span]:
        """Rank 0 of the group stands for all, unless every_rank."""
        if every_rank or not dist.is_initialized() or dist.get_rank(self.group) == 0:
            for p in self.masters:
                yield Span(p, 0, p, slice(0, p.numel()))

    def full(self, param: nn.Parameter, select: Select) -> Tensor | None:
        """See Flat.full; no collective."""
        value = select(param)
        return None if value is None else value.detach().reshape(param.shape).clone()


class Parted:
    """The DTensors that `zero.shard_parameters` made; FSDP2 reduces their gradients itself."""

    def __init__(self, params: Sequence[nn.Parameter], ranks: int) -> None:
        self.masters = self.params = list(params)
        self.ranks, self.enabled = ranks, True

    def backward_done(self, last: bool) -> None:
        """FSDP2 has reduced them."""

    def publish(self) -> None:
        """FSDP2 gathers before the next forward."""

    adopt = publish

    def pieces(self, copies: Callable[[nn.Parameter], int]) -> list[Piece]:
        """Raises GlmCoreError for gradients still to be summed."""
        return [
            piece
            for p in self.masters
            if p.grad is not None
            for piece in pieces([p.grad], copies(p))
        ]

    def zero_grad(self) -> None:
        """Forgets all gradients."""
        for p in self.masters:
            p.grad = None

    def spans(self, every_rank: bool = False) -> Iterator[Span]:
        """Sharded over dimension 0, so each rank's part is one run of elements."""
        for p in self.masters:
            assert isinstance(p, DTensor)
            own, rank = p.to_local(), p.device_mesh.get_local_rank(p.device_mesh.ndim - 1)
            rows = -(-p.shape[0] // p.device_mesh.size(p.device_mesh.ndim - 1)) if p.ndim else 1
            if own.numel():
                start = rank * rows * (p.numel() // p.shape[0])
                yield Span(p, start, p, slice(0, own.numel()))

    def full(self, param: nn.Parameter, select: Select) -> Tensor | None:
        """See Flat.full."""
        value = select(param)
        return value.full_tensor().detach() if isinstance(value, DTensor) else value


def flat(tensor: Tensor) -> Tensor:
    """This rank's elements as a vector that shares their memory."""
    return own_part(tensor.detach()).view(-1)
