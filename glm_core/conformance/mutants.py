"""Do the samples kill wrong kernels? Every mutant is one, and the ordinary cases must reject it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from glm_core.backends.base import Backend
from glm_core.conformance.case import Case, select
from glm_core.conformance.run import Progress, run_case
from glm_core.errors import GlmCoreError, unknown
from glm_core.faults.mutants import Mutant, every_mutant
from glm_core.ops import all_ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """A mutant and the case that rejected it."""

    mutant: Mutant
    case: str
    """id of the first case that failed; empty for a survivor"""
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class MutantReport:
    """The kill rate over all mutants."""

    trials: Sequence[Trial]

    @property
    def survivors(self) -> list[Mutant]:
        """Wrong kernels that no case rejects."""
        return [t.mutant for t in self.trials if not t.case]

    @property
    def ok(self) -> bool:
        """All killed."""
        return not self.survivors

    def to_json(self) -> dict[str, Any]:
        """The machine-readable result."""
        return {
            "mutants": len(self.trials),
            "killed": len(self.trials) - len(self.survivors),
            "survivors": [{"id": m.id, "wrong": m.wrong} for m in self.survivors],
            "kills": [{"id": t.mutant.id, "case": t.case} for t in self.trials if t.case],
        }

    def text(self) -> str:
        """Kills per op, survivors by name."""
        lines = []
        for op in all_ops():
            cases = [t.case for t in self.trials if t.mutant.op.name == op]
            killed = sum(map(bool, cases))
            lines += [f"{op:<22} {killed:>3} of {len(cases):>3} killed"] if cases else []
        lines += [f"survivor {m.id}: {m.wrong}" for m in self.survivors]
        total = len(self.trials)
        return "\n".join([*lines, f"{total - len(self.survivors)} of {total} mutants killed"])


def mutants(op: str | None = None, progress: Progress | None = None) -> MutantReport:
    """Runs the ordinary cases on every mutant (of one op) until one fails."""
    if op is not None and op not in all_ops():
        raise GlmCoreError(unknown("op", op, all_ops()))
    chosen = [m for m in every_mutant() if op in (None, m.op.name)]
    trials = []
    for number, mutant in enumerate(chosen):
        if progress is not None:
            progress(number, len(chosen), mutant.id)
        trials.append(attempt(mutant))
    if progress is not None:
        progress(len(chosen), len(chosen), "")
    return MutantReport(trials)


def attempt(mutant: Mutant) -> Trial:
    """The first case that rejects the mutant."""
    backend = Backend(name="mutant", device_type="cpu", verified="wrong on purpose", dtypes=DTYPES)
    backend.implements(mutant.op)(mutant.kernel)
    order = [s.id for s in mutant.op.samples()]

    def place(case: Case) -> tuple[bool, int]:
        """Sample by sample, indexes out of range after them, the large shapes last."""
        return case.sample.real, len(order) if case.raises else order.index(case.sample.id)

    for case in sorted(select(backend, op=mutant.op.name), key=place):
        result = run_case(case, backend)
        if result.outcome == "fail":
            return Trial(mutant, case.id, result.reason)
    return Trial(mutant, "", "")
