"""What disturbed a measurement: other processes, other machines, throttling, outliers, drift."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

STEAL, OTHERS, DRIFT = 0.01, 0.05, 0.1
"""shares above which a note is written"""


class Counters(NamedTuple):
    """CPU time in clock ticks since boot, of all cores; `throttled` counts events."""

    total: int
    idle: int
    steal: int
    own: float
    throttled: int


def counters(
    stat: Path = Path("/proc/stat"), cpus: Path = Path("/sys/devices/system/cpu")
) -> Counters | None:
    """Now; None where the system does not tell."""
    try:
        ticks = [int(n) for n in stat.read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    throttled = cpus.glob("cpu*/thermal_throttle/core_throttle_count")
    times = os.times()
    own = (times.user + times.system) * os.sysconf("SC_CLK_TCK")
    return Counters(
        sum(ticks), ticks[3] + ticks[4], ticks[7], own, sum(int(p.read_text()) for p in throttled)
    )


class NoiseWatch:
    """Counts from its creation on; `notes` says what else the machine did since."""

    def __init__(self) -> None:
        self.begin = counters()

    def notes(self) -> list[str]:
        """In words; empty where the machine was quiet."""
        end = counters()
        if self.begin is None or end is None:
            return ["this system does not tell what other processes did"]
        return disturbances(self.begin, end)


def disturbances(begin: Counters, end: Counters) -> list[str]:
    """Shares of the machine's CPU time that went elsewhere, and throttling."""
    total = max(1, end.total - begin.total)
    busy = total - (end.idle - begin.idle)
    steal = (end.steal - begin.steal) / total
    others = (busy - (end.own - begin.own)) / total - steal
    throttled = end.throttled - begin.throttled
    found = {
        f"other processes took {others:.0%} of the CPU time": others > OTHERS,
        f"the host gave {steal:.0%} of the CPU time to other machines": steal > STEAL,
        f"the CPU throttled {throttled} times": throttled > 0,
    }
    return [note for note, true in found.items() if true]


def irregularities(seconds: Sequence[float]) -> list[str]:
    """Outliers (beyond three interquartile ranges) and drift (last third against the first)."""
    if len(seconds) < 6:
        return []
    low, middle, high = statistics.quantiles(seconds, n=4)
    fence = max(high + 3 * (high - low), 1.1 * middle)
    slow = sum(s > fence for s in seconds)
    third = len(seconds) // 3
    drift = statistics.median(seconds[-third:]) / statistics.median(seconds[:third]) - 1
    found = {
        f"{slow} of {len(seconds)} rounds above {fence / middle:.1f} times the median": slow > 0,
        f"{drift:+.0%} from the first to the last third of the rounds: throttling or a neighbour": (
            drift > max(DRIFT, (high - low) / middle)
        ),
    }
    return [note for note, true in found.items() if true]
