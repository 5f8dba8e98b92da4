"""How wrong may a kernel be? As wrong as the reference in the same dtype, times a small factor.

Nothing here is tuned to an op. For every result y the float64 reference gives the exact value, and
the reference run in the kernel's own dtype gives errors that honest rounding makes. They are taken
from several runs: as it is, and with every float32 intermediate moved by at most one unit in the
last place (Monte Carlo arithmetic: Parker 1997), so that a result which happens to come out right
once does not set a standard. The kernel's error at each element is divided by

    the reference's worst error among the results of nearest magnitude   (NEIGHBOURS of them)
    + one rounding of the result: eps / 2 * |y|                          (eps of the result's dtype)
    + the smallest normal float32 number, below which a device may flush to zero.

The largest such quotient is the case's `error_ratio`; MAX_ERROR_RATIO is the limit. Sorting by
magnitude makes the rule elementwise where results differ hugely in size and pools elements where
they do not. The root mean square of the error is held to the same factor over the whole tensor,
against the reference's, or the rounding's eps / sqrt(12), whichever is larger: it sees a loss of
precision that is spread thin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_ERROR_RATIO = 2.0

NEIGHBOURS = 33
"""results of nearest magnitude whose reference errors are pooled; odd"""


class Deviation(NamedTuple):
    """The worst of one tensor: its ratio and where it is, in words."""

    ratio: float
    where: str


def deviation(actual: Tensor, exact: Tensor, near: Sequence[Tensor]) -> Deviation:
    """How far `actual` (any float dtype) is from `exact` (float64) in units of what the reference
    runs `near` (actual's dtype) allow. Elements that overflow in `near` are not judged."""
    if not actual.is_floating_point():
        same = torch.equal(actual, near[0])
        return Deviation(0.0 if same else math.inf, "integers differ from the reference's")
    if not actual.numel():
        return Deviation(0.0, "")
    y, got = exact.flatten(), actual.detach().double().flatten()
    honest = torch.stack([n.detach().double().flatten() - y for n in near]).abs()  # [runs, n]
    judged = honest.isfinite().all(0)
    y, got, honest = y[judged], got[judged], honest[:, judged]
    if not y.numel():
        return Deviation(0.0, "")
    error = (got - y).abs().nan_to_num(math.inf, math.inf)
    rounding = torch.finfo(actual.dtype).eps * y.abs()
    tiny = _flushed_below(actual.dtype)
    ratios = error / (_pooled(honest.amax(0), y) + rounding / 2 + tiny)
    worst = int(ratios.argmax())
    spread = _rms(error) / (max(_rms(honest.max(0).values), _rms(rounding) / 12**0.5) + tiny)
    place = f"{got[worst]:.6g} for {y[worst]:.6g} (error {error[worst]:.2e})"
    if spread > ratios[worst]:
        return Deviation(spread, f"root mean square error {_rms(error):.2e}; e.g. {place}")
    return Deviation(float(ratios[worst]), place)


def _pooled(errors: Tensor, y: Tensor) -> Tensor:
    """For each element the largest error among the NEIGHBOURS elements of nearest magnitude."""
    if errors.numel() <= NEIGHBOURS:
        return errors.max().expand_as(errors)
    order = y.abs().argsort()
    window = torch.nn.functional.max_pool1d(
        errors[order].view(1, 1, -1), NEIGHBOURS, stride=1, padding=NEIGHBOURS // 2
    )
    return torch.empty_like(errors).index_copy_(0, order, window.view(-1))


def _flushed_below(dtype: torch.dtype) -> float:
    """Absolute floor: float32's smallest normal number, or half a step of the dtype's
    subnormals."""
    info = torch.finfo(dtype)
    return max(torch.finfo(torch.float32).tiny, info.smallest_normal * info.eps / 2)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
