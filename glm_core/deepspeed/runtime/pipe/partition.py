"""Decides where a list of layers is cut into stages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence


def sums(weights: Sequence[int]) -> list[int]:
    """Returns the running sums."""
    return list(itertools.accumulate(weights))


def uniform(count: int, parts: int) -> list[int]:
    """Returns the boundaries of `parts` parts of equal length; the first ones are one longer where
    the count does not divide. With fewer items than parts the last parts are empty."""
    if count <= parts:
        return [min(p, count) for p in range(parts + 1)]
    each, left = divmod(count, parts)
    return [each * p + min(p, left) for p in range(parts + 1)]


def balanced(weights: Sequence[int], parts: int) -> list[int]:
    """Returns the boundaries with the least difference between the heaviest and the lightest part,
    found as in DeepSpeed 0.19.8 (runtime/utils.py, partition_balanced): part by part, each prefix
    extends its best predecessor, and of equally good cuts the last one is taken."""
    if len(weights) <= parts:
        return uniform(len(weights), parts)
    total = [0, *sums(weights)]
    # best: for each prefix the heaviest and lightest part of its best cut
    # cuts: where that cut's last part begins, by prefix, for each number of parts
    best = {0: (0.0, math.inf)}
    cuts: list[dict[int, int]] = []
    for _ in range(parts):
        extended: dict[int, tuple[float, float]] = {}
        cut: dict[int, int] = {}
        for end in range(1, len(total)):
            candidates = [
                (max(high, total[end] - total[k]), min(low, total[end] - total[k]), k)
                for k, (high, low) in best.items()
                if k < end
            ]
            if candidates:
                high, low, cut[end] = min(candidates, key=lambda t: (t[0] - t[1], -t[2]))
                extended[end] = (high, low)
        best = extended
        cuts.append(cut)
    bounds = [len(weights)]
    for cut in reversed(cuts):
        bounds.append(cut[bounds[-1]])
    return bounds[::-1]
