"""Runs cases on a backend and reports the outcomes. The CLI, the pytest plugin and the tests all
come in here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from glm_core.backends.base import Backend
from glm_core.backends.registry import usable
from glm_core.conformance.case import Case, CaseFailure, every_case, select
from glm_core.conformance.check import Judgement, Keep, judge
from glm_core.conformance.known_failures import KnownFailure, known_for, load, unmatched
from glm_core.conformance.perf import measure
from glm_core.conformance.report import Report, Result
from glm_core.diagnose import watchdog
from glm_core.errors import NoRoomError, in_one_line
from glm_core.measure.timing import machine

WAY_OUT = "reset the device; --skip ID leaves the case out"
"""what a message about a case that takes too long advises"""

Progress = Callable[[int, int, str], None]
"""called before each case with its number (from 0), the number of cases and its id; once more at
the end with an empty id"""


def run(
    backend: str | Backend,
    *,
    mode: str | Sequence[str] = ("test", "grad"),
    op: str | None = None,
    id: str | None = None,
    skip: Sequence[str] = (),
    dtypes: Iterable[torch.dtype] | None = None,
    real: bool = True,
    known_failures: Path | str | None = None,
    progress: Progress | None = None,
    timeout_s: float = 0.0,
    keep: Keep | None = None,
) -> Report:
    """Runs every case that matches the filters of `select` on one backend. Raises GlmCoreError for
    unknown names, and BackendUnavailableError. A case that fails is a result and raises nothing;
    but one that takes longer than `timeout_s` (0: no limit) ends the process with a message that
    names it. `keep` receives the results of every case that is run in mode test or grad."""
    backend = usable(backend) if isinstance(backend, str) else backend
    modes = (mode,) if isinstance(mode, str) else tuple(mode)
    cases = select(backend, modes=modes, op=op, id=id, skip=skip, dtypes=dtypes, real=real)
    entries = load(known_failures)
    results = []
    with watchdog.guard(timeout_s, f"conformance: backend {backend.name}", WAY_OUT):
        for number, case in enumerate(cases):
            if progress is not None:
                progress(number, len(cases), case.id)
            watchdog.beat(f"case {case.id}")
            results.append(run_case(case, backend, entries, keep))
    if progress is not None:
        progress(len(cases), len(cases), "")
    stale = unmatched(entries, [case.id for case in every_case(backend)] if entries else [])
    results += [_stale(e, backend) for e in stale]
    return Report(backend.name, results, machine(), tuple(skip))


def run_case(
    case: Case,
    backend: Backend,
    entries: Iterable[KnownFailure] = (),
    keep: Keep | None = None,
    values_only: bool = False,
) -> Result:
    """Runs one case and returns its result. A known failure becomes an xfail; a case that is known
    to fail but does not becomes a failure. `values_only` judges the results alone."""
    start = time.perf_counter()
    outcome = _outcome(case, backend, keep, values_only)
    entry = known_for(case.id, entries)
    if entry is not None:
        outcome = as_known(outcome, entry)
    return result_of(case.id, backend, outcome, start)


Outcome = tuple[str, float | None, str, dict[str, object]]
"""outcome, error ratio, reason and measured figures, as in Result"""


def result_of(id: str, backend: Backend, outcome: Outcome, start: float) -> Result:
    """Returns the result of a case that began at `start` by time.perf_counter and ends now."""
    name, ratio, reason, measured = outcome
    return Result(
        id=id,
        backend=backend.name,
        outcome=name,
        error_ratio=ratio,
        reason=reason,
        seconds=time.perf_counter() - start,
        measured=measured,
    )


def _outcome(case: Case, backend: Backend, keep: Keep | None, values_only: bool) -> Outcome:
    try:
        args = case.sample.make(case.dtype, backend.device())
        support = backend.support(case.op, args)
        if not support.ok:
            return "unsupported", None, support.reason, {}
        if case.mode == "support":
            return "pass", None, "", {}
        if case.mode == "perf":
            return "pass", None, "", measure(case, backend)
        judgement = judge(case, backend, keep, args, values_only)
    except NoRoomError as lack:
        return "unsupported", None, str(lack), {}
    except CaseFailure as failure:
        return "fail", None, str(failure), {}
    except Exception as error:  # a vendor's kernel may raise anything; the report carries it
        return "fail", None, in_one_line(error), {}
    return outcome_of(judgement)


def outcome_of(judgement: Judgement) -> Outcome:
    """Returns the outcome of a case that ran to its end."""
    outcome = "pass" if judgement.passed else "fail"
    return outcome, judgement.error_ratio, judgement.reason, {}


def as_known(outcome: Outcome, entry: KnownFailure) -> Outcome:
    """Returns the outcome of a case that is known to fail: xfail if it does, else a failure."""
    name, ratio, reason, measured = outcome
    if name == "fail":
        return "xfail", ratio, f"{entry.reason} ({reason})", measured
    stale = f"known failure, but the outcome is {name}; remove it from {entry.place}"
    return "fail", ratio, stale, measured


def _stale(entry: KnownFailure, backend: Backend) -> Result:
    reason = f"known failure {entry.pattern!r} fits no case; remove it from {entry.place}"
    return Result(id=entry.place, backend=backend.name, outcome="fail", reason=reason)
