"""Which op is guilty: named with direction, dtype, shape and layer, and with the command that
reruns that single case."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from glm_core.align import rerun_command, substitution, teacher_forcing, watched_run
from glm_core.align.calibration import MakeSampler, Progress, calibrate, captured_steps, open_data
from glm_core.align.capture import Call
from glm_core.align.recording import record, tests
from glm_core.align.replay import replay_on
from glm_core.align.rerun_command import CallFilter
from glm_core.align.teacher_forcing import Case, Key
from glm_core.align.training import Run, Snapshot, free_run
from glm_core.align.verdict import Finding, compare, findings, finite
from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.config import RunConfig
from glm_core.errors import ConfigError, DeviceError, unknown
from glm_core.ops import all_ops

RATE = 1e-3 / 3
"""the share of the verdict's false-alarm rate that the op by op tests have there"""
NOTHING = "nothing guilty: every op call and the whole run are within what honest rounding explains"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Bisection:
    """What is guilty, or that nothing is."""

    backend: str
    op: str = ""
    """empty: nothing is guilty; `outside ops: ...` where every op call is right"""
    direction: str = ""
    """forward, backward or optimizer"""
    dtype: str = ""
    shape: list[int] = dataclasses.field(default_factory=list)
    """of the result that is wrong"""
    layer: str = ""
    """number of the block; empty outside of blocks, and where it takes all calls to see it"""
    step: int = 0
    """captured step; 0 where it takes all calls to see it"""
    finding: str = ""
    """what is wrong, in one line"""
    how: str = ""
    """how it was found: `op by op`, `by its error`, `by substitution in a whole step` or
    `in its own run`"""
    kernel: str = ""
    """what ran: the backend's `kernel`, or the op's `reference` on its device"""
    others: list[str] = dataclasses.field(default_factory=list)
    """further ops and directions that are outside, the furthest first"""
    substitution: dict[str, float] = dataclasses.field(default_factory=dict)
    """largest relative difference of a parameter's gradient from the reference's in a whole step:
    `candidate`, and with the guilty op's reference `substituted`; empty for the optimizer"""
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
        """Plain values."""
        plain = dataclasses.asdict(self)
        plain["substitution"] = {k: finite(v) for k, v in self.substitution.items()}
        return plain

    def text(self) -> str:
        """For reading."""
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
            lines.append(f"  a whole step's gradients: off by {a:.1e}; with its reference {b:.1e}")
        lines += [f"  also outside: {', '.join(self.others)}"] if self.others else []
        lines += [f"  rerun: {self.rerun}"] if self.rerun else []
        return "\n".join([*lines, *([f"  {self.note}"] if self.note else [])])


@dataclasses.dataclass(slots=True, eq=False)
class Evidence:
    """The reference's captured steps, and what each op call should give."""

    snapshots: list[Snapshot]
    cases: list[Case]
    limits: dict[Key, float]

    def judged(self, backend: Backend, only: CallFilter = rerun_command.ANY_CALL) -> list[Finding]:
        """What the backend's answers to these calls show, the furthest outside first."""
        cases = [c for c in self.cases if only.fits(c.call)]
        with registry.use(backend):
            measured, _ = teacher_forcing.measure(
                cases, functools.partial(replay_on, backend=backend), twice=True
            )
        found = findings(*tests(measured, cases, self.limits), measured.count(), RATE)
        return [f for f in found if only.direction in ("", direction_of(f))]


def direction_of(finding: Finding) -> str:
    """`optimizer` for the ops of the update, whose results are not differentiated."""
    return finding.direction if all_ops()[finding.op].differentiable else "optimizer"


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
    """Names what makes `backend` deviate from the reference in `config`. First every op call of the
    captured steps is judged by itself; where all are right, ops are replaced by their references
    within a whole step, one by one; where that is right too, every op call of the backend's own run
    is judged as it happens. `only` judges these captured calls alone. `options` are the words
    that describe the run in the rerun command (default: every field that differs from the default).
    Raises BackendUnavailableError and ConfigError."""
    if only.op and only.op not in all_ops():
        raise ConfigError(unknown("op", only.op, all_ops()))
    begin, tell = time.perf_counter(), progress or (lambda what, done, of: None)
    chosen = registry.usable(backend) if isinstance(backend, str) else backend
    make = sampler or open_data(config, cache_dir)
    known = evidence or gather(config, make, captured_steps(config, capture_steps), only, tell)
    command = rerun_command.command(config, chosen.name, options)
    try:
        tell(f"{chosen.name}, op by op", 0, 1)
        found = [f for f in known.judged(chosen, only) if f.ratio > 1]
        tell(f"{chosen.name}, op by op", 1, 1)
        if found:
            result = named(found, known, chosen, command, config, make)
        elif only != rerun_command.ANY_CALL:
            result = Bisection(backend=chosen.name, finding=f"nothing guilty in {only}")
        else:
            result = _beyond(config, chosen, known, make, command, tell)
    except DeviceError as error:
        result = _broke(error, chosen, command)
    return dataclasses.replace(result, seconds=time.perf_counter() - begin)


def gather(
    config: RunConfig, make: MakeSampler, steps: tuple[int, ...], only: CallFilter, tell: Progress
) -> Evidence:
    """Trains the reference to the last captured step. Raises ConfigError where nothing fits."""
    last = only.step or max(steps)
    run = Run(config, make(), "reference")
    curve = free_run(run, steps, lambda s: tell("reference", s, last), last)
    calls = [c for c in curve.calls if only.fits(c)]
    if not calls:
        raise ConfigError(f"align bisect: no captured call fits {only}; {_there(curve.calls)}")
    cases = list(teacher_forcing.cases(calls))
    return Evidence(curve.snapshots, cases, teacher_forcing.benign_limits(cases, run.dtype))


def _there(calls: list[Call]) -> str:
    ops, steps = sorted({c.op.name for c in calls}), sorted({c.step for c in calls})
    return f"captured steps {steps}, ops {', '.join(ops)}"


def first(found: list[Finding]) -> Finding:
    """Of the op furthest outside: in its forward where that is outside at all, since a wrong
    forward spoils the backward too; there in a single call, else what all calls show together."""
    mine = [f for f in found if f.op == found[0].op]
    side = [f for f in mine if direction_of(f) != "backward"] or mine
    return next((f for f in side if f.call >= 0), side[0])


def named(
    found: list[Finding],
    known: Evidence,
    backend: Backend,
    command: list[str],
    config: RunConfig,
    make: MakeSampler,
) -> Bisection:
    """By what the captured calls show."""
    worst = first(found)
    op, direction = worst.op, direction_of(worst)
    places = dict.fromkeys(f"{f.op} {direction_of(f)}" for f in found)
    del places[f"{op} {direction}"]
    again = rerun_command.find(backend, worst, direction, config.train.dtype, known.judged, command)
    return Bisection(
        **_place(worst, known.cases),
        backend=backend.name,
        how="op by op",
        kernel=_ran(backend, op),
        others=list(places),
        rerun=again.command,
        note=again.note,
        substitution={}
        if direction == "optimizer"
        else substitution.confirm(config, make, backend, known.snapshots, op, direction),
    )


def _place(worst: Finding, cases: list[Case]) -> dict[str, Any]:
    """Op, direction, dtype, shape, layer, step and words. What an update changed is kept in
    float64; the dtype is that of the tensors it updates."""
    direction, dtype = direction_of(worst), worst.dtype
    if worst.tensor == "change":
        call = next(c.call for c in cases if c.call.op.name == worst.op)
        dtype = call.place(direction)["dtype"]
    told = dataclasses.replace(worst, direction=direction, dtype=dtype)
    return {
        "op": worst.op,
        "direction": direction,
        "dtype": dtype,
        "shape": worst.shape,
        "layer": worst.layer,
        "step": worst.step,
        "finding": str(told),
    }


def _ran(backend: Backend, op: str) -> str:
    if op not in all_ops():
        return ""
    return f"{backend.name}'s kernel" if op in backend.kernels else "its reference on the device"


def _broke(error: DeviceError, backend: Backend, command: list[str]) -> Bisection:
    """The call in which the device gave up, where it is known."""
    place = {"op": "outside ops: the device gave up", **error.place}
    place.pop("call", None)
    only = CallFilter(**{k: place[k] for k in _NARROW if k in place})
    return Bisection(
        **place,
        backend=backend.name,
        finding=str(error),
        how="by its error",
        kernel=_ran(backend, place["op"]),
        rerun=rerun_command.join(command, only),
    )


_NARROW = ("op", "direction", "layer", "step")


def _beyond(
    config: RunConfig,
    backend: Backend,
    known: Evidence,
    make: MakeSampler,
    command: list[str],
    tell: Progress,
) -> Bisection:
    """Every captured op call is right by itself: is one in the backend's own run wrong, the whole
    step, or the curve?"""
    again = rerun_command.join(command, rerun_command.ANY_CALL)
    found, losses = watched_run.watch(config, backend, make, known.limits, tell)
    if found:
        return _once(first(found), known, backend, again)
    steps = [m.step for m in known.snapshots]
    full = calibrate(config, sampler=make, capture_steps=steps, progress=tell)
    taught = record(config, backend, calibration=full, free_run=False)
    none = np.zeros((0, losses.size))
    trace = dataclasses.replace(taught, loss=losses, grad_norm=losses, control_loss=none)
    pair = compare(full.reference, trace)
    if pair.verdict == "aligned":
        return Bisection(backend=backend.name)
    if pair.findings:
        return _once(first(pair.findings), known, backend, again)
    common: dict[str, Any] = {
        "backend": backend.name,
        "dtype": config.train.dtype,
        "rerun": again,
        "finding": pair.reasons[0],
    }
    if pair.max_gradient_ratio > 1:
        place = substitution.search(full, taught, backend, tell)
        how = "by substitution in a whole step"
        note = "each captured call is right by itself: only the whole step shows it"
        return Bisection(**common, **place, how=how, kernel=_ran(backend, place["op"]), note=note)
    right = "outside ops: every op call of the run is right"
    return Bisection(**common, op=right, how="in its own run")


def _once(worst: Finding, known: Evidence, backend: Backend, again: str) -> Bisection:
    place = _place(worst, known.cases)
    return Bisection(
        **place,
        backend=backend.name,
        how="in its own run",
        kernel=_ran(backend, worst.op),
        rerun=again,
        note=ONCE,
    )


ONCE = "the captured calls are right: it happened once, or it needs the calls before it"
