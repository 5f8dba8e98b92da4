"""Makes mistakes in collectives: wrong versions of torch's operators, for the mode that runs one in
place of the right one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glm_core.distributed.messages import Collective, arguments_of, collective, wait
from glm_core.faults.aten import AtenFault

Edit = Callable[[Collective, list[Tensor]], None]
"""edits in place what arrived at a rank"""
REDUCING = (
    "c10d::allreduce_",
    "c10d::_reduce_scatter_base_",
    "_c10d_functional::all_reduce",
    "_c10d_functional::reduce_scatter_tensor",
)
GATHERING = (
    "c10d::_allgather_base_",
    "c10d::allgather_",
    "_c10d_functional::all_gather_into_tensor",
)
EXCHANGING = ("c10d::alltoall_base_", "_c10d_functional::all_to_all_single")
COLLECTIVE_FAULTS: list[AtenFault] = []
TRANSFER_FAULTS: list[AtenFault] = []
"""mistakes in messages from one rank to another"""


def _arrived(edit: Edit) -> Callable[..., Any]:
    """Edits what arrived."""

    def wrong(func: Any, *args: Any, **kwargs: Any) -> Any:
        mine = collective(func, args, kwargs)
        before = dataclasses.replace(mine, sent=[x.clone() for x in mine.sent])
        out = func(*args, **kwargs)
        wait(out)
        edit(before, list(mine.received(out)))
        return out

    return wrong


def _sent(edit: Callable[[Collective, Tensor], Tensor]) -> Callable[..., Any]:
    """Sends other messages than it should."""

    def wrong(func: Any, *args: Any, **kwargs: Any) -> Any:
        mine = collective(func, args, kwargs)
        before = [x.clone() for x in mine.sent]
        for part in mine.sent:
            part.copy_(edit(mine, part))
        out = func(*args, **kwargs)
        wait(out)
        if "tensors" not in [a.name for a in func._schema.arguments]:  # sent and received in one
            for part, old in zip(mine.sent, before, strict=True):
                part.copy_(old)
        return out

    return wrong


def _without_last_rank(mine: Collective, part: Tensor) -> Tensor:
    return torch.zeros_like(part) if mine.rank == mine.group.size() - 1 else part


def _share(mine: Collective, part: Tensor) -> Tensor:
    return part / mine.group.size()


def _without_last(mine: Collective, part: Tensor) -> Tensor:
    edited = part.clone()
    edited.view(-1)[-1:] = 0
    return edited


def _own(mine: Collective, parts: list[Tensor]) -> None:
    for part, sources in zip(parts, mine.sources, strict=True):
        part.copy_(mine.sent[sources[mine.rank][1]])


def _last_lost(mine: Collective, parts: list[Tensor]) -> None:
    for part in parts:
        part.view(-1)[-1:] = 0


def _turned(mine: Collective, parts: list[Tensor]) -> None:
    for part, other in zip(parts, [x.clone() for x in parts[1:] + parts[:1]], strict=True):
        part.copy_(other)


def _not_received(mine: Collective, parts: list[Tensor]) -> None:
    if mine.rank:
        for part in parts:
            part.zero_()


def _other_message(edit: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """Sends `edit(message, message before)`; the first message as it is. Waits for nothing, because
    the other rank may not have begun to receive."""
    before: dict[tuple[int, int], Tensor] = {}

    def wrong(func: Any, tensors: list[Tensor], group: Any, peer: int, tag: int) -> Any:
        if not tensors[0].is_floating_point():  # sizes of objects: the program would not run on
            return func(tensors, group, peer, tag)
        last = before.get((peer, tag))
        before[peer, tag] = tensors[0].clone()
        if last is None or (last.shape, last.dtype) != (tensors[0].shape, tensors[0].dtype):
            last = tensors[0]
        return func([edit(tensors[0], last)], group, peer, tag)

    return wrong


def _second_half_lost(message: Tensor, last: Tensor) -> Tensor:
    edited = message.clone()
    edited.view(-1)[message.numel() // 2 :] = 0
    return edited


def _into_another_buffer(func: Any, tensors: list[Tensor], *args: Any) -> Any:
    return func([x.clone() for x in tensors], *args)


def _from_another_rank(func: Any, tensors: list[Tensor], group: Any, peer: int, tag: int) -> Any:
    """Receives from the third of three ranks."""
    _, whole = arguments_of(func, (tensors, group, peer, tag), {})
    return func(tensors, group, 3 - whole.rank() - peer, tag)


def _transfer_fault(operator: str, name: str, wrong: Callable[..., Any]) -> None:
    TRANSFER_FAULTS.append(AtenFault(operator, f"{operator}: {name}", wrong))


def _fault(operators: tuple[str, ...], name: str, wrong: Callable[..., Any], *dtypes: str) -> None:
    for operator in operators:
        given = dtypes or ("float32", "bfloat16")
        COLLECTIVE_FAULTS.append(AtenFault(operator, f"{operator}: {name}", wrong, given))


_fault(REDUCING, "averages where it should sum", _sent(_share))
_fault(REDUCING, "the last rank's message is left out", _sent(_without_last_rank))
_fault(REDUCING, "the last element is lost", _sent(_without_last))
_fault(REDUCING, "messages rounded to bfloat16", _sent(lambda _, x: x.bfloat16()), "float32")
_fault(("c10d::allreduce_", "_c10d_functional::all_reduce"), "ranks keep their own", _arrived(_own))
_fault((*GATHERING, *EXCHANGING), "the ranks' parts change places", _arrived(_turned))
_fault((*GATHERING, *EXCHANGING), "the last element is lost", _arrived(_last_lost))
_fault(
    ("c10d::broadcast_", "_c10d_functional::broadcast"),
    "only the root has it",
    _arrived(_not_received),
)
_transfer_fault(
    "c10d::send", "the second half of the message is lost", _other_message(_second_half_lost)
)
_transfer_fault(
    "c10d::send", "sends the message before again", _other_message(lambda _, last: last.clone())
)
_transfer_fault("c10d::recv_", "the message arrives in another buffer", _into_another_buffer)
_transfer_fault("c10d::recv_", "receives from another rank", _from_another_rank)
