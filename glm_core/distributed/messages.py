"""Says what a collective operator of torch's should deliver: which parts each rank sends, and which
of them each rank receives. The ranks show each other what they sent through the job's store, not
through the collective that is on trial."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed import ProcessGroup
from torch.distributed import distributed_c10d as c10d

from glm_core.versions import lack_of

MOST = 1 << 18
"""elements of one collective that a rank shows the others; of longer parts a random choice"""
PATIENCE_S = 60.0
"""so long a rank waits for what the others sent"""
REDUCTIONS = ("sum", "avg", "product", "min", "max", "band", "bor", "bxor")
"""by c10d's number of the operation"""
_COUNT: Counter[str] = Counter()
"""by group: the collectives that this process has shown; the same on all ranks"""
_SILENT: dict[str, str] = {}
"""by group: why its messages are no longer compared"""
Source = tuple[int, int]
"""a rank, and the number of a part that it sends"""


class MessagesError(Exception):
    """Says why the ranks' messages cannot be compared."""


@dataclasses.dataclass(frozen=True, slots=True)
class Collective:
    """One rank's side of a collective."""

    name: str
    group: ProcessGroup
    rank: int
    """within the group"""
    sent: list[Tensor]
    """the parts that this rank sends"""
    received: Callable[[Any], Sequence[Tensor]]
    """takes what the operator returned, returns the parts that arrived here"""
    sources: list[list[Source]]
    """by received part: the parts that it is made of"""
    reduction: str = ""
    """how they are combined; empty: there is one, and it arrives as it is"""


@dataclasses.dataclass(frozen=True, slots=True)
class _Arguments:
    """The arguments of a collective."""

    values: dict[str, Any]
    group: ProcessGroup

    @property
    def world(self) -> int:
        return self.group.size()

    @property
    def rank(self) -> int:
        return self.group.rank()

    def every(self, part: int) -> list[Source]:
        """Returns this part of every rank."""
        return [(rank, part) for rank in range(self.world)]


Side = tuple[Sequence[Tensor], Callable[[Any], Sequence[Tensor]], list[list[Source]]]
"""what is sent, how to read what arrived, and what that is made of"""


def _listed(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x)


def _chunks(x: Tensor, world: int) -> list[Tensor]:
    return list(x.reshape(-1).chunk(world)) if x.numel() else [x.reshape(-1)] * world


def _reduce(a: _Arguments, sent: Any, received: Any) -> Side:
    tensors = _listed(sent)
    return tensors, received, [a.every(j) for j in range(len(tensors))]


def _gather(a: _Arguments, sent: Any, received: Any) -> Side:
    tensors = _listed(sent)
    return tensors, received, [[(q, j)] for j in range(len(tensors)) for q in range(a.world)]


def _reduce_scatter(a: _Arguments, sent: list[Tensor], received: Any) -> Side:
    count = len(sent) // a.world
    return sent, received, [a.every(j * a.world + a.rank) for j in range(count)]


def _exchange(a: _Arguments, sent: Sequence[Tensor], received: Any) -> Side:
    return sent, received, [[source] for source in a.every(a.rank)]


def _broadcast(a: _Arguments, sent: Any, received: Any) -> Side:
    tensors = _listed(sent)
    root = a.values["root_rank"] if "root_rank" in a.values else a.values["src"]
    return tensors, received, [[(root, j)] for j in range(len(tensors))]


def _cut(a: _Arguments, tensors: Any) -> list[Tensor]:
    """Cuts each tensor in one chunk per rank."""
    return [chunk for x in _listed(tensors) for chunk in _chunks(x, a.world)]


def _split(x: Tensor, sizes: Sequence[int], world: int) -> Sequence[Tensor]:
    """Splits rows as an exchange does: evenly where no sizes are given."""
    return x.split(list(sizes) or [x.shape[0] // world] * world)


def _only_root(a: _Arguments, side: Side) -> Side:
    sent, received, sources = side
    mine = a.rank == a.values["root_rank"]
    return sent, received if mine else lambda _: (), sources if mine else []


def _scatter(a: _Arguments) -> Side:
    given, root = a.values["input_tensors"], a.values["root_rank"]
    sent = given[0] if given else []
    return sent, lambda _: a.values["output_tensors"], [[(root, a.rank)]]


_SIDES: dict[str, Callable[[_Arguments], Side]] = {
    "c10d::allreduce_": lambda a: _reduce(a, a.values["tensors"], lambda _: a.values["tensors"]),
    "c10d::reduce_": lambda a: _only_root(
        a, _reduce(a, a.values["tensors"], lambda _: a.values["tensors"])
    ),
    "c10d::broadcast_": lambda a: _broadcast(a, a.values["tensors"], lambda _: a.values["tensors"]),
    "c10d::_allgather_base_": lambda a: _gather(
        a, a.values["input_tensor"], lambda _: _cut(a, a.values["output_tensor"])
    ),
    "c10d::allgather_into_tensor_coalesced_": lambda a: _gather(
        a, a.values["inputs"], lambda _: _cut(a, a.values["outputs"])
    ),
    "c10d::allgather_": lambda a: _gather(
        a, a.values["input_tensors"], lambda _: a.values["output_tensors"][0]
    ),
    "c10d::allgather_coalesced_": lambda a: _gather(
        a,
        a.values["input_list"],
        lambda _: [y for own in zip(*a.values["output_lists"], strict=True) for y in own],
    ),
    "c10d::gather_": lambda a: _only_root(
        a, _gather(a, a.values["input_tensors"], lambda _: a.values["output_tensors"][0])
    ),
    "c10d::_reduce_scatter_base_": lambda a: _reduce_scatter(
        a, _cut(a, a.values["input_tensor"]), lambda _: [a.values["output_tensor"].reshape(-1)]
    ),
    "c10d::reduce_scatter_tensor_coalesced_": lambda a: _reduce_scatter(
        a,
        _cut(a, a.values["inputs"]),
        lambda _: [y.reshape(-1) for y in a.values["outputs"]],
    ),
    "c10d::reduce_scatter_": lambda a: _reduce_scatter(
        a, a.values["input_tensors"][0], lambda _: a.values["output_tensors"]
    ),
    "c10d::scatter_": _scatter,
    "c10d::alltoall_": lambda a: _exchange(
        a, a.values["input_tensors"], lambda _: a.values["output_tensors"]
    ),
    "c10d::alltoall_base_": lambda a: _exchange(
        a,
        _split(a.values["input"], a.values["input_split_sizes"], a.world),
        lambda _: _split(a.values["output"], a.values["output_split_sizes"], a.world),
    ),
    "_c10d_functional::all_to_all_single": lambda a: _exchange(
        a,
        _split(a.values["input"], a.values["input_split_sizes"], a.world),
        lambda out: _split(out, a.values["output_split_sizes"], a.world),
    ),
}
_SIDES["c10d::allreduce_coalesced_"] = _SIDES["c10d::allreduce_"]


def _functional(kind: str, side: Callable[[_Arguments, Any], Side]) -> None:
    for name in (kind, f"{kind}_", f"{kind}_out", f"{kind}_coalesced", f"{kind}_coalesced_"):
        _SIDES[f"_c10d_functional::{name}"] = lambda a: side(
            a, a.values["input"] if "input" in a.values else a.values["inputs"]
        )


_functional("all_reduce", lambda a, x: _reduce(a, x, _listed))
_functional("broadcast", lambda a, x: _broadcast(a, x, _listed))
_functional("all_gather_into_tensor", lambda a, x: _gather(a, x, lambda out: _cut(a, out)))
_functional(
    "reduce_scatter_tensor",
    lambda a, x: _reduce_scatter(a, _cut(a, x), lambda out: [y.reshape(-1) for y in _listed(out)]),
)


def collective(func: Any, args: Any, kwargs: dict[str, Any]) -> Collective:
    """Returns this rank's side of a collective that is about to run. Raises MessagesError."""
    name = func._schema.name
    if name not in _SIDES:
        raise MessagesError("no collective whose messages can be compared")
    values, group = arguments_of(func, args, kwargs)
    arguments = _Arguments(values, group)
    sent, received, sources = _SIDES[name](arguments)
    reduction = _reduction(values["reduce_op"]) if "reduce_op" in values else ""
    return Collective(name, group, group.rank(), list(sent), received, sources, reduction)


def arguments_of(
    func: Any, args: Any, kwargs: dict[str, Any]
) -> tuple[dict[str, Any], ProcessGroup]:
    """Returns the arguments of an operator by name, and its process group."""
    names = [a.name for a in func._schema.arguments]
    values = dict(zip(names, args, strict=False)) | kwargs
    return values, _group(values)


def _group(values: dict[str, Any]) -> ProcessGroup:
    if "process_group" in values:
        group = values["process_group"]
        return group if isinstance(group, ProcessGroup) else ProcessGroup.unbox(group)
    named = values["group_name"]
    return named if isinstance(named, ProcessGroup) else _resolve_process_group(named)


def _reduction(op: Any) -> str:
    if isinstance(op, str):
        name = op.lower()
    elif lack := lack_of("named_reductions", "to tell which reduction it is"):
        raise MessagesError(lack)
    else:
        number = int(op.op())
        name = REDUCTIONS[number] if number < len(REDUCTIONS) else "premul_sum"
    if name not in REDUCTIONS:
        raise MessagesError(f"the reduction {name} has no reference")
    return name


def wait(out: Any) -> None:
    """Waits until what an operator returned has arrived."""
    for x in out if isinstance(out, tuple | list) else [out]:
        if isinstance(x, torch.ScriptObject):
            dist.Work.unbox(x).wait()
        elif isinstance(x, Tensor):
            torch.ops._c10d_functional.wait_tensor.default(x)


def show(mine: Collective) -> Shown:
    """Shows the other ranks what this one is about to send. Raises MessagesError where they did not
    answer before."""
    ranks = dist.get_process_group_ranks(mine.group)
    group = "glm_core.verdict/" + ".".join(map(str, ranks)) + f"/{mine.group.group_name}"
    if group in _SILENT:
        raise MessagesError(_SILENT[group])
    _COUNT[group] += 1
    shown = Shown(mine, group, _COUNT[group])
    file = io.BytesIO()
    torch.save({"name": mine.name, "parts": [shown.chosen(x) for x in mine.sent]}, file)
    c10d._get_default_store().set(shown.key(mine.rank), file.getvalue())  # type: ignore[arg-type]  # bytes do
    return shown


def chosen(part: Tensor, most: int, seed: int) -> Tensor:
    """Returns a tensor on the host: whole, or `most` random elements in order, the same on every
    rank, the first and the last among them."""
    if part.numel() <= most:
        return part.detach().cpu().clone()
    generator = torch.Generator("cpu").manual_seed(seed)
    index = torch.randint(part.numel(), (most,), generator=generator, device="cpu")
    index[0], index[-1] = 0, part.numel() - 1
    return part.detach().reshape(-1)[index.sort().values.to(part.device)].cpu()


@dataclasses.dataclass(frozen=True, slots=True)
class Shown:
    """A collective whose messages the ranks show each other."""

    mine: Collective
    place: str
    """in the job's store"""
    number: int
    """of the collective, counted in its group"""

    @property
    def device_type(self) -> str:
        """Returns the kind of device that the messages come from."""
        return self.mine.sent[0].device.type if self.mine.sent else "cpu"

    def key(self, rank: int) -> str:
        """Returns where the messages of a rank are."""
        return f"{self.place}/{self.number}/{rank}"

    def chosen(self, part: Tensor) -> Tensor:
        """Returns a part on the host, see `chosen`."""
        most = max(MOST // max(len(self.mine.sent), self.mine.group.size()), 2)
        return chosen(part, most, self.number)

    def sent(self) -> list[list[Tensor]]:
        """Returns the parts that each rank sent. Raises MessagesError where one shows none."""
        store, size = c10d._get_default_store(), self.mine.group.size()
        keys = [self.key(rank) for rank in range(size)]
        try:
            store.wait(keys, timedelta(seconds=PATIENCE_S))
        except RuntimeError:
            _SILENT[self.place] = (
                f"a rank did not show what it sent within {PATIENCE_S} s; watch the same steps on "
                "every rank"
            )
            raise MessagesError(_SILENT[self.place]) from None
        shown = [torch.load(io.BytesIO(store.get(key))) for key in keys]
        if store.add(f"{self.place}/{self.number}", 1) == size:  # this rank is the last to read
            for key in keys:
                store.delete_key(key)
        for rank, other in enumerate(shown):
            if other["name"] != self.mine.name:
                raise MessagesError(f"rank {rank} of its group called {other['name']} instead")
        return [other["parts"] for other in shown]

    def arrived(self, out: Any) -> list[Tensor]:
        """Waits for the operator and returns the parts that arrived at this rank."""
        wait(out)
        tensors = [self.chosen(x) for x in self.mine.received(out)]
        return tensors[: len(self.mine.sources)]


def unseen_groups() -> list[str]:
    """Returns the classes of process groups that are written in Python. Torch calls them directly,
    and not by operators."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    kinds = {type(group) for group in c10d._world.pg_map} - {ProcessGroup}
    return sorted(kind.__qualname__ for kind in kinds)


def wait_for_readers() -> None:
    """Waits until every rank has read what the others showed: the store may end with this one."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    store = c10d._get_default_store()
    for group, count in _COUNT.items():
        if group not in _SILENT:
            ends = {rank: f"{group}/{count}/end/{rank}" for rank in group.split("/")[1].split(".")}
            store.set(ends[str(dist.get_rank())], "")
            with contextlib.suppress(RuntimeError):
                store.wait(list(ends.values()), timedelta(seconds=PATIENCE_S))
