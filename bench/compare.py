"""Compares two files of bench rows and says, in view of the noise, which rows became slower.

The statistic is the median over rounds of B / A: of a row's seconds, or of its seconds over its
peer's in the same rounds. Its interval is a bootstrap over runs (where a file holds several) and
over blocks of neighbouring rounds, because slow spells make neighbours alike. The rows share the
level, so that a comparison without any change gives a false alarm once in 20 times."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_core.errors import GlmCoreError
from glm_core.measure.rows import MACHINE_FACTS, Row

MEASURES = ("auto", "time", "ratio")
FALSE_ALARMS = 0.05
"""probability of a false alarm in a whole comparison"""
LEAST = 0.05
"""relative change below which nothing is reported, however certain: the default of --least"""
RESAMPLES = 2000
MIN_ROUNDS = 5
Samples = list[NDArray[np.float64]]
"""by run: the measure's value in each round"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """The change of one row that both files have: `ratio` > 1 means slower in B."""

    key: str
    a: float
    b: float
    """medians: seconds, or seconds over the peer's"""
    ratio: float
    low: float
    high: float
    verdict: str
    """regression, improvement or within noise"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The changes of all rows that both files have."""

    measure: str
    """time or ratio"""
    changes: list[Change]
    unmatched: list[str]
    """keys of rows that one file lacks"""
    notes: list[str]

    @property
    def regressions(self) -> list[Change]:
        return [c for c in self.changes if c.verdict == "regression"]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"regressions": len(self.regressions)}


def compare(
    a: Sequence[Row], b: Sequence[Row], measure: str = "auto", least: float = LEAST
) -> Comparison:
    """Compares the rows of two files. `auto` compares ratios where every shared row has a peer,
    else times. Raises GlmCoreError where no row is shared, or where times of different machines
    would be compared."""
    if not 0 <= least < 1:
        raise GlmCoreError(f"--least={least:g} must be at least 0 and below 1")
    keys = [k for k in dict.fromkeys(r.key for r in a) if any(r.key == k for r in b)]
    if not keys:
        raise GlmCoreError("bench compare: the files share no row; run the same bench twice")
    different = differences(a, b)
    shared = [r for r in (*a, *b) if r.key in keys]
    chosen = _measure(measure, shared, different)
    level = FALSE_ALARMS / len(keys)
    changes = [
        _change(k, _samples(a, k, chosen), _samples(b, k, chosen), level, least) for k in keys
    ]
    every = dict.fromkeys(r.key for r in (*a, *b))
    notes = [f"different machines: {fact}" for fact in different]
    if all(sum(r.key == k for r in rows) == 1 for rows in (a, b) for k in keys):
        notes.append("one run each: differences between two runs of the same code are not seen")
    return Comparison(
        measure=chosen, changes=changes, unmatched=[k for k in every if k not in keys], notes=notes
    )


def differences(a: Sequence[Row], b: Sequence[Row]) -> list[str]:
    """Returns the facts in which the machines differ; empty where it is one machine."""

    def values(rows: Sequence[Row], fact: str) -> str:
        return " and ".join(dict.fromkeys(str(r.machine.get(fact, "unknown")) for r in rows))

    pairs = [(fact, values(a, fact), values(b, fact)) for fact in MACHINE_FACTS]
    return [f"{fact} {x}, {y}" for fact, x, y in pairs if x != y or " and " in x]


def _measure(requested: str, rows: Sequence[Row], different: list[str]) -> str:
    lacking = [r.key for r in rows if not r.peer_seconds]
    peers = {r.key: {o.peer for o in rows if o.key == r.key} for r in rows}
    mixed = [f"{k} ({' and '.join(sorted(p))})" for k, p in peers.items() if len(p) > 1]
    can_ratio = not lacking and not mixed
    if requested == "time" and different:
        raise GlmCoreError(
            f"bench compare: absolute times of different machines ({'; '.join(different)}) say "
            "nothing; compare ratios: --by ratio"
        )
    if (requested == "ratio" or different) and not can_ratio:
        fact = f"no peer in {lacking[0]}" if lacking else f"different peers in {mixed[0]}"
        raise GlmCoreError(
            f"bench compare: {fact}, so there are no ratios to compare; measure "
            "both files again with the same peer"
        )
    return "ratio" if requested == "ratio" or (requested == "auto" and can_ratio) else "time"


def _samples(rows: Sequence[Row], key: str, measure: str) -> Samples:
    runs = [r for r in rows if r.key == key]
    if few := [r for r in runs if len(r.seconds) < MIN_ROUNDS]:
        raise GlmCoreError(
            f"bench compare: {key} has {len(few[0].seconds)} rounds, too few to know the noise; "
            f"measure with --rounds {MIN_ROUNDS} or more"
        )
    own = [np.array(r.seconds) for r in runs]
    if measure == "time":
        return own
    return [s / np.array(r.peer_seconds) for s, r in zip(own, runs, strict=True)]


def _change(key: str, a: Samples, b: Samples, level: float, least: float) -> Change:
    middle = [float(np.median([np.median(run) for run in runs])) for runs in (a, b)]
    rng = np.random.default_rng(0)
    drawn = np.log(_medians(b, rng)) - np.log(_medians(a, rng))
    low, high = (float(v) for v in np.exp(np.quantile(drawn, (level / 2, 1 - level / 2))))
    ratio = middle[1] / middle[0]
    if low > 1 and ratio >= 1 + least:
        verdict = "regression"
    elif high < 1 and ratio <= 1 / (1 + least):
        verdict = "improvement"
    else:
        verdict = "within noise"
    return Change(
        key=key, a=middle[0], b=middle[1], ratio=ratio, low=low, high=high, verdict=verdict
    )


def _medians(runs: Samples, rng: np.random.Generator) -> NDArray[np.float64]:
    """Resamples the median over runs of the medians over rounds. Runs are drawn with replacement,
    rounds in circular blocks of half the square root of their number (Politis & Romano 1992)."""
    each = np.stack([np.median(_blocks(run, rng), axis=1) for run in runs])  # [runs, RESAMPLES]
    picked = rng.integers(len(runs), size=each.shape)
    return np.median(np.take_along_axis(each, picked, axis=0), axis=0)


def _blocks(values: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Draws the rounds of a run in blocks;  [rounds] -> [RESAMPLES, rounds]."""
    n = len(values)
    size = max(1, round(n**0.5 / 2))
    starts = rng.integers(n, size=(RESAMPLES, -(-n // size), 1))
    rounds = (starts + np.arange(size)).reshape(RESAMPLES, -1)[:, :n]  # [RESAMPLES, rounds]
    return values[rounds % n]
