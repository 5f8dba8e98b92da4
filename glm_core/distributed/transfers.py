"""Says what a message from one rank to another should deliver. The sender shows it in the job's
store before it sends it. The receiver compares what arrived once its program has waited for it."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import distributed_c10d as c10d

from glm_core.distributed.messages import MOST, MessagesError, arguments_of, chosen

FUNCTIONAL = "_c10d_functional::"
OPERATORS = {
    "c10d::send",
    "c10d::recv_",
    "c10d::recv_any_source_",
    f"{FUNCTIONAL}isend",
    f"{FUNCTIONAL}irecv",
    f"{FUNCTIONAL}batch_p2p_ops",
}
"""operators that pass tensors from one rank to another"""


class Channel(NamedTuple):
    """Messages of one channel arrive in the order in which they were sent."""

    group: str
    source: int
    destination: int
    tag: int

    def key(self, number: int) -> str:
        """Returns where the channel's message of this number is in the job's store."""
        between = f"{self.source}-{self.destination}/{self.tag}"
        return f"glm_core.verdict/transfer/{self.group}/{between}/{number}"


_COUNT: Counter[tuple[str, Channel]] = Counter()
"""by `send` or `recv` and channel: the messages so far"""
_LAST: dict[Channel, tuple[int, Tensor]] = {}
"""the message of a channel that was compared last, with its number; of one that leaves this rank,
the one shown last"""
AHEAD = 8
"""so many messages of each other rank are looked at, to find out whose has arrived"""
_UNKNOWN: set[tuple[str, int]] = set()
"""group and tag in which this rank received from any rank: the order of its messages is unknown"""


@contextmanager
def counted() -> Iterator[None]:
    """Counts all messages in the block, so that the ranks agree on their numbers even if they are
    sent before the captured step."""
    with ExitStack() as stack:
        for kind in ("send", "recv", "recv_anysource"):
            stack.enter_context(_replaced(kind))
        yield


@contextmanager
def _replaced(kind: str) -> Iterator[None]:
    plain: Callable[..., Any] = getattr(ProcessGroup, kind)
    method = vars(ProcessGroup)[kind]  # `plain` in its place would not be bound to a group

    def call(group: ProcessGroup, tensors: Any, *args: int, **named: int) -> Any:
        *peer, tag = (*args, *(named[n] for n in ("dstRank", "srcRank", "tag") if n in named))
        if kind == "recv_anysource":
            _UNKNOWN.add((group.group_name, tag))
        else:
            _COUNT[kind, _channel(group.group_name, group.rank(), kind, peer[0], tag)] += 1
        return plain(group, tensors, *args, **named)

    setattr(ProcessGroup, kind, call)
    try:
        yield
    finally:
        setattr(ProcessGroup, kind, method)


def _channel(group: str, own: int, kind: str, peer: int, tag: int) -> Channel:
    source, destination = (own, peer) if kind == "send" else (peer, own)
    return Channel(group, source, destination, tag)


@dataclasses.dataclass(slots=True, eq=False)
class Receive:
    """A message that this rank receives."""

    name: str
    """of the operator"""
    channel: Channel
    number: int
    """of the message in its channel"""
    buffer: Tensor
    before: Tensor
    """what the buffer held"""
    work: Any = None
    """knows whether the program has waited for it; True: it has"""
    judged: bool = False

    def has_arrived(self, used: bool) -> bool:
        """Says whether the program has waited for the message. Elsewhere than on a CPU that shows
        where the buffer is `used`: this is in the order of the device's queue."""
        if self.buffer.device.type != "cpu":
            return used
        return bool(self.work) and (self.work is True or bool(self.work.is_completed()))

    def arrived(self) -> Tensor:
        """Returns what arrived."""
        return _part(self.buffer, self.number)

    def sent(self) -> Tensor:
        """Returns what the sender has shown. Raises MessagesError where it has shown nothing."""
        if (self.channel.group, self.channel.tag) in _UNKNOWN:
            raise MessagesError("a receive from any rank; which message it gets is not known")
        try:
            shown = _shown(self.channel, self.number)
            if shown is None:
                raise MessagesError("its sender did not capture the step in which it was sent")
            c10d._get_default_store().delete_key(self.channel.key(self.number))
        except (RuntimeError, ValueError):
            raise MessagesError("the job ended before it could be compared") from None
        return shown

    def compared(self, sent: Tensor) -> None:
        """Keeps a message, to recognise it where it arrives again."""
        _LAST[self.channel] = self.number, sent

    def mistakes(self) -> Iterator[tuple[str, Tensor]]:
        """Yields known mistakes, each with what it gives."""
        yield "nothing arrived: the buffer is as it was", self.before
        own, source = self.channel.destination, self.channel.source
        for channel, (_, last) in _LAST.items():
            if channel == self.channel:
                yield "the message before this one", last
            elif channel.source == own:
                yield f"what this rank itself sent to rank {channel.destination}", last
            else:
                yield f"what rank {channel.source} sent, where rank {source}'s belongs", last
        for (kind, channel), count in list(_COUNT.items()):
            if kind != "recv" or channel.group != self.channel.group or channel == self.channel:
                continue
            compared = _LAST[channel][0] if channel in _LAST else 0
            for number in range(max(compared, count - AHEAD) + 1, count + 2):
                shown = _shown(channel, number)
                if shown is not None:
                    yield f"what rank {channel.source} sent, where rank {source}'s belongs", shown


def _part(x: Tensor, number: int) -> Tensor:
    return chosen(x, MOST, number)


def _shown(channel: Channel, number: int) -> Tensor | None:
    store, key = c10d._get_default_store(), channel.key(number)
    if not store.check([key]):
        return None
    part: Tensor = torch.load(io.BytesIO(store.get(key)))
    return part


def begin(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Receive]:
    """Shows what an operator is about to send; returns what it is about to receive. Raises
    MessagesError for a receive that nothing is known of."""
    name, values, group = func._schema.name, *arguments_of(func, args, kwargs)
    if name == "c10d::recv_any_source_":
        raise MessagesError("a receive from any rank; which message it gets is not known")
    if name.startswith(FUNCTIONAL):
        return _functional(name, values, group.group_name)
    kind = "send" if "dst" in values else "recv"
    peer = values["dst" if kind == "send" else "src"]
    channel = _channel(group.group_name, group.rank(), kind, peer, values["tag"])
    return _of(name, kind, channel, values["tensors"][0])


def _functional(name: str, values: dict[str, Any], group: str) -> list[Receive]:
    """Counts and shows the messages of a functional operator, which names ranks of the job."""
    if "tensors" in values:
        lists = (values[n] for n in ("op_list", "peer_list", "tag_list", "tensors"))
        messages = [(k[1:], p, t, x) for k, p, t, x in zip(*lists, strict=True)]
    else:
        kind = "send" if "dst" in values else "recv"
        peer = values["dst" if kind == "send" else "src"]
        messages = [(kind, peer, values["tag"], values["tensor"])]
    receives = []
    for kind, peer, tag, tensor in messages:
        channel = _channel(f"{group}/functional", dist.get_rank(), kind, peer, tag)
        _COUNT[kind, channel] += 1
        receives += _of(name, kind, channel, tensor)
    return receives


def _of(name: str, kind: str, channel: Channel, tensor: Tensor) -> list[Receive]:
    number = _COUNT[kind, channel]
    part = _part(tensor, number)
    if kind == "recv":
        return [Receive(name, channel, number, tensor, part)]
    file = io.BytesIO()
    torch.save(part, file)
    c10d._get_default_store().set(channel.key(number), file.getvalue())  # type: ignore[arg-type]  # bytes do
    _LAST[channel] = number, part
    return []


def begun(receives: list[Receive], out: Any) -> None:
    """Tells each receive how to know that its program has waited."""
    for receive in receives:
        if isinstance(out, torch.ScriptObject):
            receive.work = dist.Work.unbox(out)
        elif isinstance(out, Tensor):
            receive.buffer = out
