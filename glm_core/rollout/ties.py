"""Finds the log probabilities that honest engines may report where a router's choice is a near tie.

Two experts whose scores lie within rounding may change places in any engine. The token then goes
through other experts, and its log probability jumps by far more than rounding. So a deviation is
measured from the nearest of what the honest choices give.

Shapes: N rows of a call, X experts, K chosen of them, T tokens of all replies, A alternatives."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from glm_core import dispatch
from glm_core.choice import Choice
from glm_core.conformance.choices import without_tensors
from glm_core.dispatch import Interceptor, Op
from glm_core.model.glm import GLM
from glm_core.rollout.distribution import Shaping, collect
from glm_core.rollout.engine import PLAIN, Variant, trained
from glm_core.rollout.files import Array, Reply

Way = tuple[Tensor, Tensor]
"""another choice of a call's rows [N, K], and which rows may make it, bool [N]"""


def settled(deviations: Array, others: Array) -> Array:
    """Returns deviations [..., T] measured from the nearest of what a router's honest choices give:
    from where they are measured now, or from there with one of the changes `others` [A, T]."""
    found = deviations
    for change in others:
        other = deviations - change
        found = np.where(np.abs(other) < np.abs(found), other, found)
    return found


class Scored(NamedTuple):
    """A call of an op that chooses, such as a router."""

    choice: Choice
    scores: Tensor
    """what it chooses by [N, X], float64"""
    args: dict[str, Any]
    """the op's other arguments"""

    def ways(self, slack: Tensor) -> list[Way]:
        """Returns what else its rows may choose, the nearest first, where each score may be moved
        by `slack` [N]."""
        best, *others = self.choice.others(self.scores, **self.args)
        moved = slack[:, None].expand_as(self.scores)
        found = []
        for other in others:
            near = self.choice.shortfall(self.scores, moved, other, **self.args) <= 1
            near &= (other.sort(-1)[0] != best.sort(-1)[0]).any(-1)
            if bool(near.any()):
                found.append((other, near))
        return found


class Scoring:
    """Runs op calls, and keeps those in which an op chooses."""

    def __init__(self, inner: Interceptor | None = None) -> None:
        """inner: what computes op calls in place of the backend."""
        self.calls: list[Scored] = []
        self._inner = inner or dispatch.run

    def __call__(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a call."""
        if op.choice is not None:
            named = op.named(args, kwargs)
            scores = op.choice.scores(**named).double()
            self.calls.append(Scored(op.choice, scores, without_tensors(named)))
        return self._inner(op, args, kwargs)


class _Flipping:
    """Runs op calls, and tells some rows of those that choose what they choose."""

    def __init__(self, ways: Mapping[int, Way], inner: Interceptor | None) -> None:
        self._ways, self._inner, self._calls = ways, inner or dispatch.run, 0

    def __call__(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        results = self._inner(op, args, kwargs)
        if op.choice is None:
            return results
        number, self._calls = self._calls, self._calls + 1
        if number not in self._ways:
            return results
        other, near = self._ways[number]
        given = op.choice.given(other, **op.named(args, kwargs))
        return tuple(torch.where(near[:, None], y, x) for x, y in zip(results, given, strict=True))


def moved_by(exact: Sequence[Scored], calls: Sequence[Scored]) -> list[Tensor]:
    """Returns of each exact call how far another engine moves its rows' scores [N]: zeros where
    that engine reads the replies in other batches, and so has other calls."""
    if [x.scores.shape for x in calls] != [x.scores.shape for x in exact]:
        return [torch.zeros(len(x.scores), dtype=torch.float64) for x in exact]
    return [(x.scores - y.scores).abs().amax(-1) for x, y in zip(exact, calls, strict=True)]


class Reading:
    """The log probabilities [T] of replies as one engine gives them, and what it may report where
    its routers' choices are near ties."""

    def __init__(
        self, model: GLM, replies: Sequence[Reply], shaping: Shaping, how: Variant = PLAIN
    ) -> None:
        self._model, self._replies, self._shaping = how.of(model), replies, shaping
        self._how = dataclasses.replace(how, model=None)
        scoring = Scoring(how.interceptor)
        self.logprobs = self._read(scoring)
        self.calls = scoring.calls

    def _read(self, interceptor: Interceptor) -> Array:
        how = dataclasses.replace(self._how, interceptor=interceptor)
        return collect(trained(self._model, self._replies, how), self._replies, [self._shaping])[0]

    def others(self, slack: Sequence[Tensor], layers: int) -> Array:
        """Returns by how much the log probabilities change [A, T] where tokens with near ties in
        one of so many layers go another way, for each way that any token has. slack: of each call,
        see `controls`."""
        found = []
        for layer in range(layers):
            numbers = range(layer, len(self.calls), layers)
            ways = {i: self.calls[i].ways(slack[i]) for i in numbers}
            for way in range(max(map(len, ways.values()), default=0)):
                found.append(self._change({i: w[way] for i, w in ways.items() if way < len(w)}))
        return np.stack(found) if found else np.zeros((0, self.logprobs.size))

    def flipped(self, slack: Sequence[Tensor]) -> Array:
        """Returns by how much the log probabilities change [A, T] where every token with near ties,
        in whatever layer, goes its nearest other way; A = 0 where there are none. slack: see
        `controls`; where the calls there were others, its largest value counts."""
        if [len(s) for s in slack] != [len(x.scores) for x in self.calls]:
            most = max(float(s.max()) for s in slack)
            slack = [torch.full((len(x.scores),), most, dtype=torch.float64) for x in self.calls]
        ways = [call.ways(moved) for call, moved in zip(self.calls, slack, strict=True)]
        nearest = {number: functools.reduce(_first, w) for number, w in enumerate(ways) if w}
        found = [self._change(nearest)] if nearest else []
        return np.stack(found) if found else np.zeros((0, self.logprobs.size))

    def _change(self, ways: Mapping[int, Way]) -> Array:
        return self._read(_Flipping(ways, self._how.interceptor)) - self.logprobs


def _first(a: Way, b: Way) -> Way:
    """Returns the first way where rows have it, else the second."""
    return torch.where(a[1][:, None], a[0], b[0]), a[1] | b[1]
