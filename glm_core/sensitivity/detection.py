"""Measures how sharp the verdict is: judges every planted fault and benign change, and compares
with the 2 % rule in common use on the same runs."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from typing import Any, Literal

import numpy as np
import torch

from glm_core import align
from glm_core.align.trace import Trace
from glm_core.align.verdict import finite
from glm_core.config import RunConfig
from glm_core.data.sampler import Batch
from glm_core.errors import BackendUnavailableError, ConfigError, unknown
from glm_core.faults.fault import Benign, Fault
from glm_core.sensitivity.setups import (
    DTYPES,
    SETUPS,
    Drawn,
    Variant,
    config,
    draw,
    held_out,
    setup_of,
    variants,
)

Progress = Callable[[int, int, "Row"], None]
"""called with (number of variants done, number of all, the last one's row)"""

TWO_PERCENT = 0.02
"""the rule in common use: a mean relative loss difference above it convicts"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The outcome of one variant. A ratio above 1 is outside what honest rounding can do."""

    name: str
    planted: bool
    """whether it is a fault; else it is a benign change"""
    kind: str
    op: str
    setup: str
    held_out: bool
    """whether it was left out when the rules of the verdict were adjusted"""
    convicted: bool
    by: list[str]
    """tests that convict it, in the order in which they run: gradient, op-by-op, envelope"""
    margin: float
    """the largest of the three ratios"""
    gradient_ratio: float
    op_ratio: float
    envelope_ratio: float
    seconds: float
    """time until the first conviction, or for all tests, without the reference's calibration"""
    mean_loss_difference: float
    """mean over the steps of |loss - reference| / reference; infinite if a loss is not finite"""
    finding: str
    """the worst op-by-op finding; empty: there is none"""
    skipped: str = ""
    """why it could not run here; empty: it ran"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """The outcomes of all variants in one dtype."""

    dtype: str
    rows: list[Row]
    neutral: list[str]
    """names of benign changes that change no bit in models this small; they run, but do not
    count"""
    calibration_seconds: float
    seconds: float

    def of(self, planted: bool) -> list[Row]:
        """Returns the rows that count, of the faults or of the benign changes."""
        counts = [r for r in self.rows if not r.skipped and r.name not in self.neutral]
        return [r for r in counts if r.planted == planted]

    @property
    def missed(self) -> list[str]:
        """The names of faults that were not convicted."""
        return [r.name for r in self.of(True) if not r.convicted]

    @property
    def false_alarms(self) -> list[str]:
        """The names of benign changes that were convicted, including those that change no bit."""
        return [r.name for r in self.rows if not r.planted and r.convicted]

    def to_json(self) -> dict[str, Any]:
        """Returns the result as plain values, the fields that others rely on first."""
        faults, benign = self.of(True), self.of(False)
        detected = [r for r in faults if r.convicted]
        held = [r for r in faults if r.held_out]
        plain = {
            "dtype": self.dtype,
            "planted": len(faults),
            "detected": len(detected),
            "missed": self.missed,
            "benign": len(benign),
            "false_alarms": len(self.false_alarms),
            "median_margin": statistics.median(r.margin for r in detected) if detected else 0.0,
            "two_percent_rule_detected": _above_two_percent(faults),
            "two_percent_rule_false_alarms": _above_two_percent(benign),
            "convicted_benign": self.false_alarms,
            "held_out": {"planted": len(held), "detected": sum(r.convicted for r in held)},
            "largest_benign_margin": max((r.margin for r in benign), default=0.0),
            "median_seconds": statistics.median(r.seconds for r in detected) if detected else 0.0,
            "neutral": self.neutral,
            "skipped": {r.name: r.skipped for r in self.rows if r.skipped},
            "calibration_seconds": self.calibration_seconds,
            "seconds": self.seconds,
            "rows": [{k: finite(v) for k, v in dataclasses.asdict(r).items()} for r in self.rows],
        }
        return {k: finite(v) for k, v in plain.items()}

    def text(self) -> str:
        """Returns a table with a line per variant, the weakest conviction first, and the totals."""
        lines = [_HEAD, *(_line(r) for r in sorted(self.rows, key=_order))]
        return "\n".join([*lines, "", *_summary(self.to_json())])


def _above_two_percent(rows: list[Row]) -> int:
    return sum(r.mean_loss_difference > TWO_PERCENT for r in rows)


_HEAD = (
    f"{'':7}{'variant':36} {'op':21} {'verdict':9} {'margin':>9} {'by':30} "
    f"{'s':>5} {'loss diff':>9}"
)


def _order(row: Row) -> tuple[bool, float]:
    return (not row.planted, row.margin if row.planted else -row.margin)


def _line(r: Row) -> str:
    kind = "bug" if r.planted else "benign"
    verdict = "skipped" if r.skipped else "diverged" if r.convicted else "aligned"
    by = r.skipped or ", ".join(r.by)
    return (
        f"{kind:7}{r.name:36} {r.op or 'all':21} {verdict:9} {r.margin:9.3g} {by:30} "
        f"{r.seconds:5.1f} {r.mean_loss_difference:9.1e}"
    )


def _summary(j: dict[str, Any]) -> Iterator[str]:
    held = j["held_out"]
    yield f"{j['dtype']}: {j['detected']} of {j['planted']} planted bugs detected" + (
        f"; missed: {', '.join(j['missed'])}" if j["missed"] else ""
    )
    yield f"of the third held out by name: {held['detected']} of {held['planted']} detected"
    yield f"{j['false_alarms']} false alarms in {j['benign']} benign changes" + (
        f": {', '.join(j['convicted_benign'])}" if j["convicted_benign"] else ""
    )
    yield (
        f"median margin {j['median_margin']:.3g}, largest benign {j['largest_benign_margin']:.3g}; "
        f"median {j['median_seconds']:.1f} s to detection"
    )
    yield (
        f"mean relative loss difference above 2 %: {j['two_percent_rule_detected']} of "
        f"{j['planted']} bugs, {j['two_percent_rule_false_alarms']} of {j['benign']} benign"
    )
    yield f"{j['seconds']:.0f} s, {j['calibration_seconds']:.0f} s of them calibration"


def sensitivity(
    dtype: Literal["float32", "bfloat16"] = "float32",
    *,
    steps: int = 40,
    controls: int = align.NUM_CONTROLS,
    cache_dir: str | Path = ".cache",
    names: Sequence[str] | None = None,
    processes: int = 2,
    progress: Progress | None = None,
) -> Sensitivity:
    """Judges all variants (or those of these names) in one dtype, in one process per setup. Raises
    ConfigError for an unknown dtype or name."""
    if dtype not in DTYPES:
        raise ConfigError(unknown("dtype", dtype, DTYPES))
    start, chosen = time.perf_counter(), variants(dtype)
    if names is not None:
        known = {v.name: v for v in chosen}
        if missing := [n for n in names if n not in known]:
            raise ConfigError(unknown(f"{dtype} variant", missing[0], known))
        chosen = [known[n] for n in names]
    jobs = []
    for setup in SETUPS:
        if in_setup := tuple(v.name for v in chosen if setup_of(v) == setup):
            drawn = draw(config(setup, dtype, steps), cache_dir)
            jobs.append(Job(setup, dtype, steps, controls, drawn, in_setup, outcomes))
    order = {v.name: i for i, v in enumerate(chosen)}
    rows, calibration = run_jobs(jobs, processes, len(chosen), progress)
    return Sensitivity(
        dtype=dtype,
        rows=sorted(rows, key=lambda r: order[r.name]),
        neutral=[v.name for v in chosen if isinstance(v, Benign) and v.neutral],
        calibration_seconds=calibration,
        seconds=time.perf_counter() - start,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """The work of one process: a calibration, then variants of one setup."""

    setup: str
    dtype: str
    steps: int
    controls: int
    rows: Batch
    """the sequences of the run"""
    names: tuple[str, ...]
    work: Callable[[Job], Iterator[Any]]
    """yields the seconds of the calibration, then one row per variant"""


def run_jobs(
    jobs: list[Job], processes: int, total: int, progress: Progress | None
) -> tuple[list[Any], float]:
    """Returns the rows of all jobs in the order of completion, and the seconds of all
    calibrations."""
    rows: list[Any] = []
    calibration = 0.0
    report = progress or (lambda done, total, row: None)

    def take(item: Any) -> None:
        nonlocal calibration
        if isinstance(item, float):
            calibration += item
        else:
            rows.append(item)
            report(len(rows), total, item)

    if processes == 1:
        for job in jobs:
            for item in job.work(job):
                take(item)
        return rows, calibration
    context = get_context("spawn")  # a fork would copy torch's thread pool in an unusable state
    with context.Manager() as manager, ProcessPoolExecutor(processes, context) as pool:
        queue = manager.Queue()
        largest_first = sorted(jobs, key=lambda job: -len(job.names))
        futures = [pool.submit(_send, job, queue) for job in largest_first]
        while not all(f.done() for f in futures) or not queue.empty():
            with contextlib.suppress(Empty):
                take(queue.get(timeout=0.5))
        for future in futures:
            future.result()
    return rows, calibration


def _send(job: Job, queue: Any) -> None:
    for item in job.work(job):
        queue.put(item)


def outcomes(job: Job) -> Iterator[Row | float]:
    """Calibrates the reference (yields the seconds), then yields one row per variant."""
    torch.set_num_threads(1)
    run = config(job.setup, job.dtype, job.steps)
    start = time.perf_counter()
    calibration = align.calibrate(run, sampler=lambda: Drawn(job.rows), controls=job.controls)
    yield time.perf_counter() - start
    known = {v.name: v for v in variants(job.dtype)}
    for name in job.names:
        yield judge(known[name], run, calibration)


def judge(variant: Variant, run: RunConfig, calibration: align.Calibration) -> Row:
    """Judges one variant as `align.run` judges a candidate. A fault is tried by teacher forcing
    first; only where that does not convict it, every call of its own run is watched. The seconds of
    the row end at the first conviction."""
    try:
        backend = variant.backend()
        probe = backend.probe()
    except BackendUnavailableError as error:
        return _row(variant, skipped=str(error))
    if not probe.ok:
        return _row(variant, skipped=probe.reason)
    if isinstance(variant, Benign):
        torch.set_num_threads(variant.threads)
        micro_batch = variant.micro_batch or run.train.micro_batch
        train = dataclasses.replace(run.train, micro_batch=micro_batch)
        run = dataclasses.replace(run, train=train)
    reference, start = calibration.reference, time.perf_counter()
    with variant.plant() if isinstance(variant, Fault) else contextlib.nullcontext():
        pairs = []
        if isinstance(variant, Fault):
            forced = align.record(run, backend, calibration=calibration, free_run=False)
            pairs.append(align.compare(reference, forced))
        seconds = time.perf_counter() - start
        found = any(pair.verdict == "diverged" for pair in pairs)
        free = align.record(
            run, variant.backend(), calibration=calibration, teacher_forcing=not found
        )
        pairs.append(align.compare(reference, free))
    torch.set_num_threads(1)
    ratios = {
        "gradient": max(pair.max_gradient_ratio for pair in pairs),
        "op-by-op": max(pair.max_op_ratio for pair in pairs),
        "envelope": max(pair.max_envelope_ratio for pair in pairs),
    }
    findings = [str(pair.findings[0]) for pair in pairs if pair.findings]
    return _row(
        variant,
        convicted=any(pair.verdict == "diverged" for pair in pairs),
        by=[name for name, ratio in ratios.items() if ratio > 1],
        margin=max(ratios.values()),
        gradient_ratio=ratios["gradient"],
        op_ratio=ratios["op-by-op"],
        envelope_ratio=ratios["envelope"],
        seconds=seconds if found else time.perf_counter() - start,
        mean_loss_difference=loss_difference(reference, free),
        finding=findings[0] if findings else "",
    )


def loss_difference(reference: Trace, candidate: Trace) -> float:
    """Returns the mean over the steps of |loss - reference| / reference; infinite where a loss is
    not finite."""
    n = min(len(reference.loss), len(candidate.loss))
    relative = np.abs(candidate.loss[:n] - reference.loss[:n]) / np.abs(reference.loss[:n])
    return float(relative.mean()) if np.isfinite(relative).all() else float("inf")


def _row(variant: Variant, **outcome: Any) -> Row:
    blank: dict[str, Any] = {
        "convicted": False,
        "by": [],
        "margin": 0.0,
        "gradient_ratio": 0.0,
        "op_ratio": 0.0,
        "envelope_ratio": 0.0,
        "seconds": 0.0,
        "mean_loss_difference": 0.0,
        "finding": "",
    }
    return Row(
        name=variant.name,
        planted=isinstance(variant, Fault),
        op=variant.op,
        kind=variant.kind if isinstance(variant, Fault) else "benign",
        setup=setup_of(variant),
        held_out=held_out(variant.name),
        **blank | outcome,
    )
