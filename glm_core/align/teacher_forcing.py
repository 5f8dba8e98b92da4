"""Teacher forcing, op by op: the same captured inputs to a candidate, to the reference in disguise
and to float64; which differences have a direction, and which are larger than honest ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glm_core.align import statistics
from glm_core.align.capture import Call
from glm_core.align.disguise import Regrouped, Rounded
from glm_core.align.replay import LOW, Results, exact, replay
from glm_core.align.statistics import Base, Grouping, Scores, Sums, quantile_bins

MARGIN = {"scale": 3.0, "offset": 3.0, "sign": 2.0, "size": 3.0, "peak": 4.0}
"""a kernel may combine several of the changes that the benign range was measured with one by one"""
ROW_MARGIN = 6.0
"""for the size in a row: few elements, small by cancellation in some rows and not in others"""
MAX_ROUNDED = 24
CALLS_PER_SHAPE = 4
"""calls per op and shape that the benign range is measured on"""

Key = tuple[str, str, str, str, bool]
"""op, result, grouping, kind, pooled over calls"""
Pool = dict[tuple[str, str, str], tuple[Sums, float]]
Runner = Callable[[Call], Results | None]
"""None where this way of running the call changes nothing"""


@dataclasses.dataclass(slots=True, eq=False)
class Case:
    """A call and its correct results, each with its shape and dtype."""

    call: Call
    bases: dict[str, Base]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    @property
    def terms(self) -> int:
        """A bound on the number of terms in the op's longest sum."""
        return max((t.numel() // t.shape[-1] for t in _tensors(self.call) if t.ndim > 1), default=1)


def _tensors(call: Call) -> list[Tensor]:
    values = [v for a in call.args.values() for v in (a if isinstance(a, list) else [a])]
    return [v for v in values if isinstance(v, Tensor)]


def cases(calls: Iterable[Call]) -> Iterator[Case]:
    """Each call with its results in float64, rounded once."""
    for call in calls:
        correct = exact(call, replay(call, call.op.reference))
        yield Case(
            call,
            {n: _base(call, n, y) for n, y in correct.items()},
            {n: tuple(y.shape) for n, y in correct.items()},
            {n: y.dtype for n, y in correct.items()},
        )


def _base(call: Call, name: str, y: Tensor) -> Base:
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
    return Base(_array(y), groupings, 1.0 if reduced else 0.03)


def _array(y: Tensor) -> Any:
    wide = y if y.dtype == torch.float64 else y.float()
    return wide.detach().numpy().reshape(-1)


def _keys(call: Call, name: str, y: Tensor) -> dict[str, Tensor]:
    """What elements are binned by: the result; the argument at the same place, or both halves of a
    gated one; the mean square of the argument's row."""
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
    """Scores by key, each with the case it was seen in (None for pooled ones)."""

    found: list[tuple[Key, Scores, Case | None]]

    def by_kind(self) -> Iterator[tuple[Key, Any, Any, Case | None]]:
        """(key with its kind, effects, standard errors, case)"""
        for (op, name, grouping, _, pooled), scores, case in self.found:
            for kind, (effect, error) in scores.items():
                # results near zero are small by cancellation, their errors are not
                if effect.size and (kind, grouping) != ("size", "bin of result"):
                    yield (op, name, grouping, kind, pooled), effect, error, case

    def count(self) -> int:
        """How many tests there are."""
        return sum(effect.size for _, effect, _, _ in self.by_kind())


def measure(
    items: Iterable[Case], runner: Runner, twice: bool = False
) -> tuple[Measures, list[Results | None]]:
    """Runs all calls in their order, keeping every result until the last has run (a kernel that
    reuses a buffer shows), then scores them. `twice` runs them again in the reverse order and
    scores results that changed (a kernel with a memory shows)."""
    items = list(items)
    ran = [(case, runner(case.call)) for case in items]
    again = [(case, runner(case.call)) for case in reversed(items)] if twice else []
    measured = Measures([])
    pool: Pool = {}
    for case, results in ran:
        _score(measured, case, results or {}, pool)
    for (case, second), (_, first) in zip(reversed(again), ran, strict=False):
        if first is not None and second is not None:
            changed = {n: y for n, y in second.items() if not torch.equal(y, first[n])}
            _score(measured, case, changed, {})
    for (op, name, grouping), (total, least) in pool.items():
        key = (op, name, grouping, "", True)
        measured.found.append((key, statistics.scores(total, least), None))
    return measured, [results for _, results in ran]


def _score(measured: Measures, case: Case, results: Results, pool: Pool) -> None:
    for name in results.keys() & case.bases.keys():
        base = case.bases[name]
        errors = base.errors(_array(results[name]))
        for grouping, s in zip(base.groupings, statistics.sums(base, errors), strict=True):
            key = (case.call.op.name, name, grouping.name)
            found = statistics.scores(s, base.least)
            if grouping.groups == 1:
                peak = np.array([np.abs(errors).max(initial=0.0) / (base.peak + 1e-300)])
                found["peak"] = (peak, np.zeros(1))
            measured.found.append(((*key, "", False), found, case))
            if grouping.groups == 1 or grouping.bins is not None:
                pool[key] = (pool[key][0] + s, base.least) if key in pool else (s, base.least)


def disguises(dtype: torch.dtype) -> dict[str, Runner]:
    """The reference as it is, in two other orders of summation, and below float32 with its
    intermediates rounded, each in turn and all at once."""

    def regrouped(seed: int) -> Runner:
        return lambda call: replay(call, call.op.reference, Regrouped(seed))

    found: dict[str, Runner] = {
        "plain": lambda call: replay(call, call.op.reference),
        "regrouped": regrouped(1),
        "regrouped again": regrouped(2),
    }
    if dtype in LOW:
        found["rounded"] = lambda call: _rounded(call, dtype, None)
        for which in range(MAX_ROUNDED):
            found[f"rounded {which}"] = lambda call, which=which: _rounded(call, dtype, which)  # type: ignore[misc]
    return found


def _rounded(call: Call, dtype: torch.dtype, which: int | None) -> Results | None:
    if call.op.mutates or not call.op.differentiable:
        return None  # float32 by contract
    first = next(t for t in _tensors(call) if t.is_floating_point())
    mode = Rounded(dtype, first.numel() // 2, which)
    results = replay(call, call.op.reference, mode)
    return results if mode.seen > (which or 0) else None


def benign_limits(items: list[Case], dtype: torch.dtype) -> dict[Key, float]:
    """Per key the largest effect the disguised reference shows; signs, which are 1 for a single
    error, less three standard errors."""
    limits: dict[Key, float] = {}
    chosen = sample(items)
    for runner in disguises(dtype).values():
        for key, effect, error, _ in measure(chosen, runner)[0].by_kind():
            noise = 3.0 if key[3] == "sign" else 0.0
            bound = float(statistics.lower_bound(effect, error, noise).max())
            limits[key] = max(limits.get(key, 0.0), bound)
    return limits


def sample(items: list[Case]) -> list[Case]:
    """At most CALLS_PER_SHAPE cases per op and shape, spread over layers and steps."""
    alike: dict[tuple[Any, ...], list[Case]] = {}
    for case in items:
        shapes = tuple(t.shape for t in _tensors(case.call))
        alike.setdefault((case.call.op.name, shapes), []).append(case)
    return [group[i] for group in alike.values() for i in _spread(len(group), CALLS_PER_SHAPE)]


def _spread(n: int, most: int) -> list[int]:
    return sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})


def floor(kind: str, dtype: torch.dtype, terms: int) -> float:
    """The smallest benign limit: what rounding and float32 arithmetic may do to any kernel."""
    # 4: a row that is small because two sums cancel has the rounding of both
    eps = torch.finfo(dtype).eps if dtype in LOW else 4 * statistics.EPS * max(1.0, terms**0.5)
    return {"sign": 0.5, "size": eps, "peak": 4 * eps}.get(kind, statistics.FLOOR)


def limit(limits: dict[Key, float], key: Key, dtype: torch.dtype, terms: int) -> float:
    """The limit for a candidate: the benign range with its margin, at least the floor."""
    margin = ROW_MARGIN if key[2:4] == ("row", "size") else MARGIN[key[3]]
    return max(margin * limits.get(key, 0.0), floor(key[3], dtype, terms))
