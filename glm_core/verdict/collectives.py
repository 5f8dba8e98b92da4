"""Judges what ranks received by what the others sent: parts that are moved must arrive bit by bit,
parts that are combined must be as close to float64 as honest rounding is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from glm_core.distributed.messages import Collective, MessagesError, Shown, collective, show
from glm_core.distributed.transfers import Receive
from glm_core.verdict import references
from glm_core.verdict.judge import Judgement, judge, wrong
from glm_core.verdict.oracle import Call

CLOSE = 32
"""units in the last place of the largest element within which a wrong result is one that we know"""
_STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "product": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
    "band": torch.bitwise_and,
    "bor": torch.bitwise_or,
    "bxor": torch.bitwise_xor,
}
_DOES = {
    "sum": "sums",
    "avg": "averages",
    "product": "multiplies",
    "min": "takes the minimum",
    "max": "takes the maximum",
}
_SHOULD = {
    "sum": "sum",
    "avg": "average",
    "product": "multiply",
    "min": "take the minimum",
    "max": "take the maximum",
}


def combined(parts: list[Tensor], reduction: str) -> Tensor:
    """Combines the ranks' parts one after the other."""
    total = functools.reduce(_STEPS[reduction], parts)
    return total / len(parts) if reduction == "avg" else total


@functools.cache
def _operator() -> Any:
    """Returns the operator by whose name combined parts are judged; it is never called."""
    library = torch.library.Library("glm_core_verdict", "FRAGMENT")
    library.define("combined(Tensor[] parts, str reduction) -> Tensor", tags=torch.Tag.pointwise)
    references.reference("glm_core_verdict::combined")(combined)
    return library, torch.ops.glm_core_verdict.combined.default


def begin(func: Any, args: Any, kwargs: dict[str, Any]) -> Shown | str:
    """Shows the other ranks what this one sends. Returns why it cannot, where that is so."""
    try:
        return show(collective(func, args, kwargs))
    except MessagesError as error:
        return f"collective; {error}"


def judge_collective(shown: Shown, out: Any, z: float) -> Judgement:
    """Judges what arrived at this rank. Raises MessagesError where the others do not show what they
    sent."""
    arrived, sent = shown.arrived(out), shown.sent()
    total = Judgement()
    for number, (part, sources) in enumerate(zip(arrived, shown.mine.sources, strict=True)):
        name = f"part {number}" if len(arrived) > 1 else "y"
        own = _judge_part(shown.mine, name, part, [sent[rank][j] for rank, j in sources], sent, z)
        total.num_tests += own.num_tests
        total.ratio = max(total.ratio, own.ratio)
        total.outside += own.outside
    return total


def _judge_part(
    mine: Collective,
    name: str,
    part: Tensor,
    parts: list[Tensor],
    sent: list[list[Tensor]],
    z: float,
) -> Judgement:
    """Judges a part that arrived by the parts that it is made of."""
    if mine.reduction:
        _, func = _operator()
        parts = [p.reshape(part.shape) for p in parts]
        judgement = judge(Call(func, (parts, mine.reduction), {}, "cpu"), {"y": part}, z)
        named = [dataclasses.replace(o, result=name) for o in judgement.outside]
        judgement.outside = named
    else:
        judgement = Judgement(num_tests=1)
        if not same(part, parts[0]):
            judgement.outside.append(wrong(name, part, "other values than were sent"))
    what = judgement.outside and (_known(mine, part, parts, sent) or _few(mine, part, parts))
    if what:
        judgement.outside = [wrong(name, part, what)]
    return judgement


def judge_transfer(receive: Receive) -> Judgement:
    """Judges what arrived from another rank: it must be what that rank sent, bit by bit. Raises
    MessagesError where that is not known."""
    part, sent = receive.arrived(), receive.sent()
    judgement = Judgement(num_tests=1)
    if not same(part, sent):
        mistakes = receive.mistakes()
        what = next((text for text, other in mistakes if same(part, other)), "")
        judgement.outside.append(wrong("y", receive.buffer, what or _cut_off(part, sent)))
    receive.compared(sent)
    return judgement


def _cut_off(part: Tensor, sent: Tensor) -> str:
    """Says which elements of a message are not what was sent."""
    if part.numel() != sent.numel():
        return f"{part.numel()} elements where {sent.numel()} were sent"
    if part.dtype != sent.dtype:
        return f"{part.dtype} where {sent.dtype} was sent"
    off = _different(part, sent)
    first, count = int(off.nonzero()[0]), int(off.sum())
    if count == part.numel():
        return f"none of {count} elements is what was sent"
    if count > 1 and bool(off[first:].all()):
        return f"cut off: the last {count} of {part.numel()} elements are not what was sent"
    return f"{count} of {part.numel()} elements are not what was sent, the first at [{first}]"


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def same(x: Tensor, y: Tensor) -> bool:
    """Says whether two tensors have the same bits."""
    if x.numel() != y.numel() or x.dtype != y.dtype:
        return False
    return not bool(_different(x, y).any())


def _different(x: Tensor, y: Tensor) -> Tensor:
    """Returns, flat, which elements of two tensors of one dtype differ in any bit."""
    size = (x.numel(), x.element_size())
    x, y = (t.reshape(-1).contiguous().view(torch.uint8).reshape(size) for t in (x, y))
    return (x != y).any(1)


def _known(mine: Collective, part: Tensor, parts: list[Tensor], sent: list[list[Tensor]]) -> str:
    """Returns the known mistake that gives this result, "" where none does."""
    for text, candidate in _mistakes(mine, parts, sent):
        if candidate.numel() == part.numel() and not _off(part, candidate).any():
            return text
    return ""


def _off(x: Tensor, y: Tensor) -> Tensor:
    """Returns, flat, which elements of a result are not those of another."""
    x, y = x.reshape(-1), y.reshape(-1)
    if not x.is_floating_point():
        return x != y
    limit = CLOSE * torch.finfo(x.dtype).eps * float(y.double().abs().max())
    return ~((x.double() - y.double()).abs() <= limit)


def _mistakes(
    mine: Collective, parts: list[Tensor], sent: list[list[Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Yields known mistakes, each with what it gives."""
    if not mine.reduction:
        for rank, others in enumerate(sent):
            whose = "what this rank itself" if rank == mine.rank else f"what rank {rank}"
            for j, other in enumerate(others):
                yield f"{whose} sent as its part {j}, another than belongs here", other
        return
    wide = [_wide(p) for p in parts]
    for name in _DOES if mine.reduction in _DOES else ():
        if name != mine.reduction:
            yield f"{_DOES[name]} where it should {_SHOULD[mine.reduction]}", combined(wide, name)
    for dtype in (torch.bfloat16, torch.float16):
        if parts[0].dtype == torch.float32:
            rounded = [p.to(dtype).double() for p in parts]
            name = str(dtype).removeprefix("torch.")
            yield f"combines messages rounded to {name}", combined(rounded, mine.reduction)
    yield "this rank's own message, not combined with the others'", wide[mine.rank]
    for rank, other_part in enumerate(wide):
        rest = wide[:rank] + wide[rank + 1 :]
        if rest:
            yield f"the message of rank {rank} is left out", combined(rest, mine.reduction)
            twice = combined([*wide, other_part], mine.reduction)
            yield f"the message of rank {rank} is taken twice", twice
    for rank, others in enumerate(sent):
        for j, other_part in enumerate(others if len(others) > 1 else ()):
            yield f"part {j} of what rank {rank} sent alone", other_part


def _few(mine: Collective, part: Tensor, parts: list[Tensor]) -> str:
    """Says how many elements are wrong, and where the first is; "" where none is by much."""
    reduction = mine.reduction
    exact = combined([_wide(p) for p in parts], reduction) if reduction else parts[0]
    if exact.numel() != part.numel():
        return f"{part.numel()} elements where {exact.numel()} were sent"
    off = _off(part, exact).nonzero().reshape(-1).tolist()
    are = "is" if len(off) == 1 else "are"
    what = "no combination of what the ranks sent" if reduction else "not what was sent"
    first = f"{len(off)} of {part.numel()} elements {are} {what}, the first at {off[:1]}"
    return first if off else ""
