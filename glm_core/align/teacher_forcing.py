"""Measures the errors of op calls under teacher forcing. A candidate, the disguised reference and
float64 get the same captured inputs; the errors are scored, and the disguises' scores are the
benign range."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glm_core.align import choices, statistics
from glm_core.align.capture import Call
from glm_core.align.honest_ways import Runner, disguises
from glm_core.align.replay import LOW, Results, exact, replay
from glm_core.align.statistics import Array, CorrectResult, Grouping, Scores, Sums, quantile_bins
from glm_core.align.verdict import NOT_FINITE

SAFETY_FACTOR = {
    "scale": 3.0,
    "offset": 3.0,
    "sign": 2.0,
    "lean": 3.0,
    "size": 3.0,
    "peak": 4.0,
    "differ": 1.0,
}
"""by statistic: a candidate may show so many times the benign range, because a kernel may combine
changes that the range was measured with one by one"""
ROW_SAFETY_FACTOR = 6.0
"""the safety factor for the size of a row's error: a row has few elements, and some rows are small
because their terms cancel"""
LEAN = 0.15
"""the floor of a lean: twice what an op's disguises show whose roundings follow no pattern"""
DIFFER = 1e-12
"""the floor of whole numbers that differ: none may"""
CALLS_PER_SHAPE = 4
"""the benign range is measured on so many calls per op and shape"""


class Key(NamedTuple):
    """A family of tests: those that share a benign range."""

    op: str
    tensor: str
    """the op's result, see `trace_format.OpResult`"""
    grouping: str
    statistic: str
    """scale, offset, sign, lean, size or peak; of whole numbers `differ`, the share that does"""
    pooled: bool
    """over all calls of the op"""


class Scored(NamedTuple):
    """The scores of one result in one grouping."""

    op: str
    tensor: str
    grouping: str
    scores: Scores
    case: Case | None
    """the case it was seen in; None where all calls were pooled"""


Tested = tuple[Key, Array, Array, "Case | None"]
"""a family of tests with its effects and standard errors, one per group, and the case (None where
all calls were pooled)"""

Pool = dict[tuple[str, str, str], tuple[Sums, float]]
"""by op, tensor and grouping: the sums over all calls so far, and `CorrectResult.least`"""


@dataclasses.dataclass(slots=True, eq=False)
class Case:
    """A captured call and its correct results, each with its shape and dtype."""

    call: Call
    correct: dict[str, CorrectResult]
    """by result: the correct values and the groups their errors are summed over"""
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    overflowed: list[str] = dataclasses.field(default_factory=list)
    """results that are infinite or NaN when correct: there is no arithmetic to judge"""
    whole: dict[str, Any] = dataclasses.field(default_factory=dict)
    """results that are whole numbers, such as an order or counts, and must be exact"""
    unrounded: dict[str, CorrectResult] = dataclasses.field(default_factory=dict)
    """the correct results of a kernel that keeps in float32 what the op's contract lets it keep;
    empty where that changes nothing"""

    def nearest(self, results: Results) -> dict[str, CorrectResult]:
        """Returns the correct results that a kernel's are nearer to, all of them together: a kernel
        rounds as the reference does, or nowhere inside."""
        if not self.unrounded:
            return self.correct
        either = (self.correct, self.unrounded)
        return min(either, key=lambda correct: _distance(correct, results))

    @property
    def terms(self) -> int:
        """Returns a bound on the number of terms in the op's longest sum: of a list that is not
        written, all elements."""
        lists = [x for x in self.call.args.values() if isinstance(x, (list, tuple))]
        if lists and not self.call.op.mutates:
            return max(sum(t.numel() for t in x if isinstance(t, Tensor)) for x in lists)
        return max((t.numel() // t.shape[-1] for t in self.call.tensors() if t.ndim > 1), default=1)

    @property
    def change_rounding(self) -> float:
        """Returns what rounding the largest written value can do to an update, as a share of the
        update's largest element; 0.0 where nothing is written or changed."""
        if "change" not in self.correct or not self.correct["change"].peak:
            return 0.0
        written = self.call.op.mutates[0]
        _, exponent = math.frexp(self.correct[written].peak)
        half_unit = math.ldexp(torch.finfo(self.dtypes[written]).eps, exponent - 2)
        return half_unit / self.correct["change"].peak


def cases(calls: Iterable[Call]) -> Iterator[Case]:
    """Yields each call with its correct results: computed in float64 and rounded once."""
    for call in calls:
        reference = replay(call, call.op.reference)
        results = exact(call, reference)
        finite = {n: y for n, y in results.items() if y.isfinite().all()}
        # replay returns integers in float64: they are not rounded, and any error in one is wrong
        whole = [n for n, y in finite.items() if n.startswith("y") and y.dtype == torch.float64]
        yield Case(
            call,
            {n: _correct_result(call, n, y) for n, y in finite.items() if n not in whole},
            {n: tuple(y.shape) for n, y in results.items()},
            {n: torch.int64 if n in whole else y.dtype for n, y in results.items()},
            [n for n in results if n not in finite],
            {n: _array(results[n]) for n in whole},
            _unrounded(call, reference),
        )


def _unrounded(call: Call, like: Results) -> dict[str, CorrectResult]:
    low = any(t.dtype in LOW for t in call.tensors())
    if not (call.op.may_keep_wide and low):
        return {}
    results = exact(call, like, unrounded=True)
    if not all(y.isfinite().all() for y in results.values()):
        return {}
    return {n: _correct_result(call, n, y) for n, y in results.items()}


def _distance(correct: dict[str, CorrectResult], results: Results) -> float:
    """Returns the sum over all results of their mean square error, in shares of the result's own
    mean square."""
    errors = [(c, c.errors(_array(results[n]))) for n, c in correct.items() if n in results]
    return sum(float(d @ d) / (float(np.vdot(c.y, c.y)) + 1e-30) for c, d in errors)


def _correct_result(call: Call, name: str, y: Tensor) -> CorrectResult:
    reduced = name in ("d_weight", "d_bias")  # sums over all tokens: rounding scales with the terms
    is_list = name in call.op.mutates or name == "change"
    groupings = statistics.structure((y.numel(),) if is_list else y.shape)
    if is_list:
        groupings = groupings[:1]  # tensors of all shapes one after another
    if y.numel() >= 32 * statistics.NUM_BINS:
        for key, values in _keys(call, name, y).items():
            bins = quantile_bins(values.float().flatten().numpy())
            inner = y.numel() // bins.size
            groupings.append(Grouping(f"bin of {key}", statistics.NUM_BINS, inner, bins))
    eps = torch.finfo(y.dtype).eps
    width = 0 if is_list or reduced or y.ndim < 2 else y.shape[-1]
    return CorrectResult(_array(y), groupings, 1.0 if reduced else 0.03, eps, width)


def _array(y: Tensor) -> Any:
    wide = y if y.dtype == torch.float64 else y.float()
    return wide.detach().numpy().reshape(-1)


def _keys(call: Call, name: str, y: Tensor) -> dict[str, Tensor]:
    """Returns the values by which elements are sorted into bins: the result; the argument at the
    same place, or both halves of a gated one; and the mean square of the argument's row."""
    keys = {"result": y}
    x = call.args.get(name[2:] if name.startswith("d_") else "x")
    if not isinstance(x, Tensor) or x.shape[:-1] != y.shape[:-1]:
        return keys
    if call.op.name in ("geglu", "swiglu"):
        times = 2 * y.shape[-1] // x.shape[-1]
        return keys | {
            f"half {i}": torch.cat([h] * times, -1) for i, h in enumerate(x.chunk(2, -1))
        }
    if x.shape == y.shape:
        keys["argument"] = x
    keys["row"] = x.double().square().mean(-1)  # one per row
    return keys


@dataclasses.dataclass(slots=True)
class Measures:
    """The scores of many calls."""

    scored: list[Scored]
    pool: Pool = dataclasses.field(default_factory=dict)

    def by_statistic(self) -> Iterator[Tested]:
        """Yields each family of tests in each case."""
        for op, tensor, grouping, scores, case in self.scored:
            for statistic, (effect, error) in scores.items():
                # results near zero are small by cancellation, their errors are not
                if effect.size and (statistic, grouping) != ("size", "bin of result"):
                    yield Key(op, tensor, grouping, statistic, case is None), effect, error, case

    def count(self) -> int:
        """Returns the number of tests."""
        return sum(effect.size for _, effect, _, _ in self.by_statistic())


def at_once(
    tested: list[Tested],
    function: Callable[[Array, Array, NDArray[np.intp], NDArray[np.bool_]], Array],
) -> list[Array]:
    """Returns for each family what `function` gives for its effects, standard errors, the family's
    number at each of them, and whether they are shares of signs. `function` computes number by
    number, and is called with all families together: a step has thousands, most of them small."""
    if not tested:
        return []
    effect, error = (np.concatenate([t[column] for t in tested]) for column in (1, 2))
    sizes = [t[1].size for t in tested]
    family = np.repeat(np.arange(len(tested)), sizes)
    of_signs = np.array([key.statistic in statistics.SHARES for key, *_ in tested])
    values = function(effect, error, family, of_signs[family])
    return np.split(values, np.cumsum(sizes)[:-1])


def measure(
    items: Iterable[Case], runner: Runner, twice: bool = False
) -> tuple[Measures, list[Results | None]]:
    """Runs all calls in order and scores their results. Every result is kept until the last call
    has run, so that a kernel which reuses a buffer shows. `twice` runs the calls again in reverse
    order and scores the results that changed, so that a kernel which keeps state shows. Returns the
    scores and the results of the first pass."""
    items = list(items)

    def run(case: Case) -> Results | None:
        results = runner(case.call)
        return None if results is None else choices.settled(case.call, results)

    first_pass = [(case, run(case)) for case in items]
    second_pass = [(case, run(case)) for case in reversed(items)] if twice else []
    measured = Measures([])
    pool = measured.pool
    for case, results in first_pass:
        _score(measured, case, results or {}, pool)
    for (case, second), (_, first) in zip(reversed(second_pass), first_pass, strict=False):
        if first is not None and second is not None:
            changed = {n: y for n, y in second.items() if not torch.equal(y, first[n])}
            _score(measured, case, changed, {})
    for place, (total, least) in pool.items():
        measured.scored.append(Scored(*place, _scores(total, least), None))
    return measured, [results for _, results in first_pass]


def _scores(s: Sums, least: float) -> Scores:
    whole = s.count.size == 1
    return statistics.scores(s, least) | ({"lean": statistics.lean(s)} if whole else {})


def _score(measured: Measures, case: Case, results: Results, pool: Pool) -> None:
    for name in (n for n in case.whole if n in results):
        right, given = case.whole[name], _array(results[name].double())
        share = float((given != right).mean()) if given.size == right.size else 1.0
        if right.size:
            scores = {"differ": (np.array([share]), np.zeros(1))}
            measured.scored.append(Scored(case.call.op.name, name, "all", scores, case))
    for name, correct in case.nearest(results).items():
        if name not in results:
            continue
        errors = correct.errors(_array(results[name]))
        for grouping, s in zip(correct.groupings, statistics.sums(correct, errors), strict=True):
            place = (case.call.op.name, name, grouping.name)
            scores = _scores(s, correct.least)
            if grouping.groups == 1:
                peak = np.array([np.abs(errors).max(initial=0.0) / (correct.peak + 1e-300)])
                scores["peak"] = (peak, np.zeros(1))
            measured.scored.append(Scored(*place, scores, case))
            if grouping.groups == 1 or grouping.bins is not None:
                pool[place] = (pool[place][0] + s if place in pool else s), correct.least


def benign_limits(items: list[Case], dtype: torch.dtype, sampled: bool = True) -> dict[Key, float]:
    """Returns for each family of tests the largest effect that any disguise shows. Signs are
    reduced by three standard errors, because a single error already has a sign of 1. The plain
    reference takes every call: one row whose sums cancel has many times the error of others, and
    must not be new in the reference's own run. The other disguises take a sample where `sampled`,
    drawn without replacement: to its range of all calls together its standard error is added,
    since calls may lean to opposite sides and cancel in the sample."""
    limits: dict[Key, float] = {}
    chosen = sample(items) if sampled else items
    elements: Counter[tuple[str, str]] = Counter()
    for case in items:
        elements.update({(case.call.op.name, n): y.y.size for n, y in case.correct.items()})
    for name, runner in disguises(dtype).items():
        measured, _ = measure(items if name == "plain" else chosen, runner)
        tested = list(measured.by_statistic())
        for (key, *_), bounds in zip(tested, at_once(tested, _benign_bound), strict=True):
            limits[key] = max(limits.get(key, 0.0), float(bounds.max()))
        for (op, tensor, grouping), (total, least) in measured.pool.items():
            unseen = max(1 - total.count.sum() / elements[op, tensor], 0.0) ** 0.5
            scored = statistics.scores(total, least)
            for statistic, sizes in statistics.spread(total, least).items():
                key = Key(op, tensor, grouping, statistic, pooled=True)
                bound = float((np.abs(scored[statistic][0]) + unseen * sizes).max())
                limits[key] = max(limits.get(key, 0.0), bound)
    for key in [k for k in limits if k.statistic == "lean"]:
        # calls may lean to opposite sides, and a disguise be on the other side of SPARSE
        alike = itertools.product(statistics.SHARES, (False, True))
        of_alike = [key._replace(statistic=name, pooled=pooled) for name, pooled in alike]
        limits[key] = max(limits.get(k, 0.0) for k in of_alike)
    for case in items:  # rare: no disguise may have met the largest value's other rounding
        key = Key(case.call.op.name, "change", "all", "peak", pooled=False)
        if rounding := case.change_rounding:
            limits[key] = max(limits.get(key, 0.0), rounding)
    return limits


def _benign_bound(effect: Array, error: Array, _: Any, of_signs: NDArray[np.bool_]) -> Array:
    deviations = np.where(of_signs, 3.0, 0.0)
    return statistics.lower_bound(effect, error, deviations, share=of_signs)


def sample(items: list[Case]) -> list[Case]:
    """Returns at most CALLS_PER_SHAPE cases per op and shape, spread over layers and steps."""
    alike: dict[tuple[Any, ...], list[Case]] = {}
    for case in items:
        shapes = tuple(t.shape for t in case.call.tensors())
        alike.setdefault((case.call.op.name, shapes), []).append(case)
    return [group[i] for group in alike.values() for i in _spread(len(group), CALLS_PER_SHAPE)]


def _spread(n: int, most: int) -> list[int]:
    return sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})


def floor(statistic: str, dtype: torch.dtype, terms: int) -> float:
    """Returns the smallest benign limit: what rounding and float32 arithmetic do to any kernel
    whose longest sum has so many terms."""
    # 4: a row that is small because two sums cancel has the rounding of both
    eps = torch.finfo(dtype).eps if dtype in LOW else 4 * statistics.EPS * max(1.0, terms**0.5)
    floors = {"sign": 0.5, "lean": LEAN, "size": eps, "peak": 4 * eps, "differ": DIFFER}
    return floors.get(statistic, statistics.FLOOR)


def limit(limits: dict[Key, float], key: Key, dtype: torch.dtype, terms: int) -> float:
    """Returns a candidate's limit: the benign range times its safety factor, at least the floor.
    No share of signs exceeds 1: where the limit would, the test convicts nobody, and the limit is
    NOT_FINITE, so that its ratio is 0 and not that of a near conviction."""
    row_size = (key.grouping, key.statistic) == ("row", "size")
    factor = ROW_SAFETY_FACTOR if row_size else SAFETY_FACTOR[key.statistic]
    allowed = max(factor * limits.get(key, 0.0), floor(key.statistic, dtype, terms))
    return NOT_FINITE if key.statistic in statistics.SHARES and allowed >= 1 else allowed
