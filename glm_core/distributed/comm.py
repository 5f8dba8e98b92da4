"""Joins this process to the other ranks through the backend's library, and defines the five
operations between ranks that a bench measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from glm_core.backends.base import Backend
from glm_core.distributed import mesh
from glm_core.versions import all_gather_single, reduce_scatter_single

REDUCING = ("all_reduce", "reduce_scatter")
"""operations that sum"""


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """This process among the ranks of its group."""

    rank: int
    world: int
    device: torch.device
    library: str
    """torch.distributed backend: gloo, nccl, hccl"""


@contextmanager
def process_group(backend: Backend, timeout_s: float = 60.0) -> Iterator[Member]:
    """Joins the default group over the backend's collective library, as torchrun's variables say,
    and leaves it at the end of the block. Raises ConfigError where torchrun did not start the
    process."""
    device = mesh.start(backend, timeout_s)
    try:
        yield Member(dist.get_rank(), dist.get_world_size(), device, backend.collective)
    finally:
        mesh.leave()


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """One operation on one size, ready to be run many times."""

    run: Callable[[], None]
    wrong: Callable[[], int]
    """returns how many elements of this rank's last result are wrong; sums are of small integers,
    exact in every dtype"""
    refill: Callable[[], None]
    """restores the inputs of an operation that works in place"""


def values(rank: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns what `rank` contributes: element i is (i + 3 rank) mod 5."""
    return ((torch.arange(count, device=device) + 3 * rank) % 5).to(dtype)


def operation(name: str, count: int, dtype: torch.dtype, me: Member) -> Operation:
    """Returns the operation `name`. `count` is the number of elements of the whole array, a
    multiple of the world size; reduce-scatter and all-gather give each rank its share of it."""
    build = {
        "all_reduce": _all_reduce,
        "all_gather": _all_gather,
        "reduce_scatter": _reduce_scatter,
        "all_to_all": _all_to_all,
        "p2p": _ring,
    }[name]
    return build(count, dtype, me)


def _all_reduce(count: int, dtype: torch.dtype, me: Member) -> Operation:
    mine = values(me.rank, count, dtype, me.device)
    x = mine.clone()
    return Operation(
        lambda: _wait(dist.all_reduce(x)),
        lambda: int((x != _total(count, dtype, me)).sum()),
        lambda: _refill(x, mine),
    )


def _all_gather(count: int, dtype: torch.dtype, me: Member) -> Operation:
    share = count // me.world
    mine = values(me.rank, share, dtype, me.device)
    out = torch.empty(count, dtype=dtype, device=me.device)
    want = torch.cat([values(r, share, dtype, me.device) for r in range(me.world)])
    return Operation(
        lambda: _wait(all_gather_single(out, mine)),
        lambda: int((out != want).sum()),
        lambda: _refill(out, None),
    )


def _reduce_scatter(count: int, dtype: torch.dtype, me: Member) -> Operation:
    mine = values(me.rank, count, dtype, me.device)
    out = torch.empty(count // me.world, dtype=dtype, device=me.device)
    want = _total(count, dtype, me).chunk(me.world)[me.rank]
    return Operation(
        lambda: _wait(reduce_scatter_single(out, mine)),
        lambda: int((out != want).sum()),
        lambda: _refill(out, None),
    )


def _all_to_all(count: int, dtype: torch.dtype, me: Member) -> Operation:
    mine = values(me.rank, count, dtype, me.device)
    out = torch.empty_like(mine)
    rows = [values(r, count, dtype, me.device).chunk(me.world) for r in range(me.world)]
    want = torch.cat([row[me.rank] for row in rows])
    return Operation(
        lambda: _wait(dist.all_to_all_single(out, mine)),
        lambda: int((out != want).sum()),
        lambda: _refill(out, None),
    )


def _ring(count: int, dtype: torch.dtype, me: Member) -> Operation:
    """Every rank sends to the next one and receives from the previous one, as nccl-tests' sendrecv
    does."""
    before, after = (me.rank - 1) % me.world, (me.rank + 1) % me.world
    mine = values(me.rank, count, dtype, me.device)
    out = torch.empty_like(mine)
    want = values(before, count, dtype, me.device)

    def run() -> None:
        both = [dist.P2POp(dist.isend, mine, after), dist.P2POp(dist.irecv, out, before)]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    return Operation(run, lambda: int((out != want).sum()), lambda: _refill(out, None))


def _total(count: int, dtype: torch.dtype, me: Member) -> Tensor:
    """Returns the sum over the ranks: at most 4 * world, exact in bfloat16 up to 64 ranks."""
    parts = [values(r, count, torch.float32, me.device) for r in range(me.world)]
    return torch.stack(parts).sum(0).to(dtype)


def _refill(x: Tensor, contents: Tensor | None) -> None:
    x.copy_(contents) if contents is not None else x.fill_(-1)


def _wait(work: dist.Work | None) -> None:
    if work is not None:
        work.wait()


def slowest_times(seconds: list[float], me: Member) -> list[float]:
    """Returns, element by element, the longest time of any rank."""
    times = torch.tensor(seconds, dtype=torch.float32, device=me.device)
    _wait(dist.all_reduce(times, op=dist.ReduceOp.MAX))
    return times.tolist()


def gathered_values(value: float, me: Member) -> list[float]:
    """Returns every rank's value, by rank."""
    table = torch.zeros(me.world, dtype=torch.float32, device=me.device)
    table[me.rank] = value
    _wait(dist.all_reduce(table))
    return table.tolist()


def barrier() -> None:
    """Waits until every rank has arrived."""
    dist.barrier()
