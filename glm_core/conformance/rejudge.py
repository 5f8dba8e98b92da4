"""Judges the recorded cases of a witness file by today's rules, without the device that gave
them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from glm_core.backends.registry import usable
from glm_core.conformance.case import Case, CaseFailure, every_case, matches, without
from glm_core.conformance.check import check_names, check_tensor, compare
from glm_core.conformance.known_failures import known_for, load
from glm_core.conformance.oracle import Results, oracle
from glm_core.conformance.report import Report, Result
from glm_core.conformance.run import Outcome, Progress, as_known, outcome_of
from glm_core.conformance.witness import Witness, inputs_hash
from glm_core.errors import GlmCoreError

GONE = "not judged: this glm_core has no such case"
OTHER_INPUTS = (
    "not judged: its inputs are others here (the sample was changed, or this CPU rounds random "
    "draws differently; see docs/witness.md)"
)


def rejudge(
    witness: Witness,
    file: Path | str,
    *,
    mode: Sequence[str] = ("test", "grad"),
    op: str | None = None,
    id: str | None = None,
    skip: Sequence[str] = (),
    known_failures: Path | str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Returns the report on the witness's cases that match every filter: as `run` would give it on
    the device. `file` is named in the commands that judge a failed case again. A case that the
    project no longer has, or whose inputs it has changed, is not judged and counts as unsupported.
    Raises GlmCoreError where nothing matches."""
    cases, entries = {c.id: c for c in every_case(usable("reference"))}, load(known_failures)
    recorded: dict[str, Results | str] = {**witness.unsupported, **witness.cases()}
    wanted = without([i for i in recorded if matches(i, mode, op, id)], skip)
    if not wanted:
        raise GlmCoreError(
            f"witness {file}: none of its {len(recorded)} cases matches; leave out --id, --op or "
            "--mode"
        )
    results = []
    for number, name in enumerate(wanted):
        if progress is not None:
            progress(number, len(wanted), name)
        start, entry = time.perf_counter(), known_for(name, entries)
        outcome = _outcome(cases.get(name), recorded[name], witness.inputs.get(name))
        judged = outcome[0] != "unsupported"
        label, ratio, reason, _ = as_known(outcome, entry) if entry and judged else outcome
        results.append(
            Result(
                id=name,
                backend=witness.backend,
                outcome=label,
                error_ratio=ratio,
                reason=reason,
                seconds=time.perf_counter() - start,
                witness=str(file),
            )
        )
    if progress is not None:
        progress(len(wanted), len(wanted), "")
    return Report(witness.backend, results, witness.environment, tuple(skip))


def _outcome(case: Case | None, recorded: Results | str, inputs: str | None) -> Outcome:
    if isinstance(recorded, str):
        return "unsupported", None, recorded, {}
    if case is None:
        return "unsupported", None, GONE, {}
    if inputs != inputs_hash(case):
        return "unsupported", None, OTHER_INPUTS, {}
    expected = {name: allowed.plain for name, allowed in oracle(case).items()}
    try:
        check_names(expected, recorded)
        for name, got in recorded.items():
            check_tensor(name, expected[name], got)
        return outcome_of(compare(case, recorded))
    except CaseFailure as failure:
        return "fail", None, str(failure), {}
