"""What each data-parallel rank keeps: ZeRO stages 0 to 2 over flat shards, stage 3 over FSDP2
(Rajbhandari et al. 2020, section 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from glm_core.distributed.norm import Piece
from glm_core.distributed.precision import Precision
from glm_core.distributed.split import Split, to_meta
from glm_core.training.optimizer import own_part

BUCKET = 2**25
"""elements reduced by one collective"""


class Segment(NamedTuple):
    """A run of elements that both a parameter and this rank's shard have."""

    param: nn.Parameter
    of_param: slice
    """in the parameter's local tensor, flattened"""
    of_shard: slice
    """in `Shards.master`"""


class _Bucket(NamedTuple):
    params: list[nn.Parameter]
    start: int
    """of its part in this rank's shard"""
    part: int
    """elements of each rank; the last ranks' may end in padding"""


class Shards:
    """Parameters of one optimizer group that every data-parallel rank holds whole, in `compute`,
    and this rank's part of their float32 masters: `master`, flat, for any element-wise
    torch optimizer. Stage 0: every rank keeps all masters and gradients are all-reduced. Stages 1
    and 2: each keeps 1/n of them, of the gradient and so of the optimizer's state; 2 reduces bucket
    by bucket during every backward, so that whole gradients never are there all at once.

    Per micro-batch call `backward_done(last)`; before the optimizer's step `master.grad` then holds
    sum over ranks and micro-batches / divide; after it call `publish`. Gradients of the parameters
    are taken away (`.grad` None). Works on local tensors where parameters are DTensors (tensor
    parallel): `group` is then the data-parallel dimension's."""

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
        """divide: 1 for sums of gradients already weighted, the number of ranks for means;
        predivide: this factor of it is divided out before the sum (float16 range)."""
        self.params, self.group, self.stage = list(params), group, stage
        self.divide, self.predivide, self.precision = divide, predivide, precision
        self.ranks = dist.get_world_size(group) if dist.is_initialized() else 1
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0
        self.shards = self.ranks if stage else 1
        self.buckets = list(self._fill(bucket))
        self.device = own_part(self.params[0]).device
        last = self.buckets[-1]
        self.master = nn.Parameter(torch.empty(last.start + last.part, device=self.device))
        self.master.grad = None
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._seen: set[nn.Parameter] = set()
        self._next, self._bucket_of = (
            0,
            {p: i for i, b in enumerate(self.buckets) for p in b.params},
        )
        self.enabled = True
        """False: backward only accumulates, whatever the stage (`no_sync`)"""
        self.adopt()
        if stage == 2:
            for p in self.params:
                p.register_post_accumulate_grad_hook(self._arrived)

    def _fill(self, most: int) -> Iterator[_Bucket]:
        """Buckets in the order in which backward, roughly, finishes them."""
        params: list[nn.Parameter] = []
        size = start = 0
        for p in reversed(self.params):
            if params and size + own_part(p).numel() > most:
                yield _Bucket(params, start, -(-size // self.shards))
                start += -(-size // self.shards)
                params, size = [], 0
            params.append(p)
            size += own_part(p).numel()
        yield _Bucket(params, start, -(-size // self.shards))

    @torch.no_grad()
    def adopt(self) -> None:
        """Masters from the parameters as they are now (at the start, or after new weights came)."""
        self.master.zero_()  # padding stays zero: it must not become NaN in the optimizer
        for param, there, here in self.segments():
            self.master[here] = own_part(param).reshape(-1)[there].float()

    def segments(self) -> Iterator[Segment]:
        """Where each piece of `master` (and of its gradient and optimizer state) belongs."""
        index = self.rank if self.shards > 1 else 0
        for bucket in self.buckets:
            begin, end, at = index * bucket.part, (index + 1) * bucket.part, 0
            for p in bucket.params:
                low, high = max(begin, at), min(end, at + own_part(p).numel())
                if low < high:
                    here = slice(bucket.start + low - begin, bucket.start + high - begin)
                    yield Segment(p, slice(low - at, high - at), here)
                at += own_part(p).numel()

    def pieces(self, copies: Callable[[nn.Parameter], int]) -> list[Piece]:
        """The gradient for `norm.global_norm`. copies(p): ranks of the norm's group that hold the
        same elements of the parameter (for a plain one all; see `norm.pieces`)."""
        grad = self.master.grad
        if grad is None:
            return []
        return [Piece(grad[s.of_shard], copies(s.param) // self.shards) for s in self.segments()]

    def backward_done(self, last: bool) -> None:
        """After each micro-batch's backward, on all ranks alike; last: it ends the accumulation."""
        if self.stage == 2 and self.enabled:
            self._flush()
        elif not last and self.precision.low:
            self._widen()
        if last and not (self.stage == 2 and self.enabled):
            self._widen()
            self._flush()

    def unreduced(self, param: nn.Parameter) -> Tensor:
        """This rank's gradient of all micro-batches so far, to be changed in place before the last
        `backward_done` (not in stage 2)."""
        self._widen()
        if self.precision.low:
            zeros = torch.zeros_like(param, dtype=torch.float32)
            return self._sums.setdefault(param, zeros)
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        return param.grad

    def _widen(self) -> None:
        """Sums over micro-batches are float32: a bfloat16 sum forgets small summands."""
        if not self.precision.low:
            return
        for p in self.params:
            if p.grad is not None:
                grad = own_part(p.grad).float()
                self._sums[p] = self._sums[p].add_(grad) if p in self._sums else grad
                p.grad = None

    def _arrived(self, param: nn.Parameter) -> None:
        if not self.enabled:
            return
        self._seen.add(param)
        # in fixed order, as DistributedDataParallel does: ranks may finish in different ones
        while self._next < len(self.buckets) - 1 and self._seen.issuperset(
            self.buckets[self._next].params
        ):
            self._reduce(self.buckets[self._next])
            self._next += 1

    def _flush(self) -> None:
        """Reduces what is left; a parameter without gradient counts as zero."""
        for bucket in self.buckets[self._next :]:
            self._reduce(bucket)
        self._next = 0
        self._seen.clear()

    @torch.no_grad()
    def _reduce(self, bucket: _Bucket) -> None:
        flat = torch.zeros(
            bucket.part * self.shards, dtype=self.precision.reduce, device=self.device
        )
        at = 0
        for p in bucket.params:
            view = flat[at : at + own_part(p).numel()]
            if p in self._sums:
                view.copy_(self._sums.pop(p).view(-1))
            if p.grad is not None:
                view += own_part(p.grad).reshape(-1).to(view.dtype)
                p.grad = None
            at += own_part(p).numel()
        if self.predivide != 1:
            flat /= self.predivide
        own = self._sum_over_ranks(flat, bucket.part).float() / (self.divide / self.predivide)
        if self.master.grad is None:
            self.master.grad = torch.zeros_like(self.master)
        self.master.grad[bucket.start : bucket.start + bucket.part] += own

    def _sum_over_ranks(self, flat: Tensor, part: int) -> Tensor:
        if self.ranks == 1:
            return flat
        if self.shards == 1:
            dist.all_reduce(flat, group=self.group)
            return flat
        own = flat.new_empty(part)
        dist.reduce_scatter_single(own, flat, group=self.group)
        return own

    def zero_grad(self) -> None:
        """Forgets all gradients, also half-accumulated ones."""
        self.master.grad = None
        self._sums.clear()
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Every rank's parameters from all ranks' masters, rounded to their dtype."""
        for bucket in self.buckets:
            for p, values in self._parts(
                bucket, self.master.detach(), own_part(bucket.params[0]).dtype
            ):
                own_part(p).copy_(values.view(own_part(p).shape))

    @torch.no_grad()
    def whole(self, flat: Tensor) -> dict[nn.Parameter, Tensor]:
        """All elements of something laid out like `master` (itself, its gradient, a moment), by
        parameter, in the parameter's local shape; a collective over the group."""
        return {
            p: values.reshape(own_part(p).shape).clone()
            for bucket in self.buckets
            for p, values in self._parts(bucket, flat.detach(), flat.dtype)
        }

    def _parts(
        self, bucket: _Bucket, flat: Tensor, dtype: torch.dtype
    ) -> Iterator[tuple[nn.Parameter, Tensor]]:
        own = flat[bucket.start : bucket.start + bucket.part].to(dtype)
        if self.shards > 1:
            whole = own.new_empty(bucket.part * self.shards)
            dist.all_gather_single(whole, own, group=self.group)
            own = whole
        at = 0
        for p in bucket.params:
            yield p, own[at : at + own_part(p).numel()]
            at += own_part(p).numel()

    @torch.no_grad()
    def scatter(self, flat: Tensor, values: dict[nn.Parameter, Tensor]) -> None:
        """The opposite of `whole`: this rank's part of whole values, into `flat`. No collective."""
        for param, there, here in self.segments():
            if param in values:
                flat[here] = values[param].reshape(-1)[there].to(flat)


def shard_parameters(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    divide: float,
    precision: Precision = Precision(),  # noqa: B008
    blocks: Sequence[nn.Module] | None = None,
    reshard_after_forward: bool = True,
) -> dict[nn.Parameter, nn.Parameter]:
    """Stage 3: FSDP2 over the data-parallel mesh (1-D, or 2-D replicate x shard), in place. The
    module's parameters become float32 DTensor shards, which are the masters; `blocks` (None: see
    `default_blocks`) are gathered one at a time, in `precision.compute`. Gradients come out as
    sums over ranks / divide, in float32. Returns the new parameters, which the optimizer must
    take, by the old ones. Micro-batches accumulate in the shards; see also `defer`."""
    old = dict(module.named_parameters())
    split = to_meta(module)
    for p in old.values():
        if p not in split and p.is_floating_point() and p.dtype != torch.float32:
            p.data = p.data.float()
    policy = MixedPrecisionPolicy(
        param_dtype=precision.compute if precision.low else None,
        reduce_dtype=precision.reduce,
        cast_forward_inputs=precision.low,
    )
    for block in (*(default_blocks(module) if blocks is None else blocks), module):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    sum_gradients(module, divide)
    if split:
        device = torch.device(mesh.device_type)
        module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
        _fill(module, old)
    return {p: module.get_parameter(name) for name, p in old.items()}


def _fill(module: nn.Module, old: dict[str, nn.Parameter]) -> None:
    """The rows that each rank kept of partitioned parameters, into FSDP2's shards."""
    with torch.no_grad():
        for name, p in old.items():
            if isinstance(p, Split):
                own_part(module.get_parameter(name)).copy_(p.part)


def sum_gradients(module: nn.Module, divide: float) -> None:
    """Gradients of every FSDP2 module inside become sums over the ranks / divide."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            # gloo has no PREMUL_SUM; sum, then divide, is the same everywhere
            part.set_force_sum_reduction_for_comms(True)
            part.set_gradient_divide_factor(divide)


def default_blocks(module: nn.Module) -> list[nn.Module]:
    """The layers of outermost nn.ModuleLists, where every parameter is the layer's own (FSDP2
    cannot share one between blocks)."""
    users: dict[nn.Parameter, int] = {}
    for _, p in module.named_parameters(remove_duplicate=False):
        users[p] = users.get(p, 0) + 1
    found: list[nn.Module] = []
    lists = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.ModuleList)]
    for name, layers in lists:
        if any(name.startswith(outer + ".") for outer, m in lists if m is not layers):
            continue
        for layer in layers:
            own = list(layer.parameters())
            if own and all(users[p] == 1 for p in own):
                found.append(layer)
    return found


def defer(module: nn.Module, deferred: bool) -> None:
    """Stage 3: deferred, backward keeps whole gradients on each rank and reduces nothing
    (`no_sync`) until it is called with False before the last backward."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(not deferred)
