"""Notes what disturbed a measurement: other processes, other machines, throttling, outliers,
drift."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

STEAL, OTHERS, DRIFT = 0.01, 0.05, 0.1
"""shares above which a note is written: of CPU time for others, of the time for drift"""


class Counters(NamedTuple):
    """CPU time of all cores since boot, in clock ticks; `own` is this process's, `throttled` counts
    events."""

    total: int
    idle: int
    steal: int
    own: float
    throttled: int


def counters(
    stat: Path = Path("/proc/stat"), cpus: Path = Path("/sys/devices/system/cpu")
) -> Counters | None:
    """Reads the counters; None where the system has none."""
    try:
        ticks = [int(n) for n in stat.read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    throttled = cpus.glob("cpu*/thermal_throttle/core_throttle_count")
    times = os.times()
    own = (times.user + times.system) * os.sysconf("SC_CLK_TCK")
    return Counters(
        sum(ticks),
        ticks[3] + ticks[4],
        ticks[7],
        own,
        sum(int(p.read_text(encoding="utf-8")) for p in throttled),
    )


class NoiseWatch:
    """Watches what else the machine does from its creation on."""

    def __init__(self) -> None:
        self.begin = counters()

    def notes(self) -> list[str]:
        """Returns a sentence for each disturbance; empty where the machine was quiet."""
        end = counters()
        if self.begin is None or end is None:
            return ["this system has no record of what other processes did"]
        return disturbances(self.begin, end)


def disturbances(begin: Counters, end: Counters) -> list[str]:
    """Returns notes on CPU time that went to others and on throttling."""
    total = max(1, end.total - begin.total)
    busy = total - (end.idle - begin.idle)
    steal = (end.steal - begin.steal) / total
    others = (busy - (end.own - begin.own)) / total - steal
    throttled = end.throttled - begin.throttled
    notes = {
        f"other processes took {others:.0%} of the CPU time": others > OTHERS,
        f"the host gave {steal:.0%} of the CPU time to other machines": steal > STEAL,
        f"the CPU throttled {throttled} times": throttled > 0,
    }
    return [note for note, holds in notes.items() if holds]


def irregularities(seconds: Sequence[float]) -> list[str]:
    """Returns notes on outliers (beyond three interquartile ranges) and on drift (last third of the
    rounds against the first)."""
    if len(seconds) < 6:
        return []
    low, middle, high = statistics.quantiles(seconds, n=4)
    fence = max(high + 3 * (high - low), 1.1 * middle)
    slow = sum(s > fence for s in seconds)
    third = len(seconds) // 3
    drift = statistics.median(seconds[-third:]) / statistics.median(seconds[:third]) - 1
    notes = {
        f"{slow} of {len(seconds)} rounds above {fence / middle:.1f} times the median": slow > 0,
        f"{drift:+.0%} from the first to the last third of the rounds: throttling or a neighbour": (
            drift > max(DRIFT, (high - low) / middle)
        ),
    }
    return [note for note, holds in notes.items() if holds]
