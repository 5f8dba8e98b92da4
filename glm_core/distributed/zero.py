"""Decides what each data-parallel rank keeps of the masters, gradients and optimizer state in ZeRO
0 to 2: flat shards (Rajbhandari et al. 2020, section 5). ZeRO 3 is in `fsdp`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from glm_core.distributed.norm import GradientPart
from glm_core.distributed.precision import Precision
from glm_core.training.optimizer import own_part
from glm_core.versions import all_gather_single, reduce_scatter_single

BUCKET = 2**25
"""elements reduced by one collective"""


class Segment(NamedTuple):
    """Consecutive elements of a parameter that belong to this rank's shard."""

    param: nn.Parameter
    of_param: slice
    """in the parameter's local tensor, flattened"""
    of_shard: slice
    """in `Shards.master`"""


class _Bucket(NamedTuple):
    """Parameters whose gradients one collective reduces. Flattened one after another and padded,
    they are cut into parts of equal size, one per rank."""

    params: list[nn.Parameter]
    start: int
    """where this rank's part begins in its shard"""
    part: int
    """elements per rank, the padding of the last ranks included"""


class Shards:
    """One optimizer group's parameters and this rank's part of their float32 masters. Every
    data-parallel rank holds the parameters whole, in `precision.compute`. `master` is one flat
    vector, for any element-wise torch optimizer.

    In stage 0 every rank keeps all masters and gradients are all-reduced. In stages 1 and 2 each of
    n ranks keeps 1/n of the masters, of the gradient and so of the optimizer's state. Stage 2
    reduces bucket by bucket during every backward, so that a rank never holds all gradients whole.

    Call `backward_done(last)` after each micro-batch: it takes the parameters' gradients away
    (`.grad` becomes None), and after the last one `master.grad` holds the sum over ranks and
    micro-batches / divide. Then step the optimizer and call `publish`. Where parameters are
    DTensors (tensor parallel) all of this works on their local tensors, and `group` is the
    data-parallel dimension's."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        group: dist.ProcessGroup | None,
        *,
        stage: int,
        divide: float,
        precision: Precision = Precision(),  # noqa: B008  # frozen
        predivide: float = 1.0,
        bucket: int = BUCKET,
    ) -> None:
        """divide: 1 for sums of gradients that are weighted already, the number of ranks for means;
        predivide: this factor of it is divided out before the sum (float16 range); bucket: elements
        reduced by one collective."""
        self.params, self.group, self.stage = list(params), group, stage
        self.divide, self.predivide, self.precision = divide, predivide, precision
        self.ranks = dist.get_world_size(group) if dist.is_initialized() else 1
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0
        self.shards = self.ranks if stage else 1
        self.buckets = list(self._fill(bucket))
        self.device = own_part(self.params[0]).device
        last = self.buckets[-1]
        self.master = nn.Parameter(self._empty(last.start + last.part))
        self.master.grad = None
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._seen: set[nn.Parameter] = set()
        self._next = 0
        """index of the bucket that is reduced next"""
        self.sync = True
        """False: backward only accumulates on this rank, whatever the stage (`no_sync`)"""
        self.adopt()
        if stage == 2:
            for p in self.params:
                p.register_post_accumulate_grad_hook(self._arrived)

    def _empty(self, size: int) -> Tensor:
        """Returns float32 memory where the masters are to be."""
        return torch.empty(size, device=self.device)

    def _fill(self, most: int) -> Iterator[_Bucket]:
        """Yields buckets of at most `most` elements (or one parameter), roughly in the order in
        which backward finishes them."""
        params: list[nn.Parameter] = []
        size = start = 0
        for p in reversed(self.params):
            if params and size + own_part(p).numel() > most:
                bucket = _Bucket(params, start, -(-size // self.shards))
                yield bucket
                start += bucket.part
                params, size = [], 0
            params.append(p)
            size += own_part(p).numel()
        yield _Bucket(params, start, -(-size // self.shards))

    @torch.no_grad()
    def adopt(self) -> None:
        """Sets the masters from the parameters: at the start, and after new weights were loaded."""
        self.master.zero_()  # padding stays zero: it must not become NaN in the optimizer
        for param, there, here in self.segments():
            self.master[here] = own_part(param).reshape(-1)[there].float()

    def segments(self) -> Iterator[Segment]:
        """Yields which elements of which parameter `master` consists of (its gradient and optimizer
        state are laid out alike)."""
        index = self.rank if self.shards > 1 else 0
        for bucket in self.buckets:
            # begin, end, first, low and high count from the bucket's first element
            begin, end, first = index * bucket.part, (index + 1) * bucket.part, 0
            for p in bucket.params:
                low, high = max(begin, first), min(end, first + own_part(p).numel())
                if low < high:
                    of_shard = slice(bucket.start + low - begin, bucket.start + high - begin)
                    yield Segment(p, slice(low - first, high - first), of_shard)
                first += own_part(p).numel()

    def gradient_parts(self, copies: Callable[[nn.Parameter], int]) -> list[GradientPart]:
        """Returns the gradient for `norm.global_norm`. copies(p): how many ranks of the norm's
        group hold the same elements of the parameter; for a plain one all of them."""
        grad = self.master.grad
        if grad is None:
            return []
        return [
            GradientPart(grad[s.of_shard], copies(s.param) // self.shards) for s in self.segments()
        ]

    def backward_done(self, last: bool) -> None:
        """Takes the gradients of one micro-batch. Call it on all ranks alike; `last`: it ends the
        accumulation."""
        if self.stage == 2 and self.sync:
            self._flush()
        elif not last and self.precision.low:
            self._widen()
        if last and not (self.stage == 2 and self.sync):
            self._widen()
            self._flush()

    def unreduced(self, param: nn.Parameter) -> Tensor:
        """Returns this rank's gradient of all micro-batches so far, which may be changed in place
        before the last `backward_done` (not in stage 2)."""
        self._widen()
        if self.precision.low:
            zeros = torch.zeros_like(param, dtype=torch.float32)
            return self._sums.setdefault(param, zeros)
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        return param.grad

    def _widen(self) -> None:
        """Adds 16-bit gradients to float32 sums: a bfloat16 sum would lose small summands."""
        if not self.precision.low:
            return
        for p in self.params:
            if p.grad is not None:
                grad = own_part(p.grad).float()
                self._sums[p] = self._sums[p].add_(grad) if p in self._sums else grad
                p.grad = None

    def _arrived(self, param: nn.Parameter) -> None:
        if not self.sync:
            return
        self._seen.add(param)
        # in a fixed order, as DistributedDataParallel: ranks may finish buckets in other orders
        while self._next < len(self.buckets) - 1 and self._seen.issuperset(
            self.buckets[self._next].params
        ):
            self._reduce(self.buckets[self._next])
            self._next += 1

    def _flush(self) -> None:
        """Reduces the buckets that are left; a parameter without gradient counts as zero."""
        for bucket in self.buckets[self._next :]:
            self._reduce(bucket)
        self._next = 0
        self._seen.clear()

    @torch.no_grad()
    def _reduce(self, bucket: _Bucket) -> None:
        flat = torch.zeros(
            bucket.part * self.shards, dtype=self.precision.reduce, device=self.device
        )
        start = 0
        for p in bucket.params:
            view = flat[start : start + own_part(p).numel()]
            if p in self._sums:
                view.copy_(self._sums.pop(p).view(-1))
            if p.grad is not None:
                view += own_part(p.grad).reshape(-1).to(view.dtype)
                p.grad = None
            start += own_part(p).numel()
        if self.predivide != 1:
            flat /= self.predivide
        own = self._sum_over_ranks(flat, bucket.part).float() / (self.divide / self.predivide)
        self._keep(own, slice(bucket.start, bucket.start + bucket.part))

    def _keep(self, own: Tensor, place: slice) -> None:
        """Adds this rank's part of a bucket's gradient to the gradient of the masters."""
        if self.master.grad is None:
            self.master.grad = torch.zeros_like(self.master)
        self.master.grad[place] += own

    def _sum_over_ranks(self, flat: Tensor, part: int) -> Tensor:
        if self.ranks == 1:
            return flat
        if self.shards == 1:
            dist.all_reduce(flat, group=self.group)
            return flat
        own = flat.new_empty(part)
        reduce_scatter_single(own, flat, group=self.group)
        return own

    def zero_grad(self) -> None:
        """Discards all gradients, half-accumulated ones too."""
        self.master.grad = None
        self._sums.clear()
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Sets every rank's parameters from all ranks' masters, rounded to the parameters'
        dtype."""
        for bucket in self.buckets:
            dtype = own_part(bucket.params[0]).dtype
            for p, values in self._gathered(bucket, self.master.detach(), dtype):
                own_part(p).copy_(values.view(own_part(p).shape))

    @torch.no_grad()
    def whole(self, flat: Tensor) -> dict[nn.Parameter, Tensor]:
        """Returns all elements of a vector laid out like `master` (itself, its gradient, a moment),
        by parameter and in the parameter's local shape. A collective of the group."""
        return {
            p: values.reshape(own_part(p).shape).clone()
            for bucket in self.buckets
            for p, values in self._gathered(bucket, flat.detach(), flat.dtype)
        }

    def _rounded(self, flat: Tensor, place: slice, dtype: torch.dtype) -> Tensor:
        """Returns elements of a vector laid out like `master`, on the parameters' device."""
        return flat[place].to(dtype)

    def _gathered(
        self, bucket: _Bucket, flat: Tensor, dtype: torch.dtype
    ) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yields each of the bucket's parameters with its elements, gathered from all ranks."""
        own = self._rounded(flat, slice(bucket.start, bucket.start + bucket.part), dtype)
        if self.shards > 1:
            whole = own.new_empty(bucket.part * self.shards)
            all_gather_single(whole, own, group=self.group)
            own = whole
        start = 0
        for p in bucket.params:
            yield p, own[start : start + own_part(p).numel()]
            start += own_part(p).numel()
