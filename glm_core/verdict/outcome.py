"""Runs what one `glm-core verdict` asks for: the script, perhaps again in a context, perhaps
control runs, and returns all verdicts on it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glm_core.align import MIN_CONTROLS
from glm_core.errors import ConfigError, GlmCoreError
from glm_core.verdict import comparison, header, report, script
from glm_core.verdict.comparison import Comparison
from glm_core.verdict.envelope import CurveVerdict, judge_curve, why_not
from glm_core.verdict.report import Report
from glm_core.verdict.script import Request

RANK = "{rank}"
"""stands for the rank's number in the names of records"""


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """All verdicts of one command."""

    report: Report
    """on the last run: in the context where there is one; without a script, the record's own"""
    plain: Report | None = None
    """on the run without the context"""
    comparison: Comparison | None = None
    curve: CurveVerdict | None = None
    alone: bool = False
    """a record was judged without a script"""
    elsewhere: bool = False
    """rank 0 of the job gives this verdict with those of the other ranks"""

    @property
    def ok(self) -> bool:
        """Says whether no verdict is guilty."""
        parts = (self.report, self.plain, self.comparison, self.curve)
        return all(part is None or part.ok for part in parts)

    def sentences(self) -> list[str]:
        """Returns each verdict in one sentence."""
        plain = [f"without the context: {self.plain.sentence()}"] if self.plain else []
        others = [p.sentence() for p in (self.comparison, self.curve) if p is not None]
        where = "there: " if self.alone else ""
        return [*plain, where + self.report.sentence(), *others]

    def to_json(self) -> dict[str, Any]:
        """Returns plain values: those of the report, and `plain`, `comparison`, `curve` where there
        are any."""
        others = {"plain": self.plain, "comparison": self.comparison, "curve": self.curve}
        return self.report.to_json() | {n: x.to_json() for n, x in others.items() if x is not None}


def judge_all(request: Request, controls: int, say: Callable[[str], None]) -> Outcome:
    """Judges a script; the request's context is judged after a run without it. `say` gets each
    sentence as soon as it is known. Raises what `run_script` raises."""
    plain: dict[str, Any] = {}
    request = of_this_rank(request)
    if request.context and request.record:
        raise ConfigError("verdict: --with and --record; pass one: a record is of one run")
    _require_numbers(request, controls)
    if request.curve_steps and not (request.context or request.record):
        raise ConfigError(
            "verdict: --curve has no second curve to compare with; pass --with, or --record here "
            "and --against there"
        )
    if request.context and request.script:
        plain = script.run_script(dataclasses.replace(request, context="", record="", against=""))
        say(report.from_json(plain["report"]).sentence())
    last = script.run_script(request)
    own = report.from_json(last["report"])
    curve = None
    if request.curve_steps:
        curve = _with_controls(request, controls, plain, last, say)
    elif "recorded_curve" in last and request.against:
        curve = _against(last["recorded_curve"], last, request)
    return Outcome(
        own,
        report.from_json(plain["report"]) if plain else None,
        comparison.from_json(last["comparison"]) if "comparison" in last else None,
        curve,
        alone=not request.script,
        elsewhere=bool(last.get("elsewhere")),
    )


def _require_numbers(request: Request, controls: int) -> None:
    """Raises ConfigError for numbers that nothing can be judged with, before the script runs."""
    if not 0 < request.false_alarm_rate < 1:
        given = f"--false-alarm-rate {request.false_alarm_rate:g}"
        raise ConfigError(f"verdict: {given}; pass a probability between 0 and 1, such as 0.001")
    if request.curve_steps < 0:
        raise ConfigError(f"verdict: --curve {request.curve_steps}; pass a number of steps from 1")
    if request.curve_steps and controls < MIN_CONTROLS:
        raise ConfigError(
            f"verdict: --controls {controls}; the envelope needs at least {MIN_CONTROLS}"
        )


def of_this_rank(request: Request) -> Request:
    """Returns the request with the rank's number in the names of its records. Raises ConfigError
    where the ranks of a job would write the same file, or none knows which rank it is."""
    rank, in_job = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "1") != "1"
    if in_job and request.record and RANK not in request.record:
        raise ConfigError(
            f"verdict: --record {request.record}: every rank of this job would write it; put "
            f"{RANK} into its name"
        )
    if in_job and not request.script:
        raise ConfigError("verdict: --against without a script; start it alone, without a launcher")
    if not rank and RANK in request.record + request.against:
        raise ConfigError(
            f"verdict: {RANK} in a record's name, but RANK is not set; start it with torchrun"
        )
    return dataclasses.replace(
        request,
        record=request.record.replace(RANK, rank),
        against=request.against.replace(RANK, rank),
    )


def _against(recorded: dict[str, Any], last: dict[str, Any], request: Request) -> CurveVerdict:
    if not recorded:
        return CurveVerdict(missing="the record holds none; record with --curve STEPS")
    rate = request.false_alarm_rate / 3
    return judge_curve(recorded["reference"], recorded["controls"], last.get("curve", _NONE), rate)


_NONE: dict[str, Any] = {"loss": [], "weights": [], "gradients": []}


def _with_controls(
    request: Request,
    controls: int,
    plain: dict[str, Any],
    last: dict[str, Any],
    say: Callable[[str], None],
) -> CurveVerdict:
    """Makes the control runs of the reference: the plain run, or the one that is recorded."""
    reference = plain or last
    base = dataclasses.replace(request, record="", against="", unit=float(reference["unit"]))
    base = dataclasses.replace(base, context="") if plain else base
    say(report.from_json(last["report"]).sentence())
    curves: list[dict[str, Any]] = []
    first = reference.get("curve", _NONE)
    try:
        for number in range(1, controls + 1):
            run = script.run_script(dataclasses.replace(base, control=number))
            curves.append(run["curve"])
            say(f"control run {number} of {controls} is complete")
            in_job = "ranks" in run  # whose other ranks go on
            if not in_job and (reason := why_not(first, curves, first)):
                return CurveVerdict(missing=reason)  # the others would show the same
    except GlmCoreError as error:
        return CurveVerdict(missing=f"a control run gave no curve: {error}")
    if request.record:
        recorded = {"reference": first, "controls": curves}
        header.add(Path(request.record), "curve", json.dumps(recorded))
    if not plain:
        reason = why_not(first, curves, first)
        return CurveVerdict(missing=reason or "it is recorded here, and judged by --against")
    rate = request.false_alarm_rate / 2
    return judge_curve(first, curves, last.get("curve", _NONE), rate)
