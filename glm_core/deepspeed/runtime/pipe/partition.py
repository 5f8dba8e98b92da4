"""Where a list of layers is cut into stages."""

from __future__ import annotations

import math
from collections.abc import Sequence


def uniform(count: int, parts: int) -> list[int]:
    """Boundaries of `parts` runs of equal length, the first ones longer by what is left over; with
    fewer items than parts the last parts are empty."""
    if count <= parts:
        return [min(p, count) for p in range(parts + 1)]
    each, left = divmod(count, parts)
    return [each * p + min(p, left) for p in range(parts + 1)]


def balanced(weights: Sequence[int], parts: int) -> list[int]:
    """Boundaries with the least difference between the heaviest and the lightest part, found as
    DeepSpeed 0.19.8 does (runtime/utils.py, partition_balanced): part by part, each prefix by its
    best predecessor, of equally good cuts the last one."""
    if len(weights) <= parts:
        return uniform(len(weights), parts)
    total = [0]
    for weight in weights:
        total.append(total[-1] + weight)
    # heaviest and lightest part of the best cut of each prefix, and where its last part begins
    best = {0: (0.0, math.inf)}
    cuts: list[dict[int, int]] = []
    for _ in range(parts):
        found: dict[int, tuple[float, float]] = {}
        cut: dict[int, int] = {}
        for end in range(1, len(total)):
            tried = [
                (max(high, total[end] - total[k]), min(low, total[end] - total[k]), k)
                for k, (high, low) in best.items()
                if k < end
            ]
            if tried:
                high, low, cut[end] = min(tried, key=lambda t: (t[0] - t[1], -t[2]))
                found[end] = (high, low)
        best = found
        cuts.append(cut)
    bounds = [len(weights)]
    for cut in reversed(cuts):
        bounds.append(cut[bounds[-1]])
    return bounds[::-1]
