"""Lists the honest ways to compute a captured call: what they show is what a kernel may do."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from glm_core import ops
from glm_core.align.capture import Call
from glm_core.align.disguise import Regrouped, Rounded
from glm_core.align.replay import LOW, Results, replay
from glm_core.faults.flash import flash_attention

MAX_ROUNDED = 24
"""at most so many intermediates of a call are rounded one by one"""

Runner = Callable[[Call], Results | None]
"""computes a call's results; None where this way of computing them changes nothing"""


def disguises(dtype: torch.dtype) -> dict[str, Runner]:
    """Returns the honest ways to compute a call, by name: the plain reference, two other orders of
    summation, attention as a flash kernel computes it, and below float32 the reference with its
    intermediates rounded, all at once and each in turn."""

    def regrouped(seed: int) -> Runner:
        return lambda call: replay(call, call.op.reference, Regrouped(seed))

    runners: dict[str, Runner] = {
        "plain": lambda call: replay(call, call.op.reference),
        "regrouped": regrouped(1),
        "regrouped again": regrouped(2),
        "flash": functools.partial(_flash, kernel=flash_attention(32, rounding=False)),
    }
    if dtype in LOW:
        rounded = flash_attention(32, rounding=True)
        runners["flash rounded"] = functools.partial(_flash, kernel=rounded)
        runners["rounded"] = lambda call: _rounded(call, dtype, None)
        fewer = set[Call]()
        for which in range(MAX_ROUNDED):
            runners[f"rounded {which}"] = functools.partial(
                _rounded, dtype=dtype, which=which, fewer=fewer
            )
    return runners


def _flash(call: Call, kernel: Callable[..., Tensor]) -> Results | None:
    """The backward that forms the probabilities again, and takes each row's sum from the rounded
    output: its errors are common to a row."""
    return replay(call, kernel) if call.op is ops.attention else None


def _rounded(
    call: Call, dtype: torch.dtype, which: int | None, fewer: set[Call] | None = None
) -> Results | None:
    """Rounds intermediate number `which` (None: all). `fewer` collects the calls that have no such
    intermediate: they have none with a larger number either, and are not run again."""
    if call.op.mutates or not call.op.differentiable or call.op.choice is not None:
        return None  # float32 by contract
    if fewer is not None and call in fewer:
        return None
    first = next(t for t in call.tensors() if t.is_floating_point())
    mode = Rounded(dtype, first.numel() // 2, which)
    results = replay(call, call.op.reference, mode)
    if mode.seen > (which or 0):
        return results
    if fewer is not None:
        fewer.add(call)
    return None
