"""Does an error have a direction? Sums over groups of elements, effect sizes, and the bounds that
turn them into a verdict. Pure numpy; derived and checked in docs/alignment.md.

The error of a result X is D = X - Y, Y the correctly rounded float64 result. Rounding gives D no
direction, so sums of D over any group of elements chosen without looking at D stay within a few
standard errors of zero, and their size within what honest kernels show."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

NUM_BINS = 32
EPS = float(np.finfo(np.float32).eps)
KINDS = ("scale", "offset", "sign", "size", "peak")
"""what is measured in a group: sum(D Y) / sum(Y^2); mean(D) / rms(Y); (ups - downs) / (ups + downs)
of the errors away from zero; rms(D) / rms(Y); max|D| / max|Y|"""


@dataclasses.dataclass(frozen=True, slots=True)
class Grouping:
    """A partition of a result's elements. Either `bins` says for each element its group, or the
    elements, in memory order, lie as [outer, groups, inner]."""

    name: str
    groups: int
    inner: int = 1
    bins: NDArray[np.uint8] | None = None

    def of(self, index: NDArray[np.intp]) -> NDArray[np.intp]:
        """The groups of elements with these flat indices."""
        if self.bins is not None:
            return self.bins[index].astype(np.intp)
        return (index // self.inner) % self.groups


def quantile_bins(key: Array, groups: int = NUM_BINS) -> NDArray[np.uint8]:
    """The quantile bin of each element of a flat key; edges from at most 65536 evenly spaced
    elements."""
    sample = key[:: max(1, key.size // 65536)]
    edges = np.quantile(sample, np.linspace(0, 1, groups + 1)[1:-1])
    return np.searchsorted(edges, key, side="right").astype(np.uint8)


def structure(shape: Sequence[int]) -> list[Grouping]:
    """all, channel (last dimension), row (all but the last), and for [B, L, ...] position, for
    [B, L, H, E] head."""
    size = math.prod(shape)
    found = [Grouping("all", 1, size or 1)]
    if len(shape) >= 1 and shape[-1] > 1:
        found.append(Grouping("channel", shape[-1]))
    if len(shape) >= 2:
        found.append(Grouping("row", size // shape[-1], shape[-1]))
    if len(shape) >= 3:
        found.append(Grouping("position", shape[1], math.prod(shape[2:])))
    if len(shape) == 4:
        found.append(Grouping("head", shape[2], shape[3]))
    return found


@dataclasses.dataclass(slots=True)
class Sums:
    """Per group: everything the statistics need, additive over calls except the peaks."""

    count: Array
    yy: Array
    """sum Y^2"""
    peak_y: Array
    dy: Array
    """sum D Y"""
    dy2: Array
    """sum (D Y)^2"""
    d: Array
    d2: Array
    sign: Array
    """elements too large in magnitude minus elements too small"""
    raw_sign: Array
    """elements too high minus elements too low"""
    differ: Array
    peak_d: Array

    def __add__(self, other: Sums) -> Sums:
        pairs = ((f, getattr(self, f), getattr(other, f)) for f in self.__slots__)
        return Sums(**{f: np.maximum(a, b) if "peak" in f else a + b for f, a, b in pairs})


@dataclasses.dataclass(slots=True)
class Base:
    """The correct result and the groupings its errors are summed over."""

    y: Array
    groupings: list[Grouping]
    sums: list[tuple[Array, Array, Array]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        index = np.arange(self.y.size)
        for grouping in self.groupings:
            g = grouping.of(index)
            peak = np.zeros(grouping.groups)
            np.maximum.at(peak, g, np.abs(self.y))
            total = np.bincount(g, minlength=grouping.groups).astype(np.float64)
            self.sums.append((total, np.bincount(g, self.y**2, grouping.groups), peak))


def sums(base: Base, result: Array) -> list[Sums]:
    """The sums of D = result - Y for every grouping of the base. A value that is not finite counts
    as an error of 1e30."""
    d = np.nan_to_num(result - base.y, nan=1e30, posinf=1e30, neginf=-1e30)
    at = np.flatnonzero(d)
    d, y = d[at], base.y[at]
    up = np.sign(d)
    fields = (d * y, (d * y) ** 2, d, d * d, up * np.sign(y), up, np.ones_like(d))
    out = []
    for grouping, known in zip(base.groupings, base.sums, strict=True):
        g = grouping.of(at)
        totals = [np.bincount(g, f, grouping.groups) for f in fields]
        peak = np.zeros(grouping.groups)
        if grouping.groups == 1:
            peak[0] = np.abs(d).max(initial=0.0)
        out.append(Sums(*known, *totals, peak))
    return out


def scores(s: Sums, least: float = 1e-4) -> dict[str, tuple[Array, Array]]:
    """Per kind the effect and its standard error, per group. Groups whose root mean square is
    smaller than `least` times the tensor's are measured against that."""
    mean_square = s.yy.sum() / max(s.count.sum(), 1.0)
    yy = np.maximum(s.yy, least**2 * mean_square * s.count) + 1e-300
    n, rms = np.maximum(s.count, 1.0), np.sqrt(yy / np.maximum(s.count, 1.0))
    differ = np.maximum(s.differ, 1.0)
    scale, offset = s.dy / yy, s.d / (n * rms)
    # a direction counts only where it moves the result by more than float32 kernels may
    matters = np.maximum(np.abs(scale), np.abs(offset)) > FLOOR
    sign = np.where(np.abs(s.sign) > np.abs(s.raw_sign), s.sign, s.raw_sign) / differ
    zero = np.zeros_like(n)
    found = {
        "scale": (scale, np.sqrt(s.dy2) / yy),
        "offset": (offset, np.sqrt(s.d2) / (n * rms)),
        "sign": (sign * matters, 1 / np.sqrt(differ)),
        "size": (np.sqrt(s.d2 / n) / rms, zero),
    }
    if s.count.size == 1:
        found["peak"] = (s.peak_d / (s.peak_y + 1e-300), zero)
    return found


FLOOR = 8 * EPS
"""systematic relative error any kernel may have: polynomials for exp and erf, summation in float32"""


def critical_z(false_alarm_rate: float, num_tests: int) -> float:
    """z beyond which a self-normalised sum of independent errors with symmetric signs lies with
    probability below rate / tests: P(|z| > x) <= 2 exp(-x^2 / 2), exact for every number of terms
    (Hoeffding 1963 applied to the signs), Bonferroni over the tests."""
    return math.sqrt(2 * math.log(2 * max(num_tests, 1) / false_alarm_rate))


def worst(effects: Iterable[tuple[Array, Array]], z: float) -> float:
    """The largest lower confidence bound |effect| - z se over all groups."""
    return max((float(np.max(np.abs(e) - z * se, initial=0.0)) for e, se in effects), default=0.0)
