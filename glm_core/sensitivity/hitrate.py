"""Measures how often `bisect` names the op and direction in which a fault was planted."""

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
from glm_core.faults.fault import Fault
from glm_core.sensitivity import detection
from glm_core.sensitivity.detection import Job
from glm_core.sensitivity.setups import SETUPS, Drawn, config, draw, setup_of, variants

DIRECTION = {"both": "forward", "update": "optimizer"}
"""a fault's direction -> what bisect must name; a wrong formula is wrong in its forward first"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """One planted fault and what bisect named."""

    name: str
    planted: list[str]
    """ops that have the fault"""
    planted_direction: str
    op: str
    direction: str
    layer: str
    how: str
    rerun: str
    """`conformance` or `captured`: what the rerun command runs; `none`: the op alone does not show
    the fault"""
    seconds: float
    """includes the capture of the reference's steps, which the faults of one model share"""

    @property
    def convicted(self) -> bool:
        """Whether the right op was named; the progress line shows it."""
        return self.op in self.planted

    @property
    def whole(self) -> bool:
        """Whether the right op and direction were named."""
        return self.convicted and self.direction == self.planted_direction


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Hits:
    """The planted faults of one dtype and what bisect named."""

    dtype: str
    rows: list[Hit]

    @property
    def share(self) -> float:
        """The share of the faults whose op was named."""
        return sum(r.convicted for r in self.rows) / len(self.rows)

    def to_json(self) -> dict[str, Any]:
        """Returns the result as plain values."""
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
        """Returns a line per fault that was not named as planted, then the totals."""
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
    """Bisects all planted faults (or those of these names) in one dtype. Raises ConfigError for an
    unknown name."""
    # what lies outside of the ops has no op to name
    faults = [v for v in variants(dtype) if isinstance(v, Fault) and v.kernels()]
    known = {f.name: f for f in faults}
    if missing := [n for n in names or () if n not in known]:
        raise ConfigError(unknown(f"{dtype} bug", missing[0], known))
    chosen = [known[n] for n in names] if names is not None else faults
    jobs = []
    for setup in SETUPS:
        if in_setup := tuple(f.name for f in chosen if setup_of(f) == setup):
            drawn = draw(config(setup, dtype, steps), cache_dir)
            jobs.append(Job(setup, dtype, steps, 0, drawn, in_setup, outcomes))
    order = {f.name: i for i, f in enumerate(chosen)}
    rows, _ = detection.run_jobs(jobs, processes, len(chosen), progress)
    return Hits(dtype=dtype, rows=sorted(rows, key=lambda r: order[r.name]))


def outcomes(job: Job) -> Iterator[Hit | float]:
    """Captures the reference's steps (yields the seconds), then yields one row per fault."""
    torch.set_num_threads(1)
    run = config(job.setup, job.dtype, job.steps)
    make = lambda: Drawn(job.rows)  # noqa: E731
    begin = time.perf_counter()
    evidence = gather(run, make, captured_steps(run), ANY_CALL, lambda what, done, of: None)
    shared = time.perf_counter() - begin
    yield shared
    known = {v.name: v for v in variants(job.dtype)}
    for name in job.names:
        fault = known[name]
        assert isinstance(fault, Fault)
        named = bisect(run, fault.backend(), evidence=evidence, sampler=make)
        alone = "captured" if " --op " in named.rerun else "none"
        yield Hit(
            name=name,
            planted=sorted(fault.kernels()),
            planted_direction=DIRECTION.get(fault.direction, fault.direction),
            op=named.op,
            direction=named.direction,
            layer=named.layer,
            how=named.how,
            rerun="conformance" if " conformance " in named.rerun else alone,
            seconds=shared + named.seconds,
        )
