"""Judges what operators computed, call by call: the errors' statistics against what rounding does,
then against honest ways to compute the same call. One false-alarm rate holds for all calls."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glm_core.align import statistics, teacher_forcing
from glm_core.align.statistics import CorrectResult, Grouping, Scores
from glm_core.align.teacher_forcing import Key
from glm_core.verdict import oracle
from glm_core.verdict.oracle import Call, Results

LEAST = 0.03
"""a group whose root mean square is below this share of the tensor's is measured against that"""
HUGE = 1e30
"""larger values stand for minus infinity in masks: they are compared one by one"""

SHARE = 1e-3
"""a generator's share of ones may be off by so much: its numbers have few bits"""


@dataclasses.dataclass(frozen=True, slots=True)
class Outside:
    """A test whose effect is larger than any honest way showed."""

    result: str
    test: str
    """`scale`, `size in row 7`, or what is wrong in words"""
    effect: float
    error: float
    limit: float
    dtype: str
    shape: tuple[int, ...]

    def ratio(self, z: float) -> float:
        """Returns the share of what is allowed; above 1 is guilty."""
        values = (np.array([self.effect]), np.array([self.error]))
        return float(statistics.excess(*values, self.limit, z)[0])


@dataclasses.dataclass(slots=True)
class Judgement:
    """What the tests of one call showed."""

    num_tests: int = 0
    ratio: float = 0.0
    """the largest share of what is allowed"""
    outside: list[Outside] = dataclasses.field(default_factory=list)


class _Result:
    """One result of a call, beside its correct value."""

    def __init__(
        self,
        name: str,
        actual: Tensor,
        exact: Tensor,
        terms: int,
        only: tuple[str, ...] = (),
    ) -> None:
        self.name, self.terms = name, terms
        self.only = only
        """the statistics that are judged; empty: all"""
        self.dtype, self.shape = actual.dtype, tuple(actual.shape)
        self.exact = exact
        self.worst = 0.0
        """the largest share of what is allowed"""
        y = exact.to(actual.dtype)
        self.equal = torch.equal(actual, y)
        self.special = ~(y.abs() < HUGE)
        self.where = bool(self.special.any())
        self.correct: CorrectResult | None = None
        self.errors = np.zeros(0)
        if not self.equal:
            self._measure(actual, y)

    def _measure(self, actual: Tensor, y: Tensor) -> None:
        array = _array(self._plain(y))
        self.correct = CorrectResult(
            array,
            _groupings(self.shape, array),
            LEAST,
            torch.finfo(self.dtype).eps,
            self.shape[-1] if len(self.shape) > 1 else 0,
        )
        self.errors = self.correct.errors(_array(self._plain(actual)))

    def _plain(self, x: Tensor) -> Tensor:
        """Returns x with zeros where the correct value is huge or not finite."""
        return torch.where(self.special, 0, x) if self.where else x

    def special_differs(self, actual: Tensor) -> bool:
        """Says whether the values that are huge or not finite are other ones than the correct."""
        if not self.where:
            return False
        x, y = actual[self.special].double(), self.exact[self.special]
        limit = torch.finfo(self.dtype).max
        x, y = (t.nan_to_num(math.nan, limit, -limit).clamp(-limit, limit) for t in (x, y))
        eps = 4 * torch.finfo(self.dtype).eps
        same = (x - y).abs() <= eps * y.abs()
        return not bool((same | (x.isnan() & y.isnan())).all())

    def scores(self, errors: Any) -> dict[str, Scores]:
        """Returns the statistics of errors by grouping."""
        correct = self.correct
        assert correct is not None
        scored = {}
        totals = statistics.sums(correct, errors)
        for grouping, s in zip(correct.groupings, totals, strict=True):
            scores = statistics.scores(s, correct.least)
            if grouping.groups == 1:
                peak = np.array([np.abs(errors).max(initial=0.0) / (correct.peak + 1e-300)])
                scores["peak"] = (peak, np.zeros(1))
            if grouping.name == "bin of result":  # small by cancellation, their errors are not
                del scores["size"]
            if self.only:
                scores = {n: s for n, s in scores.items() if n in self.only}
            scored[grouping.name] = scores
        return scored

    def errors_of(self, other: Tensor) -> Any:
        """Returns the errors of another way to compute this result."""
        assert self.correct is not None
        return self.correct.errors(_array(self._plain(other.to(self.dtype))))


def _structure(shape: tuple[int, ...]) -> list[Grouping]:
    """Returns the groupings of a shape; a flat result has one, because single elements are none."""
    return statistics.structure(shape)[: 1 if len(shape) < 2 else None]


def _groupings(shape: tuple[int, ...], y: Any) -> list[Grouping]:
    groupings = _structure(shape)
    if y.size >= 32 * statistics.NUM_BINS:
        bins = statistics.quantile_bins(y)
        groupings.append(Grouping("bin of result", statistics.NUM_BINS, 1, bins))
    return groupings


def _array(x: Tensor) -> Any:
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.contiguous().numpy().reshape(-1)


def terms(call: Call, result: Tensor) -> int:
    """Returns a bound on the number of terms in the longest sum of a result's element."""
    if torch.Tag.pointwise in call.func.tags:
        return 1
    sizes = [(t.numel(), t.shape[-1]) for t in call.tensors() if t.ndim and t.numel()]
    largest, row = (max((s[i] for s in sizes), default=1) for i in (0, 1))
    return max(row, largest // max(result.numel(), 1), 1)


@np.errstate(all="ignore")  # what overflows is infinite, and what is NaN counts as infinite
def judge(call: Call, actual: Results, z: float) -> Judgement:
    """Judges what one call computed. `z` is the number of standard errors that a test must exceed
    at least; the final one is larger, because it holds for all calls. Raises what the host raises
    where it cannot compute the operator."""
    judgement = Judgement()
    exact = oracle.exact(call)
    later: list[tuple[_Result, dict[str, Scores]]] = []
    plain: Callable[[], Results] = lambda: oracle.compute(call, None)  # noqa: E731
    for name, raw in actual.items():
        y = exact.get(name)
        if y is None or (not y.numel() and raw.numel()):
            continue  # the reference leaves this result out
        value = torch.view_as_real(raw.resolve_conj()) if raw.is_complex() else raw
        if value.shape != y.shape:
            judgement.outside.append(wrong(name, value, "shape"))
            continue
        if not value.is_floating_point():
            judgement.num_tests += 1
            if not _same_integers(call, name, value, y, plain):
                judgement.outside.append(wrong(name, value, "values differ"))
            continue
        result = _Result(name, value, y, terms(call, value))
        if _has_errors(result, value, judgement):
            later.append((result, result.scores(result.errors)))
    for result, scores in later:
        _search(oracle.variations(call, result.dtype), result, scores, judgement, z)
    return judgement


@np.errstate(all="ignore")
def judge_sizes(
    actual: Results,
    exact: Results,
    variations: Iterator[Results],
    terms: int,
    z: float,
) -> Judgement:
    """Judges the sizes and peaks of the errors of results that many operators computed. `terms`
    bounds the number of terms in their longest sum."""
    judgement = Judgement()
    for name, value in actual.items():
        y = exact.get(name)
        if y is None or value.shape != y.shape:
            judgement.outside.append(wrong(name, value, "missing or of another shape"))
            continue
        result = _Result(name, value, y, terms, only=("size", "peak"))
        if _has_errors(result, value, judgement):
            variations, own = itertools.tee(variations)
            _search(own, result, result.scores(result.errors), judgement, z)
    return judgement


def _has_errors(result: _Result, value: Tensor, judgement: Judgement) -> bool:
    """Counts the tests of a result, and enters what is infinite or NaN in the wrong places; returns
    whether errors are left to be judged."""
    judgement.num_tests += (len(result.only) or 4) * sum(g.groups for g in _structure(result.shape))
    if result.equal:
        return False
    if result.special_differs(value):
        judgement.outside.append(wrong(result.name, value, "infinite or NaN elsewhere"))
        return False
    return result.correct is not None


def judge_drawn(probability: float, drawn: Tensor) -> Judgement:
    """Judges zeros and ones that were drawn: their share must be the probability."""
    judgement, share = Judgement(num_tests=1), float(drawn.double().mean())
    if not bool(((drawn == 0) | (drawn == 1)).all()):
        judgement.outside.append(wrong("self", drawn, "other values than 0 and 1"))
    error = math.sqrt(probability * (1 - probability) / max(drawn.numel(), 1))
    off = Outside(
        "self",
        f"a share of {share:.4f} ones for a probability of {probability:g}",
        share - probability,
        error,
        SHARE,
        str(drawn.dtype).removeprefix("torch."),
        tuple(drawn.shape),
    )
    if off.ratio(1.0) > 1:
        judgement.outside.append(off)
    return judgement


def wrong(name: str, value: Tensor, test: str) -> Outside:
    """Returns a test that says in words what is wrong."""
    dtype = str(value.dtype).removeprefix("torch.")
    return Outside(name, test, math.inf, 0.0, 1.0, dtype, tuple(value.shape))


def _same_integers(
    call: Call, name: str, value: Tensor, exact: Tensor, plain: Callable[[], Results]
) -> bool:
    """Says whether integers or truth values are the exact ones, those of the host's own kernel, or
    places of equal elements."""
    if torch.equal(value, exact.to(value.dtype)) or torch.equal(value, plain()[name]):
        return True
    first = call.args[0].detach().cpu() if isinstance(call.args[0], Tensor) else None
    if value.dtype != torch.int64 or first is None or not first.is_floating_point():
        return False
    dim = next((a for a in call.args[1:] if isinstance(a, int)), -1)
    if "topk" in call.func._schema.name:
        dim = call.args[2] if len(call.args) > 2 else -1
    try:
        return torch.equal(first.gather(dim, value), first.gather(dim, exact))
    except (RuntimeError, IndexError):
        return False


def _search(
    variations: Iterator[Results],
    result: _Result,
    scores: dict[str, Scores],
    judgement: Judgement,
    z: float,
) -> None:
    """Widens the benign range by one honest way after the other until the result is inside, and
    adds to the judgement what stays outside. The range only grows, so that an early end gives the
    same verdict."""
    assert result.correct is not None
    judgement.num_tests += sum(g.groups for g in result.correct.groupings if g.bins is not None) * 3
    limits: dict[Key, float] = {}
    for other in itertools.chain([None], variations):
        if other is not None:
            if result.name not in other or other[result.name].shape != result.shape:
                continue
            _widen(limits, result.scores(result.errors_of(other[result.name])))
        result.worst = 0.0
        outside = list(_outside(result, scores, limits, z))
        if not outside:
            break
    judgement.ratio = max(judgement.ratio, result.worst)
    judgement.outside += outside


def _widen(limits: dict[Key, float], scores: dict[str, Scores]) -> None:
    """Raises the limits to the largest effects that these scores show."""
    for grouping, by_statistic in scores.items():
        for statistic, (effect, error) in by_statistic.items():
            if effect.size:
                key = _key(grouping, statistic)
                noise = 3.0 if statistic == "sign" else 0.0
                bound = float(statistics.lower_bound(effect, error, noise).max())
                limits[key] = max(limits.get(key, 0.0), bound)


def _key(grouping: str, statistic: str) -> Key:
    return Key("", "", grouping, statistic, pooled=False)


def _outside(
    result: _Result, scores: dict[str, Scores], limits: dict[Key, float], z: float
) -> Iterator[Outside]:
    """Yields for each grouping and statistic the test that is furthest outside, if one is."""
    tests = [(g, s, *scored) for g, own in scores.items() for s, scored in own.items()]
    tests = [(g, s, effect, error) for g, s, effect, error in tests if effect.size]
    if not tests:
        return
    bounds = [
        teacher_forcing.limit(limits, _key(g, s), result.dtype, result.terms)
        for g, s, _, _ in tests
    ]
    sizes = [effect.size for _, _, effect, _ in tests]
    effects, errors = (np.concatenate([t[i] for t in tests]) for i in (2, 3))
    excess = statistics.excess(effects, errors, np.repeat(bounds, sizes), z)
    dtype = str(result.dtype).removeprefix("torch.")
    ends = np.cumsum(sizes)
    for (grouping, statistic, effect, error), bound, end in zip(tests, bounds, ends, strict=True):
        at = int(np.argmax(excess[end - effect.size : end]))
        test = statistic if grouping == "all" else f"{statistic} in {grouping} {at}"
        if excess[end - effect.size + at] > result.worst:
            result.worst = float(excess[end - effect.size + at])
        if excess[end - effect.size + at] > 1:
            yield Outside(
                result.name, test, float(effect[at]), float(error[at]), bound, dtype, result.shape
            )
