"""Computes how far honest rounding drives a curve or a gradient, and from it the bound that a
candidate must keep. Needs numpy only; derived in docs/alignment.md."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from glm_core.align import MIN_CONTROLS, NUM_CONTROLS
from glm_core.align.statistics import EPS
from glm_core.errors import TraceError

Array = NDArray[np.float64]

WINDOW = 5
"""a step shares its scale with so many steps on either side"""
LEAST_SPREAD = 0.15
"""the standard deviation of log T is taken as at least this: a few controls may agree by luck"""


@dataclasses.dataclass(frozen=True, slots=True)
class Envelope:
    """A candidate's deviation from the reference's curve, and its bound."""

    deviation: Array
    """[N]: candidate minus reference"""
    bound: Array
    """[N]: an honest candidate's |deviation| is below it at all steps at once"""

    @property
    def ratio(self) -> Array:
        """Returns |deviation| / bound [N]: above 1 is outside; infinite where the candidate is not
        finite."""
        return np.nan_to_num(np.abs(self.deviation) / self.bound, nan=np.inf, posinf=np.inf)

    @property
    def first_step(self) -> int | None:
        """Returns the first step outside, from 1; None where there is none."""
        outside = np.flatnonzero(self.ratio > 1)
        return int(outside[0]) + 1 if outside.size else None


def student_t(probability: float, freedom: int) -> float:
    """Returns the quantile of Student's t for probability > 1/2, by integrating its density in
    u = atan(t / sqrt(freedom)), where it is cos(u)^(freedom - 1)."""
    u = np.linspace(0, math.pi / 2, 20001)
    f = np.cos(u) ** (freedom - 1)
    area = np.concatenate(([0.0], np.cumsum((f[1:] + f[:-1]) / 2)))
    return math.sqrt(freedom) * math.tan(np.interp(2 * probability - 1, area / area[-1], u))


def prediction_bound(statistics: Array, rate: float) -> float:
    """Returns the value that one more draw exceeds with probability `rate`, given K draws whose
    logarithms are normal with unknown mean and spread: Student's t with K - 1 degrees of freedom.
    Draws are multiples of a scale. Those below 1 count as 1, so that controls which happen to agree
    do not make the bound too tight."""
    logs = np.log(np.maximum(statistics, 1.0))
    k = logs.size
    spread = max(float(logs.std(ddof=1)), LEAST_SPREAD)
    above_mean = student_t(1 - rate, k - 1) * spread * math.sqrt(1 + 1 / k)
    return math.exp(min(float(logs.mean()) + above_mean, 700.0))  # exp overflows beyond


def scale(deviations: Array, reference: Array) -> Array:
    """Returns the root mean square of the controls' deviations [K, N] within WINDOW steps, [N]; at
    least the rounding of the loss itself (4 eps of float32)."""
    n = reference.size
    square = (deviations**2).mean(0)
    sums = np.concatenate(([0.0], np.cumsum(square)))
    low, high = np.maximum(np.arange(n) - WINDOW, 0), np.minimum(np.arange(n) + WINDOW + 1, n)
    smooth = np.sqrt(np.maximum(sums[high] - sums[low], 0.0) / (high - low))
    return np.maximum(smooth, 4 * EPS * np.abs(reference))


def peaks(deviations: Array, reference: Array) -> Array:
    """Returns each control's largest deviation over all steps, in units of the other controls'
    scale, [K]."""
    others = [np.delete(deviations, k, 0) for k in range(len(deviations))]
    return np.array(
        [
            (np.abs(d) / scale(rest, reference)).max()
            for d, rest in zip(deviations, others, strict=True)
        ]
    )


def envelope(reference: Array, controls: Array, candidate: Array, rate: float) -> Envelope:
    """Returns the deviation of a candidate's loss curve [N] from the reference's and its bound,
    given K control curves [K, N]. Raises TraceError for too few controls or a curve of the
    reference that is not finite."""
    if len(controls) < MIN_CONTROLS:
        raise TraceError(
            f"reference trace: {len(controls)} control runs, the envelope needs at least "
            f"{MIN_CONTROLS}; record the reference with controls={NUM_CONTROLS}"
        )
    _require_finite(reference, controls)
    deviations = controls - reference
    factor = prediction_bound(peaks(deviations, reference), rate)
    return Envelope(candidate - reference, factor * scale(deviations, reference))


def same_bits(reference: Array, candidate: Array) -> Envelope:
    """Returns the deviation of a curve [N] from one whose bits it must have: any at all is outside.
    Raises TraceError for a curve of the reference that is not finite."""
    _require_finite(reference)
    return Envelope(candidate - reference, np.full_like(reference, np.finfo(np.float64).tiny))


def _require_finite(*curves: Array) -> None:
    if not all(np.isfinite(curve).all() for curve in curves):
        raise TraceError("reference trace: its loss is not finite; record with a smaller train.lr")


def error_bound(benign: Array, floor: float, rate: float, numbers: bool = False) -> Array:
    """Returns the bound on errors [...], given the errors of J honest runs [J, ...]: the root mean
    square of the honest errors (at least `floor`) times a factor that all errors keep at once. For
    errors of single `numbers`, not of norms, it is at least that of a normal error: Student's t
    with J degrees of freedom."""

    def spread(rows: Array) -> Array:
        return np.maximum(np.sqrt((rows**2).mean(0)), floor)

    others = [np.delete(benign, j, 0) for j in range(len(benign))]
    tops = [float((b / spread(r)).max()) for b, r in zip(benign, others, strict=True)]
    factor = prediction_bound(np.array(tops), rate)
    if numbers:
        factor = max(factor, student_t(1 - rate / 2 / max(benign[0].size, 1), len(benign)))
    return spread(benign) * factor
