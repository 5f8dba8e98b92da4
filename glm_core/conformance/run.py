"""Runs cases on a backend and reports; the one way in for CLI, pytest plugin and tests."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from glm_core.backends.base import Backend
from glm_core.backends.registry import usable
from glm_core.conformance.case import Case, every_case, select
from glm_core.conformance.check import CaseFailure, Judged, judge
from glm_core.conformance.known_failures import KnownFailure, known_for, load, unmatched
from glm_core.conformance.perf import measure
from glm_core.conformance.report import Report, Result
from glm_core.conformance.tolerance import MAX_ERROR_RATIO
from glm_core.diagnose import watchdog
from glm_core.measure.timing import machine

WAY_OUT = "reset the device; --id with another pattern leaves the case out"

Progress = Callable[[int, int, str], None]
"""called before each case with its number, how many there are, and its id; at the end with ''"""


def run(
    backend: str | Backend,
    *,
    mode: str | Sequence[str] = ("test", "grad"),
    op: str | None = None,
    id: str | None = None,
    dtypes: Iterable[torch.dtype] | None = None,
    real: bool = True,
    known_failures: Path | str | None = None,
    progress: Progress | None = None,
    timeout_s: float = 0.0,
) -> Report:
    """Every case that fits the filters, on one backend. Raises GlmCoreError for unknown names and
    BackendUnavailableError; a case that goes wrong is a result, not an error, but for
    one that takes longer than `timeout_s` (0: any time): it ends the process, which names it."""
    backend = usable(backend) if isinstance(backend, str) else backend
    modes = (mode,) if isinstance(mode, str) else tuple(mode)
    cases = select(backend, modes=modes, op=op, id=id, dtypes=dtypes, real=real)
    entries = load(known_failures)
    results = []
    with watchdog.guard(timeout_s, f"conformance: backend {backend.name}", WAY_OUT):
        for number, case in enumerate(cases):
            if progress is not None:
                progress(number, len(cases), case.id)
            watchdog.beat(f"case {case.id}")
            results.append(run_case(case, backend, entries))
    if progress is not None:
        progress(len(cases), len(cases), "")
    stale = unmatched(entries, [case.id for case in every_case(backend)] if entries else [])
    return Report(backend.name, [*results, *(_stale(e, backend) for e in stale)], machine())


def run_case(case: Case, backend: Backend, entries: Iterable[KnownFailure] = ()) -> Result:
    """One case's outcome, a known failure turned into xfail, or into fail where it is known no
    longer."""
    start = time.perf_counter()
    outcome = _outcome(case, backend)
    entry = known_for(case.id, entries)
    if entry is not None:
        outcome = _as_known(outcome, entry)
    name, ratio, reason, measured = outcome
    return Result(
        id=case.id,
        backend=backend.name,
        outcome=name,
        error_ratio=ratio,
        reason=reason,
        seconds=time.perf_counter() - start,
        measured=measured,
    )


Outcome = tuple[str, float | None, str, dict[str, object]]


def _outcome(case: Case, backend: Backend) -> Outcome:
    try:
        support = backend.support(case.op, case.sample.make(case.dtype, backend.device()))
        if not support.ok:
            return "unsupported", None, support.reason, {}
        if case.mode == "support":
            return "pass", None, "", {}
        if case.mode == "perf":
            return "pass", None, "", measure(case, backend)
        judged = judge(case, backend)
    except CaseFailure as finding:
        return "fail", None, str(finding), {}
    except Exception as error:  # a vendor's kernel may raise anything; the report carries it
        return "fail", None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", {}
    return _verdict(judged)


def _verdict(judged: Judged) -> Outcome:
    wrong = (judged.error_ratio or 0.0) > MAX_ERROR_RATIO
    return "fail" if wrong else "pass", judged.error_ratio, judged.reason, {}


def _as_known(outcome: Outcome, entry: KnownFailure) -> Outcome:
    name, ratio, reason, measured = outcome
    if name == "fail":
        return "xfail", ratio, f"{entry.reason} ({reason})", measured
    stale = f"known failure, but the outcome is {name}; remove it from {entry.place}"
    return "fail", ratio, stale, measured


def _stale(entry: KnownFailure, backend: Backend) -> Result:
    reason = f"known failure {entry.pattern!r} fits no case; remove it from {entry.place}"
    return Result(id=entry.place, backend=backend.name, outcome="fail", reason=reason)


def progress_line(number: int, total: int, id: str) -> None:
    """A Progress for terminals: one line on stderr, overwritten."""
    line = f"\r{number + bool(id)}/{total} {id:<70.70}"
    print(line, end="" if id else "\n", file=sys.stderr, flush=True)
