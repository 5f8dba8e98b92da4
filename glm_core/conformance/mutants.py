"""Checks that the samples reject wrong kernels: on each mutant of the fault catalogue some ordinary
case must fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from glm_core.conformance.case import Case, select
from glm_core.conformance.run import Progress, run_case
from glm_core.errors import GlmCoreError, unknown
from glm_core.faults.catalogue import every_mutant
from glm_core.faults.fault import Fault
from glm_core.ops import all_ops


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """A mutant and the case that rejects it."""

    mutant: Fault
    case: str
    """id of the case that fails; empty: the mutant survived"""
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class MutantReport:
    """The trials of all mutants."""

    trials: Sequence[Trial]

    @property
    def survivors(self) -> list[Fault]:
        """The mutants that no case rejects."""
        return [t.mutant for t in self.trials if not t.case]

    @property
    def ok(self) -> bool:
        """Whether every mutant was killed."""
        return not self.survivors

    def to_json(self) -> dict[str, Any]:
        """Returns the result as plain values."""
        return {
            "mutants": len(self.trials),
            "killed": len(self.trials) - len(self.survivors),
            "survivors": [{"id": m.id, "wrong": m.description} for m in self.survivors],
            "kills": [{"id": t.mutant.id, "case": t.case} for t in self.trials if t.case],
        }

    def text(self) -> str:
        """Returns the kills per op, then the survivors by id."""
        lines = []
        for op in all_ops():
            cases = [t.case for t in self.trials if t.mutant.op == op]
            killed = sum(map(bool, cases))
            lines += [f"{op:<22} {killed:>3} of {len(cases):>3} killed"] if cases else []
        lines += [f"survivor {m.id}: {m.description}" for m in self.survivors]
        total = len(self.trials)
        return "\n".join([*lines, f"{total - len(self.survivors)} of {total} mutants killed"])


def mutants(op: str | None = None, progress: Progress | None = None) -> MutantReport:
    """Runs the ordinary cases on every mutant (of one op) until one fails. Raises GlmCoreError for
    an unknown op."""
    if op is not None and op not in all_ops():
        raise GlmCoreError(unknown("op", op, all_ops()))
    chosen = [m for m in every_mutant() if op in (None, m.op)]
    trials = []
    for number, mutant in enumerate(chosen):
        if progress is not None:
            progress(number, len(chosen), mutant.id)
        trials.append(attempt(mutant))
    if progress is not None:
        progress(len(chosen), len(chosen), "")
    return MutantReport(trials)


def attempt(mutant: Fault) -> Trial:
    """Returns a case that rejects the mutant. The values of small shapes in the first dtype are
    judged first: that rejects most wrong kernels, in a small part of the time of all checks."""
    order = [s.id for s in all_ops()[mutant.op].samples()]

    def sort_key(case: Case) -> tuple[bool, int]:
        """Orders cases sample by sample, then indexes out of range, the large shapes last, tensors
        past 2^31 elements behind them."""
        large, name = case.sample.real or case.sample.large, case.sample.id
        return large, len(order) if case.raises or name not in order else order.index(name)

    for values_only in (True, False):
        backend = mutant.backend()  # a mutant may count its calls
        dtypes = backend.dtypes[:1] if values_only else None
        cases = select(backend, op=mutant.op, dtypes=dtypes, real=not values_only)
        for case in sorted(cases, key=sort_key):
            result = run_case(case, backend, values_only=values_only)
            # an error says more after the checks that are left out at first
            if result.outcome == "fail" and not (values_only and result.error_ratio is None):
                return Trial(mutant, case.id, result.reason)
    return Trial(mutant, "", "")
