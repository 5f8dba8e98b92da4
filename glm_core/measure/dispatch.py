"""Measures what dispatch adds to the call of an op."""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Sequence

import torch
from torch import Tensor

from glm_core import ops
from glm_core.backends.base import Backend
from glm_core.backends.registry import use
from glm_core.spec import SUPPORTED, Support

CALLS = 20_000
LIMIT_US = 5.0
"""microseconds a call that dispatch may add"""


def samples(rounds: int) -> tuple[list[float], list[float]]:
    """Times a kernel that does nothing, with a predicate: returns the seconds of a call in each
    round, through the op and of the bare kernel, measured in turn."""
    backend = Backend(name="bench", device_type="cpu", verified="does nothing, by design")

    def supports(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Support:
        return SUPPORTED

    @backend.implements(ops.rms_norm, supports)
    def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
        return x

    x = torch.zeros(1)
    through, bare = [], []
    with use(backend):
        for _ in range(rounds):
            through.append(timeit.timeit(lambda: ops.rms_norm(x, x, 1e-5), number=CALLS) / CALLS)
            bare.append(timeit.timeit(lambda: rms_norm(x, x, 1e-5), number=CALLS) / CALLS)
    return through, bare


def overhead(through: Sequence[float], bare: Sequence[float]) -> dict[str, float]:
    """Returns the microseconds that dispatch adds to one call: median and quartiles of the
    rounds."""
    added = [(a - b) * 1e6 for a, b in zip(through, bare, strict=True)]
    low, middle, high = statistics.quantiles(added, n=4) if len(added) > 1 else added * 3
    return {"overhead_us": middle, "low_us": low, "high_us": high, "limit_us": LIMIT_US}
