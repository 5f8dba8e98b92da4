"""Compares how often gradients overflowed in two float16 runs, and where that led their loss
scales. Needs numpy only.

An overflow is no fault: dynamic loss scaling provokes it, skips the update and lowers the scale. An
honest run overflows at the same step or, where the largest gradient is near float16's largest
number, a step or a doubling away. A device that saturates never overflows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from glm_core.align.trace import Trace

Array = NDArray[np.float64]
DOUBLINGS, SKIPS = 1.0, 2.0
"""an honest run may be so many doublings of the scale, and so many skipped steps, further from the
reference than the furthest control"""


def overflow_check(reference: Trace, candidate: Trace) -> tuple[float, list[str]]:
    """Returns how far the candidate's overflows are from the reference's, as a share of what is
    allowed, and the reason where it is above 1. It is 0 where one trace does not hold them."""
    steps = reference.loss_scale.size
    if not steps or candidate.loss_scale.size != steps:
        return 0.0, []
    own = np.array(_distance(reference, candidate.loss_scale, candidate.skipped))
    pairs = zip(reference.control_loss_scale, reference.control_skipped, strict=True)
    controls = [_distance(reference, scale, skipped) for scale, skipped in pairs]
    furthest = np.max([(0.0, 0.0), *controls], 0)
    ratio = float(np.max(own / (furthest + np.array((DOUBLINGS, SKIPS)))))
    if ratio <= 1:
        return ratio, []
    last = np.flatnonzero(np.isfinite(candidate.loss_scale))[-1]
    return ratio, [
        f"gradients overflowed at {np.nansum(candidate.skipped):.0f} steps, in the reference at "
        f"{np.nansum(reference.skipped):.0f}; at step {last + 1} the loss scale is "
        f"{candidate.loss_scale[last]:g}, in the reference {reference.loss_scale[last]:g}"
    ]


def _distance(reference: Trace, scale: Array, skipped: Array) -> tuple[float, float]:
    """Returns the largest distance of the loss scale, in doublings, and the difference between the
    numbers of skipped steps, up to where either run broke off."""
    both = np.isfinite(scale) & np.isfinite(reference.loss_scale)
    both &= (scale > 0) & (reference.loss_scale > 0)
    if not both.any():
        return 0.0, 0.0
    doublings = np.abs(np.log2(scale[both] / reference.loss_scale[both])).max()
    return float(doublings), float(abs((skipped - reference.skipped)[both].sum()))
