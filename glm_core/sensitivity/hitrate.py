"""Does `bisect` name what was planted? Every bug of the catalogue, its op and direction compared
with the ones named."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from glm_core.align.bisection import bisect, gather
from glm_core.align.calibration import captured_steps
from glm_core.align.rerun_command import ANY_CALL
from glm_core.errors import ConfigError, unknown
from glm_core.faults.variants import Bug
from glm_core.sensitivity import detection
from glm_core.sensitivity.catalogue import SETUPS, Drawn, config, draw, setup_of, variants
from glm_core.sensitivity.detection import Job

DIRECTION = {"both": "forward", "update": "optimizer"}
"""where a bug is planted -> what is to be named; a wrong formula is wrong in its forward first"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """One planted bug and what was named."""

    name: str
    planted: list[str]
    """ops with the bug"""
    planted_direction: str
    op: str
    direction: str
    layer: str
    how: str
    rerun: str
    """`conformance` or `captured`: what reruns it; `none`: it does not show alone"""
    seconds: float
    """the reference's captured steps included, which the bugs of one model share"""

    @property
    def convicted(self) -> bool:
        """For the progress line: is the right op named?"""
        return self.op in self.planted

    @property
    def whole(self) -> bool:
        """Op and direction."""
        return self.convicted and self.direction == self.planted_direction


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Hits:
    """The catalogue's bugs in one dtype."""

    dtype: str
    rows: list[Hit]

    @property
    def share(self) -> float:
        """Of the bugs whose op is named."""
        return sum(r.convicted for r in self.rows) / len(self.rows)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        seconds = [r.seconds for r in self.rows]
        return {
            "dtype": self.dtype,
            "planted": len(self.rows),
            "op_named": sum(r.convicted for r in self.rows),
            "direction_named": sum(r.whole for r in self.rows),
            "missed": [r.name for r in self.rows if not r.convicted],
            "wrong_direction": [r.name for r in self.rows if r.convicted and not r.whole],
            "rerun": {
                k: sum(r.rerun == k for r in self.rows) for k in ("conformance", "captured", "none")
            },
            "median_seconds": statistics.median(seconds),
            "max_seconds": max(seconds),
            "rows": [dataclasses.asdict(r) for r in self.rows],
        }

    def text(self) -> str:
        """For reading: those not named as planted, then the sums."""
        j = self.to_json()
        lines = [
            f"{r.name}: planted {'/'.join(r.planted)} {r.planted_direction}; "
            f"named {' '.join((r.op, r.direction)).strip() or 'nothing'}"
            for r in self.rows
            if not r.whole
        ]
        again = ", ".join(f"{n} {k}" for k, n in j["rerun"].items())
        return "\n".join(
            [
                *lines,
                f"{self.dtype}: op named {j['op_named']} of {j['planted']}, direction too "
                f"{j['direction_named']}; {j['median_seconds']:.0f} s median, "
                f"{j['max_seconds']:.0f} s most; rerun: {again}",
            ]
        )


def hits(
    dtype: Literal["float32", "bfloat16"] = "float32",
    *,
    steps: int = 40,
    cache_dir: str | Path = ".cache",
    names: Sequence[str] | None = None,
    processes: int = 2,
    progress: Any = None,
) -> Hits:
    """Bisects the catalogue's bugs (or those of these names) in one dtype. Raises ConfigError for a
    name that does not exist."""
    bugs = [v for v in variants(dtype) if isinstance(v, Bug)]
    known = {b.name: b for b in bugs}
    if strange := [n for n in names or () if n not in known]:
        raise ConfigError(unknown(f"{dtype} bug", strange[0], known))
    chosen = [known[n] for n in names] if names is not None else bugs
    jobs = []
    for setup in SETUPS:
        if mine := tuple(b.name for b in chosen if setup_of(b) == setup):
            drawn = draw(config(setup, dtype, steps), cache_dir)
            jobs.append(Job(setup, dtype, steps, 0, drawn, mine, outcomes))
    order = {b.name: i for i, b in enumerate(chosen)}
    rows, _ = detection.run_jobs(jobs, processes, len(chosen), progress)
    return Hits(dtype=dtype, rows=sorted(rows, key=lambda r: order[r.name]))


def outcomes(job: Job) -> Iterator[Hit | float]:
    """Captures the reference's steps (yields the seconds), then yields one row per bug."""
    torch.set_num_threads(1)
    run = config(job.setup, job.dtype, job.steps)
    make = lambda: Drawn(job.rows)  # noqa: E731
    begin = time.perf_counter()
    evidence = gather(run, make, captured_steps(run), ANY_CALL, lambda what, done, of: None)
    shared = time.perf_counter() - begin
    yield shared
    known = {v.name: v for v in variants(job.dtype)}
    for name in job.names:
        bug = known[name]
        assert isinstance(bug, Bug)
        found = bisect(run, bug.backend(), evidence=evidence, sampler=make)
        alone = "captured" if " --op " in found.rerun else "none"
        yield Hit(
            name=name,
            planted=sorted(bug.kernels()),
            planted_direction=DIRECTION.get(bug.direction, bug.direction),
            op=found.op,
            direction=found.direction,
            layer=found.layer,
            how=found.how,
            rerun="conformance" if " conformance " in found.rerun else alone,
            seconds=shared + found.seconds,
        )
