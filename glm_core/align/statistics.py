"""Measures whether an error has a direction: sums over groups of elements, effect sizes and their
bounds. Pure numpy; derived, and checked by experiment, in docs/alignment.md.

The error of a result X is D = X - Y, where Y is the correctly rounded float64 result. Rounding
gives D no direction: summed over any group of elements that was chosen without looking at D, it
stays within a few standard errors of zero, and its size stays within what honest kernels show."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Scores = dict[str, tuple[Array, Array]]
"""by statistic (see `scores`): the effects and their standard errors, one per group"""

NUM_BINS = 32
EPS = float(np.finfo(np.float32).eps)
FLOOR = 8 * EPS
"""relative error with a direction that any kernel may have: polynomials for exp and erf, float32
inside"""
SPARSE = 0.05
"""a kernel that rounds an intermediate changes more than this share of the elements"""
SHARES = ("sign", "lean")
"""the statistics that are shares of signs: Chernoff's bounds hold for them"""


@dataclasses.dataclass(frozen=True, slots=True)
class Grouping:
    """A partition of a result's elements, which lie in memory as [outer, parts, inner]. Every part
    is a group, or `bins` gives each part's group."""

    name: str
    groups: int
    inner: int = 1
    bins: NDArray[np.uint8] | None = None

    def of(self, index: NDArray[np.intp]) -> NDArray[np.intp]:
        """Returns the groups of the elements with these flat indices."""
        part = index // self.inner if self.inner > 1 else index
        return part % self.groups if self.bins is None else self.bins[part].astype(np.intp)

    def spread(self, values: Array, size: int) -> Array:
        """Returns for each of `size` elements the value of its group."""
        parts = values if self.bins is None else values[self.bins]
        shape = (size // max(parts.size * self.inner, 1), parts.size, self.inner)
        return np.broadcast_to(parts[:, None], shape).reshape(-1)

    def totals(self, fields: Sequence[Array]) -> list[Array]:
        """Sums each field [elements] over every group."""
        num_parts = self.groups if self.bins is None else self.bins.size
        shape = (-1, num_parts, self.inner)
        parts: list[Array] = [
            f if f.size == num_parts else f.reshape(shape).sum((0, 2)) for f in fields
        ]
        if self.bins is None:
            return parts
        g = self.bins.astype(np.intp)
        return [np.bincount(g, p, self.groups).astype(np.float64) for p in parts]

    def totals_at(self, index: NDArray[np.intp], fields: Sequence[Array]) -> list[Array]:
        """Sums fields that are zero everywhere but at these flat indices."""
        g = self.of(index)
        return [np.bincount(g, f, self.groups).astype(np.float64) for f in fields]


def quantile_bins(key: NDArray[np.floating], groups: int = NUM_BINS) -> NDArray[np.uint8]:
    """Returns the bin of each element of a flat key; all bins are about equally full. The edges are
    quantiles of at most 16384 evenly spaced elements, rounded to a grid of 4096 cells, so that an
    element's bin is looked up and not searched for."""
    sample = key[:: max(1, key.size // 16384)].astype(np.float64)
    edges = np.quantile(sample, np.linspace(0, 1, groups + 1)[1:-1])
    low, cell = edges[0], max((edges[-1] - edges[0]) / 4094, 1e-300)
    table = np.searchsorted(edges, low + cell * np.arange(-0.5, 4095.5), side="right")
    # numpy 1.26 would compute in the key's float32, where a small cell is zero
    at = np.clip(np.subtract(key, low, dtype=np.float64) / cell + 1, 0, 4095)
    return table.astype(np.uint8)[np.nan_to_num(at).astype(np.int16)]


def structure(shape: Sequence[int]) -> list[Grouping]:
    """Returns the groupings that a shape alone gives: all; channel (last dimension); row (all other
    dimensions); for [B, L, ...] position; for [B, L, H, E] head."""
    size = math.prod(shape)
    groupings = [Grouping("all", 1, size or 1)]
    if len(shape) >= 1 and shape[-1] > 1:
        groupings.append(Grouping("channel", shape[-1]))
    if len(shape) >= 2 and shape[-1] and size:
        groupings.append(Grouping("row", size // shape[-1], shape[-1]))
    if len(shape) >= 3 and size:
        groupings.append(Grouping("position", shape[1], math.prod(shape[2:])))
    if len(shape) == 4 and size:
        groupings.append(Grouping("head", shape[2], shape[3]))
    return groupings


@dataclasses.dataclass(slots=True)
class Sums:
    """Everything `scores` needs, one number per group. Sums of several calls can be added."""

    count: Array
    yy: Array
    """sum Y^2"""
    explained: Array
    """number of elements whose rounding a lean of FLOOR flips, see `flips`"""
    dy_calls: Array
    """sum over the calls of (sum D Y)^2"""
    d_calls: Array
    """sum over the calls of (sum D)^2"""
    dy: Array
    """sum D Y"""
    dy2: Array
    """sum (D Y)^2, counted once for every copy of its row: equal errors are one error"""
    d: Array
    """sum D"""
    d2: Array
    """sum D^2"""
    d2_copies: Array
    """sum D^2, counted like dy2"""
    sign: Array
    """number of elements too large in magnitude, minus number of those too small"""
    raw_sign: Array
    """number of elements too high, minus number of those too low"""
    differ: Array
    """number of elements with D != 0"""
    differ_copies: Array
    """the same, counted like dy2"""

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, f) + getattr(other, f) for f in self.__slots__))


class CorrectResult:
    """The correct result, flat, and the groupings its errors are summed over. A group whose root
    mean square is below `least` times the tensor's is measured against that instead. `eps` is that
    of the result's dtype, `width` the length of its rows (0: it has none)."""

    def __init__(
        self,
        y: NDArray[np.floating],
        groupings: list[Grouping],
        least: float,
        eps: float = EPS,
        width: int = 0,
    ) -> None:
        self.y, self.groupings, self.least = y, groupings, least
        size = np.abs(y.astype(np.float64))
        self.copies = copies(y, width)
        self.fixed_totals = []
        for g in groupings:
            count, yy = g.totals([np.ones(y.size), size**2])
            rms = np.sqrt(measured_against(count, yy, least) / np.maximum(count, 1.0))
            explained = count  # a lean of FLOOR is more than float32's spacing
            if eps > FLOOR:
                (explained,) = g.totals([flips(size, g.spread(rms, y.size), eps)])
            self.fixed_totals.append([count, yy, explained])
        self.peak = float(size.max(initial=0.0))

    def errors(self, result: NDArray[np.floating]) -> Array:
        """Returns D; 1e30 where the result is not finite, everywhere if it has another size."""
        if result.size != self.y.size:
            return np.full(self.y.size, 1e30)
        errors: Array = result.astype(np.float64) - self.y
        if not np.isfinite(errors.sum()):
            np.nan_to_num(errors, copy=False, nan=1e30, posinf=1e30, neginf=-1e30)
        return errors


def copies(y: NDArray[np.floating], width: int) -> Array:
    """Returns for each element how many rows of this width are equal to its own. Equal rows come
    from equal arguments, and a kernel errs in all of them alike."""
    if not width or y.size <= width:
        return np.ones(y.size)
    rows = np.ascontiguousarray(y).view(np.dtype((np.void, width * y.itemsize)))
    _, which, counts = np.unique(rows, return_inverse=True, return_counts=True)
    return np.repeat(counts[which.reshape(-1)].astype(np.float64), width)


def flips(size: Array, rms: Array, eps: float) -> Array:
    """Returns for each element the probability that a lean flips its rounding: the lean divided by
    the gap to the next number. The lean is the largest that the scale and the offset of any kernel
    may have: FLOOR of the element's size and FLOOR of its group's root mean square. An exact zero
    is not flipped."""
    gap = np.ldexp(eps, np.frexp(size)[1] - 1)
    return np.minimum(1.0, FLOOR * (size + rms) / gap) * (size > 0)


def measured_against(count: Array, yy: Array, least: float) -> Array:
    """Returns the sum of Y^2 that each group's errors are measured against."""
    mean_square = yy.sum() / max(count.sum(), 1.0)
    square: Array = np.maximum(yy, least**2 * mean_square * np.maximum(count, 1.0)) + 1e-300
    return square


def sums(correct: CorrectResult, errors: Array) -> list[Sums]:
    """Sums the errors over every grouping of the correct result."""
    at = np.flatnonzero(errors)
    sparse = at.size < errors.size // 4
    d, y, m = errors, correct.y, correct.copies
    if sparse:
        d, y, m = d[at], y[at], m[at]
    up = np.sign(d)
    dy = d * y
    differ = np.abs(up)
    fields = [dy, dy * dy * m, d, d * d, d * d * m, up * np.sign(y), up, differ, differ * m]
    made = []
    for g, (count, yy, explained) in zip(correct.groupings, correct.fixed_totals, strict=True):
        totals = g.totals_at(at, fields) if sparse else g.totals(fields)
        made.append(Sums(count, yy, explained, totals[0] ** 2, totals[2] ** 2, *totals))
    return made


def scores(s: Sums, least: float) -> Scores:
    """Returns four statistics with their standard errors.

    scale: sum(D Y) / sum(Y^2). offset: mean(D) / rms(Y). sign: (ups - downs) / (ups + downs) of the
    errors that are not zero, counted in magnitude or in value, whichever is larger, without the
    flips that a lean of FLOOR explains; 0 where more than SPARSE of the elements differ, because
    rounding an intermediate is honest, frequent and biased. size: rms(D) / rms(Y), which has no
    standard error (0)."""
    n, yy = np.maximum(s.count, 1.0), measured_against(s.count, s.yy, least)
    rms = np.sqrt(yy / n)
    sign, sign_error = _share_of_signs(s)
    return {
        "scale": (s.dy / yy, np.sqrt(s.dy2) / yy),
        "offset": (s.d / (n * rms), np.sqrt(s.d2_copies) / (n * rms)),
        "sign": (sign * (s.differ < SPARSE * n), sign_error),
        "size": (np.sqrt(s.d2 / n) / rms, np.zeros_like(n)),
    }


def lean(s: Sums) -> tuple[Array, Array]:
    """Returns the share of signs that `scores` has where few elements differ, and its standard
    error, where more than SPARSE of a whole tensor's do: a rounding of an intermediate errs to both
    sides, a formula to one."""
    share, error = _share_of_signs(s)
    return share * (s.differ >= SPARSE * np.maximum(s.count, 1.0)), error


def _share_of_signs(s: Sums) -> tuple[Array, Array]:
    differ = np.maximum(s.differ, 1.0)
    sign = np.where(np.abs(s.sign) > np.abs(s.raw_sign), s.sign, s.raw_sign)
    beyond = np.sign(sign) * np.maximum(np.abs(sign) - s.explained, 0.0)
    return beyond / differ, np.sqrt(np.maximum(s.differ_copies, 1.0)) / differ


def spread(s: Sums, least: float) -> dict[str, Array]:
    """Returns what the scale and the offset of many calls together may be where each call leans by
    as much as it does, but to a side of its own: the root of the sum of the squares of the calls'
    leans. What single errors without direction add to it is taken out."""
    n, yy = np.maximum(s.count, 1.0), measured_against(s.count, s.yy, least)
    return {
        "scale": np.sqrt(np.maximum(s.dy_calls - s.dy2, 0.0)) / yy,
        "offset": np.sqrt(np.maximum(s.d_calls - s.d2_copies, 0.0)) / np.sqrt(n * yy),
    }


def critical_z(false_alarm_rate: float, num_tests: int) -> float:
    """Returns the z that any of `num_tests` honest tests exceeds with probability at most
    `false_alarm_rate`. For a self-normalised sum of independent errors with symmetric signs,
    P(|z| > x) <= 2 exp(-x^2 / 2) for every number of terms (Hoeffding 1963 applied to the signs);
    the rate is divided by the number of tests (Bonferroni)."""
    return math.sqrt(2 * math.log(2 * max(num_tests, 1) / false_alarm_rate))


def lower_bound(
    effect: Array, error: Array, deviations: float | Array, share: bool | NDArray[np.bool_] = False
) -> Array:
    """Returns |effect| minus so many standard errors. Where it is a `share` of signs, which
    1 / error^2 signs show: the smallest share that shows as much with probability
    exp(-deviations^2 / 2) or more (Chernoff 1952); at least 0."""
    bound: Array = np.abs(effect) - deviations * error
    of_signs = np.broadcast_to(share, bound.shape)
    if of_signs.any():
        deviations = np.broadcast_to(deviations, bound.shape)
        bound[of_signs] = _least_share(effect[of_signs], error[of_signs], deviations[of_signs])
    return bound


def _least_share(effect: Array, error: Array, deviations: Array) -> Array:
    size, budget = np.minimum(np.abs(effect), 1.0), deviations**2 / 2 * error**2
    bound = np.zeros_like(size)
    at = np.flatnonzero(divergence(size, 0.0) > budget)
    if not at.size:
        return bound
    low, high, size, budget = np.zeros(at.size), size[at], size[at], budget[at]
    for _ in range(30):
        middle = (low + high) / 2
        far = divergence(size, middle) > budget
        low, high = np.where(far, middle, low), np.where(far, high, middle)
    bound[at] = low
    return bound


def divergence(size: Array, share: float | Array) -> Array:
    """Returns the relative entropy of signs with a share of `size` to signs with `share`: n of the
    latter show the former with probability exp(-n divergence) at most."""
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 log 0 is 0
        halves = [
            (1 + s * size) / 2 * np.log((1 + s * size) / (1 + s * share)) for s in (1.0, -1.0)
        ]
    return np.nan_to_num(halves[0]) + np.nan_to_num(halves[1])


def excess(
    effect: Array,
    error: Array,
    limit: float | Array,
    z: float,
    caution: float = 4.0,
    share: bool | NDArray[np.bool_] = False,
) -> Array:
    """Returns how far outside each effect is: above 1 where it is significant (|effect| / error >
    z) and its lower bound exceeds the benign limit. It is the smaller of the two ratios; infinite
    where one is NaN. `caution` is the number of standard errors of the lower bound. Where it is a
    `share` of signs, both are Chernoff's."""
    with np.errstate(over="ignore", invalid="ignore"):  # 1e30 stands for results that are NaN
        outside = lower_bound(effect, error, caution, share) / limit
        size = np.array(effect)
        at = np.broadcast_to(share, size.shape)
        size[at] = np.sqrt(2 * divergence(np.minimum(np.abs(size[at]), 1.0), 0.0))
        significant = np.abs(size) / np.maximum(error, 1e-300) / z
        ratio = np.where(error > 0, np.minimum(outside, significant), outside)
        return np.where(np.isnan(ratio) | np.isnan(effect), np.inf, ratio)


def ratios_of(projections: Sequence[str], values: Array, z: float) -> Array:
    """Returns `excess` of tests: their projections, which begin with their statistics, and their
    effects, standard errors and limits [T, 3]."""
    share = np.array([p.startswith(SHARES) for p in projections], dtype=bool)
    effect, error, limit = values.T
    return excess(effect, error, limit, z, share=share)
