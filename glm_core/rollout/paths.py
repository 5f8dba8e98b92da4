"""Bisects the two paths of a model, the training forward pass and prefill with decode: names the
first op call where they part.

A call of the engine is judged twice: its arguments against those of the training forward pass for
the same tokens, and its results against the op's reference on its own arguments."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glm_core import dispatch
from glm_core.align.capture import copied, layers
from glm_core.align.disguise import Regrouped
from glm_core.backends import registry
from glm_core.dispatch import Interceptor, Op
from glm_core.model.glm import GLM
from glm_core.rollout.engine import PLAIN, Variant, generated, trained
from glm_core.rollout.files import Reply

SAFETY_FACTOR = 4.0
"""a deviation may be this many times the largest honest one"""
CHUNK = 16
"""tokens of a prompt that the engine reads at once, so that short prompts have several chunks"""
NUM_TOKENS = 12
"""tokens of a reply that are bisected"""
NUM_REPLIES = 3
"""replies that are bisected: those with the longest prompts, and one behind a prefix hit"""


class Key(NamedTuple):
    """Which call of a forward pass it is."""

    layer: str
    """number of the block; "" before and after them, "head" for the logits"""
    number: int
    """number of the call in its layer"""


@dataclasses.dataclass(slots=True)
class Call:
    """One op call for the tokens from place `start` on."""

    key: Key
    op: Op
    start: int
    size: int
    args: dict[str, Any]
    results: dict[str, Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Parting:
    """Where the two paths part; an empty op: nowhere."""

    op: str = ""
    layer: str = ""
    tensor: str = ""
    """the argument or the result that differs"""
    place: int = 0
    """place of the first token whose row differs"""
    reply: int = 0
    deviation: float = 0.0
    """largest relative deviation of a row"""
    honest: float = 0.0
    """what honest rounding may do"""
    note: str = ""

    def text(self) -> str:
        """Returns one sentence."""
        if not self.op:
            return "training forward and prefill with decode: every op call agrees"
        where = {"": "", "head": " of the head"}.get(self.layer, f" in layer {self.layer}")
        words = self.note or (
            f"{self.tensor} deviates by {self.deviation:.1e}, honest up to {self.honest:.1e}"
        )
        place = f"op {self.op}{where}, place {self.place} of reply {self.reply}"
        return f"the paths part at {place}: {words}"


Limits = dict[tuple[Key, str], float]
"""how far honest engines deviate, by call and argument or result"""


class Recorder:
    """Keeps every op call of forward passes over one reply."""

    def __init__(self, reply: Reply, inner: Interceptor | None = None) -> None:
        self.calls: list[Call] = []
        self.reply, self._inner = reply, inner
        self._layer, self._start, self._size = "", 0, 0
        self._outside, self._ignored = False, False
        self._numbers: Counter[str] = Counter()

    def begin(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Notes that a forward pass over the next tokens begins."""
        self._start, self._size = self._start + self._size, args[0].shape[1]
        self._outside, self._ignored, self._numbers = False, False, Counter()

    def ignore(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Notes that another model reads the next tokens: its calls were those of another time."""
        self.begin(_, args)
        self._ignored = True

    def end(self, *_: Any) -> None:
        """Notes that it ends: what follows computes logits."""
        self._outside = True

    def enter(self, layer: str) -> None:
        """Assigns the calls that follow to a block."""
        self._layer = layer

    def __call__(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the call as the engine does, and keeps it."""
        if self._ignored:
            return (self._inner or dispatch.run)(op, args, kwargs)
        layer = "head" if self._outside else self._layer
        named = op.named(args, kwargs)
        kept = {k: _on_host(copied(v)) for k, v in named.items()}
        result = (self._inner or dispatch.run)(op, args, kwargs)
        outputs = result if isinstance(result, tuple) else (result,)
        results = {
            f"result {i}" if i else "result": _on_host(y).clone() for i, y in enumerate(outputs)
        }
        start, size = self._start, self._size
        if layer == "head":  # the engine's head sees the last token, the trainer's all of a reply
            size = outputs[0].numel() // outputs[0].shape[-1]
            start = self._start + self._size - 1 if size == 1 else len(self.reply.prompt) - 1
        key = Key(layer, self._numbers[layer])
        self._numbers[layer] += 1
        self.calls.append(Call(key, op, start, size, kept, results))
        return result


def _on_host(x: Any) -> Any:
    return x.cpu() if isinstance(x, Tensor) else x


@contextmanager
def recording(
    model: GLM, other: GLM | None, reply: Reply, inner: Interceptor | None
) -> Iterator[Recorder]:
    """Records the op calls of a model inside the block. other: a model that reads the prompt, whose
    calls are left out."""
    recorder = Recorder(reply, inner)
    with ExitStack() as stack:
        if other is not None:
            stack.callback(other.register_forward_pre_hook(recorder.ignore).remove)
        stack.callback(model.register_forward_pre_hook(recorder.begin).remove)
        stack.callback(model.register_forward_hook(recorder.end).remove)
        stack.enter_context(layers(model, recorder.enter))
        stack.enter_context(dispatch.intercept(recorder))
        yield recorder


def recorded(model: GLM, reply: Reply, how: Variant, engine: bool) -> list[Call]:
    """Returns the op calls of the training forward pass over a reply, or those of an engine."""
    own = how.of(model)
    plain = dataclasses.replace(how, model=None, interceptor=None)
    with recording(own, how.reads_prompts, reply, how.interceptor) as recorder:
        run = functools.partial(generated, chunk=CHUNK) if engine else trained
        for _ in run(own, [reply], plain):
            pass
    return recorder.calls


class Paths:
    """The training forward pass over some replies, call by call, and how far honest engines deviate
    from it."""

    def __init__(self, models: Mapping[int, GLM], replies: Sequence[Reply]) -> None:
        """models: by the step of the replies they drew."""
        chosen = [(number, _begun(replies[number])) for number in _chosen(replies)]
        self._chosen = [(number, models[r.step], r) for number, r in chosen]

    @functools.cached_property
    def _right(self) -> list[tuple[dict[Key, Call], Limits]]:
        found = []
        for _, model, reply in self._chosen:
            reference = {c.key: c for c in recorded(model, reply, PLAIN, engine=False)}
            with Regrouped(1):
                honest = [recorded(model, reply, PLAIN, engine) for engine in (False, True)]
            found.append((reference, _limits(reference, honest)))
        return found

    def part(self, backend: str = "reference", how: Variant = PLAIN) -> Parting:
        """Returns where prefill with decode on `backend` parts from the training forward pass of
        the reference. how: what the engine does otherwise."""
        for (number, model, reply), (reference, limits) in zip(
            self._chosen, self._right, strict=True
        ):
            device = registry.usable(backend).device()
            own = model if device.type == "cpu" else copy.deepcopy(model).to(device)
            with registry.use(backend):
                calls = recorded(own, reply, how, engine=True)
            found = _first(calls, reference, limits)
            if found is not None:
                return dataclasses.replace(found, reply=number)
        return Parting()


def _begun(reply: Reply) -> Reply:
    """Returns a reply with its first tokens alone."""
    first = slice(NUM_TOKENS)
    return dataclasses.replace(reply, tokens=reply.tokens[first], logprobs=reply.logprobs[first])


def _chosen(replies: Sequence[Reply]) -> list[int]:
    by_length = sorted(range(len(replies)), key=lambda i: -len(replies[i].prompt))
    hits = [
        i for i in by_length if replies[i].cached and replies[i].cached < len(replies[i].prompt) - 1
    ]
    return list(dict.fromkeys([*by_length[: NUM_REPLIES - 1], *hits[:1]]))


def rows(x: Tensor, call: Call) -> Tensor | None:
    """Returns a tensor as one row per token [L, ...]; None where it has none: weights, and rows
    that are sorted by expert."""
    if x.ndim >= 2 and x.shape[0] == 1 and x.shape[1] == call.size:
        return x[0]
    return x if x.ndim >= 1 and x.shape[0] == call.size else None


def _tensors(call: Call) -> Iterator[tuple[str, Tensor]]:
    return ((n, x) for n, x in call.args.items() if isinstance(x, Tensor))


def _compared(call: Call, reference: Call) -> Iterator[tuple[str, Tensor, Tensor, int]]:
    """Yields the arguments of a call with those of the training forward pass for the same tokens,
    as rows, and the place of the first row. Keys and values begin at place 0."""
    for name, x in _tensors(call):
        other = reference.args.get(name)
        if not isinstance(other, Tensor):
            continue
        if call.op.name == "attention" and name in ("k", "v"):
            size = min(call.start + call.size, other.shape[1])
            if x.shape[2:] == other.shape[2:]:  # latents are not made into keys with a cache
                yield name, x[0, :size], other[0, :size], 0
            continue
        own, whole = rows(x, call), rows(other, reference)
        if own is not None and whole is not None and own.shape[1:] == whole.shape[1:]:
            first = call.start - reference.start
            if first >= 0:  # the trainer computes no logits inside a prompt
                yield name, own, whole[first : first + call.size], call.start


def _errors(x: Tensor, y: Tensor) -> Tensor:
    """Returns the relative deviation of each row [L]; of integers, whether they differ."""
    if not x.is_floating_point():
        return (x != y).flatten(1).any(1).double() if x.ndim > 1 else (x != y).double()
    a, b = x.double().reshape(len(x), -1), y.double().reshape(len(y), -1)
    size = torch.maximum(b.norm(dim=1), b.norm() / max(len(b), 1) ** 0.5)
    return ((a - b).norm(dim=1) / size.clamp(min=1e-300)).nan_to_num(nan=1e30)


def _own_errors(call: Call) -> Iterator[tuple[str, Tensor, float]]:
    """Yields each result with its deviation from the reference on the call's own arguments."""
    right = call.op.reference(**call.args)
    outputs = right if isinstance(right, tuple) else (right,)
    for (name, x), y in zip(call.results.items(), outputs, strict=True):
        if call.op.choice is not None and not x.is_floating_point():
            yield name, x, 0.0  # which experts: near ties are honest; their weights are judged
        else:
            yield name, x, float(_errors(x.reshape(1, -1), y.reshape(1, -1)).max())


def _limits(reference: Mapping[Key, Call], honest: Sequence[Sequence[Call]]) -> Limits:
    """Returns how far honest arguments deviate, by call and argument; and results from their
    references, by `result`."""
    limits: Limits = {}
    for calls in honest:
        for call in calls:
            for name, x, y, _ in _compared(call, reference[call.key]):
                place = (call.key, name)
                limits[place] = max(limits.get(place, 0.0), float(_errors(x, y).max()))
            for name, _, error in _own_errors(call):
                place = (call.key, name)
                limits[place] = max(limits.get(place, 0.0), error)
    return limits


def _allowed(limits: Limits, key: Key, name: str, x: Tensor) -> float:
    if not x.is_floating_point():
        return 0.5
    return SAFETY_FACTOR * max(limits.get((key, name), 0.0), torch.finfo(x.dtype).eps)


def _first(calls: Sequence[Call], reference: Mapping[Key, Call], limits: Limits) -> Parting | None:
    """Returns where the first call that deviates does so, in the order of the engine's calls."""
    for call in calls:
        place: dict[str, Any] = {"op": call.op.name, "layer": call.key.layer, "place": call.start}
        right = reference.get(call.key)
        if right is None or right.op.name != call.op.name:
            other = "no op" if right is None else f"op {right.op.name}"
            return Parting(**place, note=f"the training forward pass calls {other} there")
        for name, weight in _tensors(call):
            other_weight = right.args.get(name)
            if rows(weight, call) is None and isinstance(other_weight, Tensor):
                whole = rows(other_weight, right) is None and weight.shape == other_weight.shape
                kept = call.op.name not in ROUTED
                if whole and kept and not torch.equal(weight, other_weight):
                    return Parting(**place, tensor=name, note=f"{name} has other values")
        for name, x, y, first in _compared(call, right):
            errors, allowed = _errors(x, y), _allowed(limits, call.key, name, x)
            if float(errors.max()) > allowed:
                at = first + int((errors > allowed).nonzero()[0, 0])
                return _parting(place | {"place": at}, name, float(errors.max()), allowed)
        for name, x, error in _own_errors(call):
            allowed = _allowed(limits, call.key, name, x)
            if error > allowed:
                return _parting(place, name, error, allowed)
    if calls and not any(c.key.layer == "head" for c in calls):
        return Parting(op="linear", layer="head", note="the engine computes logits without this op")
    return None


ROUTED = ("permute", "grouped_linear", "unpermute", "geglu", "swiglu", "gelu")
"""ops whose arguments may be sorted by expert, which is no property of a token"""


def _parting(place: dict[str, Any], name: str, error: float, allowed: float) -> Parting:
    return Parting(**place, tensor=name, deviation=error, honest=allowed)
