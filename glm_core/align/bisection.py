"""Bisects a diverging run: names the guilty op with its direction, dtype, shape and layer, and the
command that reruns that single case."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

from glm_core.align import rerun_command, substitution, teacher_forcing
from glm_core.align.calibration import (
    calibrate,
    captured_steps,
    loss_scales,
    open_data,
    require_captured,
)
from glm_core.align.capture import Call
from glm_core.align.controls import MakeSampler, Progress
from glm_core.align.explanation import direction_of, finding_to_name
from glm_core.align.overflow import overflow_check
from glm_core.align.recording import record
from glm_core.align.replay import replay_on
from glm_core.align.rerun_command import CallFilter
from glm_core.align.substitution import OUTSIDE
from glm_core.align.teacher_forcing import Case, Key
from glm_core.align.training import Run, Snapshot, free_run
from glm_core.align.verdict import (
    FALSE_ALARM_RATE,
    NUM_TESTS,
    WATCHED,
    Finding,
    compare,
    findings,
    finite,
)
from glm_core.align.watched_run import Watch
from glm_core.align.worst_tests import fair_tests
from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.config import RunConfig
from glm_core.errors import ConfigError, DeviceError, unknown
from glm_core.ops import all_ops

RATE = (1 - WATCHED) * FALSE_ALARM_RATE / NUM_TESTS
"""the share of the verdict's false-alarm rate that is for captured calls"""
NOTHING = "nothing guilty: every op call and the whole run are within what honest rounding explains"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Bisection:
    """The guilty op and where it was caught, or that nothing is guilty."""

    backend: str
    op: str = ""
    """empty where nothing is guilty; `outside ops: ...` where every op call is right"""
    direction: str = ""
    """forward, backward or optimizer"""
    dtype: str = ""
    shape: list[int] = dataclasses.field(default_factory=list)
    """of the wrong result"""
    layer: str = ""
    """number of the block; empty outside of blocks, and where no single call shows it"""
    step: int = 0
    """captured step; 0 where no single call shows it"""
    finding: str = ""
    """what is wrong, in one line"""
    how: str = ""
    """how it was caught: `op by op`, `by its error`, `by substitution in a whole step` or
    `in its own run`"""
    kernel: str = ""
    """what computed it: the backend's kernel, or the op's reference on the backend's device"""
    others: list[str] = dataclasses.field(default_factory=list)
    """the other guilty ops and directions, the furthest outside first"""
    substitution: dict[str, float] = dataclasses.field(default_factory=dict)
    """largest relative difference between a parameter's gradient and the reference's in a whole
    step: of the `candidate`, and with the guilty op `substituted` by its reference; empty for the
    optimizer"""
    rerun: str = ""
    """the command that reruns this single case"""
    note: str = ""
    """what the command cannot show"""
    seconds: float = 0.0

    @property
    def guilty(self) -> bool:
        """Is anything named?"""
        return bool(self.op)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        plain = dataclasses.asdict(self)
        plain["substitution"] = {k: finite(v) for k, v in self.substitution.items()}
        return plain

    def text(self) -> str:
        """Returns a few lines to read."""
        if not self.guilty:
            return f"{self.backend}: {self.finding or NOTHING} ({self.seconds:.0f} s)"
        shape = "x".join(map(str, self.shape)) or "scalar"
        where = f"layer {self.layer}" if self.layer else "no single layer"
        lines = [
            f"guilty: {' '.join(filter(None, (self.op, self.direction)))}, {self.dtype} [{shape}], "
            f"{where} ({self.kernel or 'outside ops'}; {self.how}, {self.seconds:.0f} s)",
            f"  {self.finding}",
        ]
        if self.substitution:
            a, b = self.substitution["candidate"], self.substitution["substituted"]
            lines.append(
                f"  a whole step's gradients are off by {a:.1e}; with the op's reference by {b:.1e}"
            )
        lines += [f"  also guilty: {', '.join(self.others)}"] if self.others else []
        lines += [f"  rerun: {self.rerun}"] if self.rerun else []
        return "\n".join([*lines, *([f"  {self.note}"] if self.note else [])])


@dataclasses.dataclass(slots=True, eq=False)
class Evidence:
    """The reference's captured steps, and each op call with its correct results and benign
    range."""

    snapshots: list[Snapshot]
    cases: list[Case]
    limits: dict[Key, float]

    def judge(self, backend: Backend, only: CallFilter = rerun_command.ANY_CALL) -> list[Finding]:
        """Replays these calls on the backend and tests the results, the furthest outside first."""
        cases = [c for c in self.cases if only.fits(c.call)]
        with registry.use(backend):
            measured, _ = teacher_forcing.measure(
                cases, functools.partial(replay_on, backend=backend), twice=True
            )
        tested = findings(*fair_tests(measured, cases, self.limits), measured.count(), RATE)
        return [f for f in tested if only.direction in ("", direction_of(f))]


def bisect(
    config: RunConfig,
    backend: str | Backend,
    *,
    only: CallFilter = rerun_command.ANY_CALL,
    evidence: Evidence | None = None,
    sampler: MakeSampler | None = None,
    capture_steps: Sequence[int] | None = None,
    cache_dir: str = ".cache",
    options: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Bisection:
    """Names the op that makes `backend` deviate from the reference in `config`. First every
    captured op call is judged by itself. Where all are right, the backend trains once more and
    every op call is judged as it happens. Where those are right too but the gradients are not, ops
    are replaced by their references in a whole step, one by one. `only` restricts the search to
    these captured calls. `options` are the command-line options that describe the run in the rerun
    command (default: every field that is not at its default). Raises BackendUnavailableError, and
    ConfigError for an unknown op or a filter that no captured call matches."""
    if only.op and only.op not in all_ops():
        raise ConfigError(unknown("op", only.op, all_ops()))
    begin, report = time.perf_counter(), progress or (lambda what, done, of: None)
    chosen = registry.usable(backend) if isinstance(backend, str) else backend
    registry.require_dtype(chosen, config.train.dtype)
    if config.train.exact:
        raise ConfigError(
            "align bisect: train.exact=true: single calls are judged in fast arithmetic; leave "
            "train.exact out"
        )
    make = sampler or open_data(config, cache_dir)
    steps = captured_steps(config, capture_steps)
    if only.step > config.train.steps:  # any other may be captured, in place of one that overflows
        total = config.train.steps
        raise ConfigError(
            f"align bisect: --step {only.step}: the run has {total}; choose one of {steps}"
        )
    evidence = evidence or gather(config, make, steps, only, report)
    command = rerun_command.command(config, chosen.name, options)
    try:
        report(f"{chosen.name}, op by op", 0, 1)
        guilty = [f for f in evidence.judge(chosen, only) if f.ratio > 1]
        report(f"{chosen.name}, op by op", 1, 1)
        if guilty:
            result = _op_by_op(guilty, evidence, chosen, command, config, make)
        elif only != rerun_command.ANY_CALL:
            result = Bisection(backend=chosen.name, finding=f"nothing guilty in {only}")
        else:
            result = _whole_run(config, chosen, evidence, make, command, report)
    except DeviceError as error:
        result = _by_its_error(error, chosen, command)
    return dataclasses.replace(result, seconds=time.perf_counter() - begin)


def gather(
    config: RunConfig, make: MakeSampler, steps: tuple[int, ...], only: CallFilter, report: Progress
) -> Evidence:
    """Trains the reference to the last captured step and returns what was captured. Raises
    ConfigError where no captured call fits the filter."""
    last = only.step or max(steps)
    run = Run(config, make(), "reference")
    curve = free_run(run, steps, lambda s: report("reference", s, last), last)
    require_captured(curve, config)
    calls = [c for c in curve.calls if only.fits(c)]
    if not calls:
        raise ConfigError(f"align bisect: no captured call fits {only}; {_choices(curve.calls)}")
    cases = list(teacher_forcing.cases(calls))
    return Evidence(curve.snapshots, cases, teacher_forcing.benign_limits(cases, run.dtype))


def _choices(calls: list[Call]) -> str:
    ops, steps = sorted({c.op.name for c in calls}), sorted({c.step for c in calls})
    return f"captured steps are {steps}, ops {', '.join(ops)}"


def _op_by_op(
    guilty: list[Finding],
    evidence: Evidence,
    backend: Backend,
    command: list[str],
    config: RunConfig,
    make: MakeSampler,
) -> Bisection:
    """Names the op that the captured calls convict, and confirms it by substitution."""
    worst = finding_to_name(guilty)
    op, direction = worst.op, direction_of(worst)
    others = dict.fromkeys(f"{f.op} {direction_of(f)}" for f in guilty)
    del others[f"{op} {direction}"]
    again = rerun_command.find(
        backend, worst, direction, config.train.dtype, evidence.judge, command
    )
    return Bisection(
        **_place(worst, evidence.cases),
        backend=backend.name,
        how="op by op",
        kernel=_computed_by(backend, op),
        others=list(others),
        rerun=again.command,
        note=again.note,
        substitution={}
        if direction == "optimizer"
        else substitution.confirm(config, make, backend, evidence.snapshots, op, direction),
    )


def _place(worst: Finding, cases: list[Case]) -> dict[str, Any]:
    """Returns op, direction, dtype, shape, layer, step and the finding in words. The change made by
    an update is kept in float64; the dtype named is that of the tensors it updates."""
    direction, dtype = direction_of(worst), worst.dtype
    if worst.tensor == "change":
        call = next(c.call for c in cases if c.call.op.name == worst.op)
        dtype = call.place(direction)["dtype"]
    finding = dataclasses.replace(worst, direction=direction, dtype=dtype)
    return {
        "op": worst.op,
        "direction": direction,
        "dtype": dtype,
        "shape": worst.shape,
        "layer": worst.layer,
        "step": worst.step,
        "finding": str(finding),
    }


def _computed_by(backend: Backend, op: str) -> str:
    by = f"{backend.name}'s kernel" if op in backend.kernels else "its reference on the device"
    return by if op in all_ops() else ""


def _by_its_error(error: DeviceError, backend: Backend, command: list[str]) -> Bisection:
    """Names the call in which the device failed, where it is known."""
    place = {"op": "outside ops: the device gave up", **error.place}
    place.pop("call", None)
    fields = [f.name for f in dataclasses.fields(CallFilter)]
    only = CallFilter(**{k: place[k] for k in fields if k in place})
    return Bisection(
        **place,
        backend=backend.name,
        finding=str(error),
        how="by its error",
        kernel=_computed_by(backend, place["op"]),
        rerun=rerun_command.join(command, only),
    )


def _whole_run(
    config: RunConfig,
    backend: Backend,
    evidence: Evidence,
    make: MakeSampler,
    command: list[str],
    report: Progress,
) -> Bisection:
    """Searches further where every captured op call is right by itself: in the calls of the
    backend's own run, then in a whole step, then in the curve."""
    again = rerun_command.join(command, rerun_command.ANY_CALL)
    run, total = Run(config, make(), backend), config.train.steps
    seen = Watch(evidence.limits, run.dtype, total, stop=True)
    what = f"{backend.name}, call by call"
    curve = free_run(run, (), lambda step: report(what, step, total), watch=seen)
    if seen.guilty:
        return _once(finding_to_name(seen.guilty), evidence, backend, again)
    steps = [s.step for s in evidence.snapshots]
    full = calibrate(config, sampler=make, capture_steps=steps, judges_ops=False, progress=report)
    full = dataclasses.replace(full, cases=evidence.cases, limits=evidence.limits)
    taught = record(config, backend, calibration=full, free_run=False)
    fields = {"loss": curve.loss, "grad_norm": curve.grad_norm}
    fields |= {"control_loss": curve.loss[None][:0], **loss_scales(config, curve)}
    trace = dataclasses.replace(taught, **fields)
    pair = compare(full.reference, trace)
    if pair.verdict == "aligned":
        return Bisection(backend=backend.name)
    if pair.findings:
        return _once(finding_to_name(pair.findings), evidence, backend, again)
    common: dict[str, Any] = {
        "backend": backend.name,
        "dtype": config.train.dtype,
        "rerun": again,
        "finding": pair.reasons[0],
    }
    if pair.max_gradient_ratio > 1:
        place = substitution.search(full, taught, backend, report)
        how = "by substitution in a whole step"
        kernel = _computed_by(backend, place["op"])
        note = "each captured call is right by itself: only the whole step shows it"
        return Bisection(**common, **place, how=how, kernel=kernel, note=note)
    if seen.saturated and overflow_check(full.reference, trace)[0] > 1:
        call, direction = seen.saturated
        place = {k: v for k, v in call.place(direction).items() if k not in ("call", "dtype")}
        kernel = _computed_by(backend, call.op.name)
        how, note = "in its own run", "its result should be infinite there, and is a number"
        return Bisection(**common, **place, how=how, kernel=kernel, note=note)
    right = f"outside ops: every op call of the run is right; {OUTSIDE}"
    return Bisection(**common, op=right, how="in its own run")


def _once(worst: Finding, evidence: Evidence, backend: Backend, again: str) -> Bisection:
    place = _place(worst, evidence.cases)
    return Bisection(
        **place,
        backend=backend.name,
        how="in its own run",
        kernel=_computed_by(backend, worst.op),
        rerun=again,
        note=ONCE,
    )


ONCE = "the captured calls are right: the fault happened once, or it needs the calls before it"
