"""Runs the museum: judges every exhibit and every benign change, and says what was found by which
test, where it was located, and what was missed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from glm_core import align
from glm_core.backends import registry
from glm_core.config import Dtype, RunConfig
from glm_core.errors import ConfigError, unknown
from glm_core.faults.catalogue import BENIGN
from glm_core.faults.fault import Benign
from glm_core.faults.museum.exhibit import Exhibit
from glm_core.faults.museum.hall import HALL
from glm_core.faults.museum.own_kernels import fault_named
from glm_core.sensitivity.detection import Job, run_jobs
from glm_core.sensitivity.judges import (
    Verdict,
    by_align,
    by_conformance,
    by_resuming,
    drawn,
    small_run,
)
from glm_core.sensitivity.many import proofs
from glm_core.sensitivity.plans import sample

STEPS = 12
"""of a training exhibit's run"""
CONTROLS = 4
GOAL = 0.95
"""share of the exhibits that must be found and named"""
HONEST = "another-micro-batch"
"""the benign change of a training run: the same sequences in other micro-batches"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The outcome of one exhibit or benign change."""

    name: str
    kind: str
    """the exhibit's part, or `benign`"""
    expected: str
    """pattern of what must be named; empty for a benign change"""
    by: str
    """the test that convicts; empty: none does"""
    where: str
    why: str
    seconds: float

    @property
    def convicted(self) -> bool:
        """Whether some test convicts it."""
        return bool(self.by)

    @property
    def named(self) -> bool:
        """Whether it was found, and the right place named."""
        return self.convicted and fnmatchcase(self.where, self.expected)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Museum:
    """The outcomes of a run."""

    rows: list[Row]
    seconds: float
    held_out: bool

    def of(self, benign: bool) -> list[Row]:
        """Returns the benign changes, or the exhibits."""
        return [r for r in self.rows if (r.kind == "benign") == benign]

    @property
    def missed(self) -> list[Row]:
        """Returns the exhibits that were not found, or whose place was not named."""
        return [r for r in self.of(False) if not r.named]

    @property
    def false_alarms(self) -> list[Row]:
        """Returns the benign changes that were convicted."""
        return [r for r in self.of(True) if r.convicted]

    @property
    def reached(self) -> bool:
        """Whether the goal was reached, and nothing benign was convicted."""
        exhibits = self.of(False)
        return len(self.missed) <= (1 - GOAL) * len(exhibits) and not self.false_alarms

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        exhibits = self.of(False)
        return {
            "exhibits": len(exhibits),
            "found": sum(r.convicted for r in exhibits),
            "named": sum(r.named for r in exhibits),
            "missed": {r.name: reason(r) for r in self.missed},
            "benign": len(self.of(True)),
            "false_alarms": {r.name: r.why for r in self.false_alarms},
            "held_out": self.held_out,
            "seconds": self.seconds,
            "rows": [dataclasses.asdict(r) | {"named": r.named} for r in self.rows],
        }

    def text(self) -> str:
        """Returns a table of the exhibits, then the missed ones and the totals."""
        head = f"{'exhibit':40} {'found by':12} {'located':34} {'s':>6}"
        lines = [head, *(line(r) for r in self.of(False))]
        lines += [f"missed: {r.name}: {reason(r)}" for r in self.missed]
        lines += [f"convicted though benign: {r.name}: {r.why}" for r in self.false_alarms]
        j, part = self.to_json(), "the held-out quarter: " if self.held_out else ""
        total = (
            f"{part}{j['found']} of {j['exhibits']} found, {j['named']} named; "
            f"{len(self.false_alarms)} of {j['benign']} benign changes convicted; "
            f"{self.seconds:.0f} s"
        )
        return "\n".join([*lines, total])


def line(row: Row) -> str:
    """Returns a row of the table."""
    return f"{row.name:40} {row.by or '-':12} {row.where or '-':34} {row.seconds:6.1f}"


def reason(row: Row) -> str:
    """Says why an exhibit counts as missed."""
    if not row.convicted:
        return row.why or "no test convicts it"
    return f"{row.where} was named, not {row.expected}"


def museum(
    *,
    many: bool = False,
    held_out: bool = False,
    only: Sequence[str] = (),
    processes: int = 2,
    progress: Any = None,
) -> Museum:
    """Judges the exhibits of one process, or of many: those that are not held out, or the held-out
    quarter, or those of these names; and the benign changes. Raises ConfigError for an unknown
    name."""
    hall = {e.name: e for e in HALL if (e.part == "plan") == many or e.name in only}
    if strange := [n for n in only if n not in hall]:
        raise ConfigError(unknown("exhibit", strange[0], {e.name: e for e in HALL}))
    start = time.perf_counter()
    chosen = [hall[n] for n in only] or [e for e in hall.values() if e.held_out == held_out]
    changes = [] if only or held_out or many else [b.name for b in honest()]
    jobs = jobs_of(chosen, changes)
    total = sum(len(j.names) for j in jobs) + len({e.plan for e in chosen if e.plan})
    found, _ = run_jobs(jobs, processes, total, progress)
    order = {name: i for i, name in enumerate([*hall, *changes])}
    sorted_rows = sorted(found, key=lambda r: order.get(r.name, len(order)))
    return Museum(rows=sorted_rows, seconds=time.perf_counter() - start, held_out=held_out)


def honest() -> list[Benign]:
    """Returns the catalogue's benign changes of a kernel, without those that are right for
    arguments of ordinary size only."""
    return [b for b in BENIGN if b.kernels and b.op and not b.ordinary]


def jobs_of(chosen: list[Exhibit], changes: list[str]) -> list[Job]:
    """Splits the work: kernels by op, since they share what is correct; runs by dtype, since they
    share a calibration."""
    groups: dict[tuple[str, Dtype], list[str]] = {}
    for e in chosen:
        if e.part == "kernel":
            groups.setdefault((fault_named(e.fault).op, "float32"), []).append(e.name)
        else:
            groups.setdefault((e.part, e.dtype), []).append(e.name)
    for b in BENIGN:
        if b.name in changes:
            groups.setdefault((b.op, "float32"), []).append(b.name)
    if changes:
        for (part, _), names in groups.items():
            if part == "training":
                names.append(HONEST)
    rows = sample.Text().next(1)  # a job has some; these make their own
    return [
        Job(group, dtype, STEPS, CONTROLS, rows, tuple(names), outcomes)
        for (group, dtype), names in groups.items()
    ]


def outcomes(job: Job) -> Iterator[Row | float]:
    """Yields one row per name, and the seconds of a calibration where one is needed."""
    torch.set_num_threads(1)
    known = {e.name: e for e in HALL}
    if job.setup == "plan":
        for name, exhibit, verdict, seconds in proofs([known[n] for n in job.names]):
            yield row(name, exhibit, verdict, seconds)
        return
    changes = {b.name: b for b in BENIGN}
    dtype: Any = job.dtype
    run = small_run(dtype, job.steps)
    calibration = None
    if job.setup == "training":
        begin = time.perf_counter()
        calibration = align.calibrate(
            run,
            sampler=lambda: drawn(run),
            controls=job.controls,
            capture_steps=(job.steps // 2,),
        )
        yield time.perf_counter() - begin
    for name in job.names:
        begin, e = time.perf_counter(), known.get(name)
        if e is not None:
            verdict = judge(e, run, calibration)
        elif name in changes:
            b = changes[name]
            verdict = by_conformance(b.backend(), dtype_of(b), real=False)
        else:
            assert calibration is not None
            name = f"{name}-{job.dtype}"
            verdict = by_align(in_halves(run), calibration)
        yield row(name, e, verdict, time.perf_counter() - begin)


def in_halves(run: RunConfig) -> RunConfig:
    """Returns the same run in micro-batches of half the size."""
    train = dataclasses.replace(run.train, micro_batch=run.train.micro_batch // 2)
    return dataclasses.replace(run, train=train)


def judge(e: Exhibit, run: RunConfig, calibration: Any) -> Verdict:
    """Judges an exhibit by the cheapest test that a user would run."""
    if e.part == "kernel":
        return by_conformance(fault_named(e.fault).backend(), e.dtype)
    assert e.plant is not None
    if e.part == "resume":
        return by_resuming(resumed(run), e.plant)
    return by_align(run, calibration, registry.usable("reference"), e.plant)


def resumed(run: RunConfig) -> RunConfig:
    """Returns the run of the test of resuming: two steps."""
    return dataclasses.replace(run, train=dataclasses.replace(run.train, steps=2, warmup_steps=1))


def dtype_of(change: Benign) -> Dtype:
    """Returns the first working dtype in which the change changes a bit."""
    dtype: Any = change.dtypes[0]
    return dtype


def row(name: str, e: Exhibit | None, verdict: Verdict, seconds: float) -> Row:
    """Returns the outcome of an exhibit, or of a benign change."""
    return Row(
        name=name,
        kind=e.part if e else "benign",
        expected=e.where if e else "",
        by=verdict.by,
        where=verdict.where,
        why=verdict.why,
        seconds=seconds,
    )
