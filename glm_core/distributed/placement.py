"""Decides where the masters of an optimizer's parameter group live: in flat shards (`FlatStore`),
whole on every rank (`ReplicaStore`: ZeRO 0 in float32), or in FSDP2's DTensors (`Zero3Store`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from glm_core.distributed.fsdp import whole
from glm_core.distributed.norm import GradientPart, gradient_parts
from glm_core.distributed.zero import Shards
from glm_core.training.optimizer import own_part


class Span(NamedTuple):
    """Consecutive elements of a flattened parameter whose master this rank keeps."""

    param: nn.Parameter
    start: int
    """the first element's index in the flattened parameter"""
    master: nn.Parameter
    """the parameter that the optimizer updates, and the key of its state"""
    of_master: slice
    """these elements in the master's local tensor, flattened"""

    def copy_from(self, whole: Tensor, local: Tensor) -> None:
        """Copies these elements of `whole`, which has the parameter's shape, into `local`, which is
        laid out like the master's local tensor, flattened."""
        mine = local[self.of_master]
        mine.copy_(whole.reshape(-1)[self.start : self.start + len(mine)])


Select = Callable[[nn.Parameter], Tensor | None]
"""chooses what of a master is meant: itself, its gradient, or a moment"""


class MasterStore(Protocol):
    """The parameters of one optimizer group and their float32 masters."""

    sync: bool
    """False: backward only accumulates gradients on this rank (`no_sync`)"""
    params: list[nn.Parameter]

    @property
    def masters(self) -> list[nn.Parameter]:
        """What the optimizer updates."""
        ...

    def backward_done(self, last: bool) -> None:
        """Takes the gradients of one micro-batch. Call it on all ranks alike; `last`: it ends the
        accumulation, so the masters have their gradients afterwards."""
        ...

    def gradient_parts(self, copies: Callable[[nn.Parameter], int]) -> list[GradientPart]:
        """Returns the gradient for `norm.global_norm`. copies(p): how many ranks of the norm's
        group hold the same elements of the parameter; for a plain one all of them."""
        ...

    def publish(self) -> None:
        """Sets the parameters from the masters, after the optimizer's step."""
        ...

    def adopt(self) -> None:
        """Sets the masters from the parameters, after new weights were loaded."""
        ...

    def zero_grad(self) -> None:
        """Discards all gradients, half-accumulated ones too."""
        ...

    def spans(self, every_rank: bool = False) -> Iterator[Span]:
        """Yields what this rank keeps. Where all ranks keep the same, rank 0 of the group yields it
        for all, unless every_rank."""
        ...

    def full(self, param: nn.Parameter, select: Select) -> Tensor | None:
        """Returns all elements of a parameter's master, gradient or moment, in its shape. A
        collective unless every rank has them."""
        ...


class FlatStore(Shards):
    """`Shards` as a MasterStore."""

    @property
    def masters(self) -> list[nn.Parameter]:
        return [self.master]

    def spans(self, every_rank: bool = False) -> Iterator[Span]:
        if self.shards == 1 and self.rank and not every_rank:
            return
        for param, there, here in self.segments():
            yield Span(param, there.start, self.master, here)

    def full(self, param: nn.Parameter, select: Select) -> Tensor | None:
        flat = select(self.master)
        return None if flat is None else self.whole(flat)[param]


class ReplicaStore:
    """Float32 parameters that are their own masters on every rank. Gradients are all-reduced in
    place at the end of the accumulation."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        group: dist.ProcessGroup | None,
        *,
        divide: float,
        predivide: float = 1.0,
        bucket: int,
    ) -> None:
        """divide: gradients are sum over ranks / divide; predivide: this factor of it is divided
        out before the sum (float16 range); bucket: elements reduced by one collective."""
        self.masters = self.params = list(params)
        self.group = group
        self.divide, self.predivide, self.bucket = divide, predivide, bucket
        self.sync = True

    def backward_done(self, last: bool) -> None:
        """Sums over ranks after the last micro-batch. A parameter without gradient counts as zero,
        since it may have one on another rank."""
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

    def gradient_parts(self, copies: Callable[[nn.Parameter], int]) -> list[GradientPart]:
        return [GradientPart(p.grad, copies(p)) for p in self.masters if p.grad is not None]

    def publish(self) -> None:
        """Does nothing: the masters are the parameters."""

    adopt = publish

    def zero_grad(self) -> None:
        for p in self.masters:
            p.grad = None

    def spans(self, every_rank: bool = False) -> Iterator[Span]:
        if every_rank or not dist.is_initialized() or dist.get_rank(self.group) == 0:
            for p in self.masters:
                yield Span(p, 0, p, slice(0, p.numel()))

    def full(self, param: nn.Parameter, select: Select) -> Tensor | None:
        value = select(param)
        return None if value is None else value.detach().reshape(param.shape).clone()


class Zero3Store:
    """The DTensors that `fsdp.shard_parameters` made; FSDP2 reduces their gradients itself."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        self.masters = self.params = list(params)
        self.sync = True

    def master(self, param: nn.Parameter) -> nn.Parameter:
        """Returns what the optimizer updates for a parameter, with the gradient of all backwards so
        far."""
        return param

    def backward_done(self, last: bool) -> None:
        """Does nothing: FSDP2 has reduced the gradients."""

    def publish(self) -> None:
        """Does nothing: FSDP2 gathers the parameters before the next forward."""

    adopt = publish

    def gradient_parts(self, copies: Callable[[nn.Parameter], int]) -> list[GradientPart]:
        """Raises GlmCoreError for gradients still to be summed."""
        return [
            part
            for p in self.params
            if p.grad is not None
            for part in gradient_parts([p.grad], copies(p))
        ]

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    def spans(self, every_rank: bool = False) -> Iterator[Span]:
        """Yields one span per parameter: it is sharded over dimension 0, so a rank's rows are
        consecutive elements."""
        for p in self.params:
            assert isinstance(p, DTensor)
            shard_dim = p.device_mesh.ndim - 1
            ranks, rank = p.device_mesh.size(shard_dim), p.device_mesh.get_local_rank(shard_dim)
            num_local = p.to_local().numel()
            if num_local:
                rows_per_rank = -(-p.shape[0] // ranks) if p.ndim else 1
                row_elements = p.numel() // p.shape[0]
                start = rank * rows_per_rank * row_elements
                yield Span(p, start, self.master(p), slice(0, num_local))

    def full(self, param: nn.Parameter, select: Select) -> Tensor | None:
        value = select(self.master(param))
        return whole(value).detach() if isinstance(value, DTensor) else value


def flat(tensor: Tensor) -> Tensor:
    """Returns this rank's elements as a vector that shares their memory."""
    return own_part(tensor.detach()).view(-1)
