"""Decides how wrong a kernel may be: as wrong as the reference in the same dtype, times a small
factor.

Nothing here is tuned to an op. For every result y the float64 reference gives the exact value, and
the reference run in the kernel's own dtype gives the errors that honest rounding makes. These
errors are taken from several runs: the plain one, and runs with every float32 intermediate moved by
at most one unit in the last place (Monte Carlo arithmetic: Parker 1997), so that a result which
comes out right once by luck does not set the standard. The kernel's error at each element is
divided by

    the reference's worst error there
    + one rounding of the result: eps / 2 * the largest |y| in its row (last dimension)
    + what a device may flush to zero: the smallest normal float32 number

and the largest quotient is the case's `error_ratio`; MAX_ERROR_RATIO is the limit. The scale of the
row stands for the scale of the terms that cancel in an element.

"There" depends on the dtype. In float32 and wider it means: among the results of similar magnitude
(results are sorted into eighths by magnitude; an element's own eighth and its two neighbours
count), so that small results next to huge ones are held to their own size. Below float32 a kernel
may round intermediates to the working dtype, as flash attention rounds its probabilities. That puts
errors of the tensor's scale into results that cancel, even to zero, so "there" means anywhere in
the tensor.

Two means over the tensor are held to the same factor. The root mean square finds a loss of
precision that is spread thin. The mean of the error along the result finds results that are
truncated. Its unit is an eighth of a rounding step, or the reference's own mean if that is larger:
rounding to nearest has no direction, not even twice, and truncation loses 0.36 of a step, a ratio
of 2.2 to 2.6."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_ERROR_RATIO = 2.0

OCTILES = 8
"""results are sorted by magnitude into this many shares"""

RANKED = 1 << 18
"""about so many results are sorted to find the shares"""
POOL = 32
"""a share needs at least so many results; fewer make no statistic"""


class Deviation(NamedTuple):
    """The largest error ratio in one tensor, and where it is, in words."""

    ratio: float
    where: str


class Allowance(NamedTuple):
    """What the reference's runs allow one result to be, computed once for every kernel that is
    compared with it. The fields but `plain` cover the judged elements only: those that overflow in
    no run."""

    plain: Tensor
    """the reference's plain run, which says shape and dtype; the values where they are integers"""
    judged: Tensor | None
    """which elements are judged; None: all"""
    exact: Tensor
    """float64"""
    error: Tensor
    """the largest error that counts as one"""
    rms: float
    """the root mean square error that counts as one"""
    mean: float
    """the mean error along the result that counts as one"""


def allowance(exact: Tensor, near: Sequence[Tensor]) -> Allowance:
    """Returns what the reference's runs `near` (in the kernel's dtype, the plain run first) allow a
    result whose exact value is `exact` (float64)."""
    plain = near[0].detach()
    if not plain.is_floating_point():
        empty = torch.empty(0, dtype=torch.float64)
        return Allowance(plain, None, empty, empty, 0.0, 0.0)
    exact = exact.detach()
    errors = torch.stack([n.detach().double() - exact for n in near])  # [runs, ...]
    finite = errors.isfinite().all(0)
    judged = None if finite.all() else finite
    eps = torch.finfo(plain.dtype).eps
    scale = exact.abs().amax(-1, keepdim=True) if exact.dim() and exact.numel() else exact.abs()
    scale = _judged(scale.expand_as(exact), judged)
    y = _judged(exact, judged)
    errors = (
        errors.reshape(len(errors), -1) if judged is None else errors[:, judged]
    )  # [runs, elements]
    honest = errors.abs().amax(0)
    flushed = _flushed_below(plain.dtype)
    rms = mean = math.inf
    if len(y) >= POOL:
        # uniform rounding has a standard deviation of eps / sqrt(12)
        rms = max(_rms(honest), eps / 12**0.5 * _rms(scale)) + flushed
    if len(y) >= OCTILES * POOL:
        # an error in a row's statistic moves all its elements alike, in the reference's runs too
        own = float((errors * y.sign()).mean(-1).abs().max())
        mean = max(own, float((eps * y.abs() + honest).mean()) / 8) + flushed
    allowed = _nearby(honest, y, eps) + eps / 2 * scale + flushed if len(y) else y
    return Allowance(plain, judged, y, allowed, rms, mean)


def deviation(actual: Tensor, allowed: Allowance) -> Deviation:
    """Returns how far `actual` (any dtype) is from the exact result, in units of what is allowed.
    Elements that overflow in the reference are not judged."""
    if not actual.is_floating_point():
        same = torch.equal(actual, allowed.plain)
        return Deviation(0.0 if same else math.inf, "integers differ from the reference's")
    y = allowed.exact
    if not len(y):
        return Deviation(0.0, "")
    got = _judged(actual.detach(), allowed.judged).double()
    signed = got - y
    error = signed.abs().nan_to_num(math.inf, math.inf)
    ratios = error / allowed.error
    worst = int(ratios.argmax())
    place = f"{got[worst]:.6g} for {y[worst]:.6g} (error {error[worst]:.2e})"
    deviations = [Deviation(float(ratios[worst]), place)]
    if math.isfinite(allowed.rms):
        rms = _rms(error)
        where = f"root mean square error {rms:.2e}; e.g. {place}"
        deviations.append(Deviation(rms / allowed.rms, where))
    if math.isfinite(allowed.mean):
        mean = float(signed.mul_(y.sign()).mean().abs())
        where = f"errors have a direction, {mean:.2e} on average"
        deviations.append(Deviation(mean / allowed.mean, where))
    return max(deviations)


def _judged(x: Tensor, judged: Tensor | None) -> Tensor:
    return x.flatten() if judged is None else x[judged]


def _nearby(errors: Tensor, y: Tensor, eps: float) -> Tensor:
    """Returns for each element the largest error among elements of similar magnitude, below float32
    among all."""
    if eps > torch.finfo(torch.float32).eps or len(y) < OCTILES * POOL:
        return errors.max().expand_as(errors)
    size = y.abs()
    ranked = size[:: 1 + len(size) // RANKED].sort().values
    octile = torch.bucketize(size, ranked[len(ranked) * torch.arange(1, OCTILES) // OCTILES])
    worst = errors.new_zeros(OCTILES).scatter_reduce(0, octile, errors, "amax")
    padded = torch.nn.functional.pad(worst, (1, 1))
    return padded.unfold(0, 3, 1).amax(1)[octile]


def _flushed_below(dtype: torch.dtype) -> float:
    """Returns the size below which a device may flush to zero: float32's smallest normal number, or
    half a step of the dtype's subnormals if that is larger."""
    info = torch.finfo(dtype)
    return max(torch.finfo(torch.float32).tiny, info.smallest_normal * info.eps / 2)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
