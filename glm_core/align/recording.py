"""Records a trace of a candidate: its own training run, and its results for the inputs captured
from the reference."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_core.align import teacher_forcing
from glm_core.align.calibration import (
    Calibration,
    calibrate,
    loss_scales,
)
from glm_core.align.carried import Carried
from glm_core.align.choices import Figures
from glm_core.align.controls import MakeSampler, Progress
from glm_core.align.gradients import (
    NUM_SKETCH,
    Sketches,
    gradient_errors,
    sketch,
)
from glm_core.align.machine import machine_facts
from glm_core.align.replay import Results, replay_on
from glm_core.align.teacher_forcing import Case
from glm_core.align.trace import Trace
from glm_core.align.trace_format import FallbackCount, OpResult, fallback_counts
from glm_core.align.training import Curve, Run, free_run, weights_hash
from glm_core.align.watched_run import Watch
from glm_core.align.worst_tests import fair_tests, op_result
from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.config import RunConfig, to_dict
from glm_core.diagnose import device_errors
from glm_core.errors import TraceError
from glm_core.training.parallel import initial_weights, require_exact

Array = NDArray[np.float64]


def record(
    config: RunConfig,
    backend: str | Backend,
    *,
    calibration: Calibration | None = None,
    sampler: MakeSampler | None = None,
    controls: int = 0,
    capture_steps: Sequence[int] | None = None,
    free_run: bool = True,
    teacher_forcing: bool = True,
    cache_dir: str = ".cache",
    progress: Progress | None = None,
) -> Trace:
    """Returns the trace of `config` on `backend`: a free training run (`free_run`), and the
    backend's results for the inputs captured from the reference (`teacher_forcing`). Without a
    calibration the reference runs first, on this machine's CPU; for `backend="reference"` its trace
    is the result. The config may differ from the calibration's in micro_batch, backend and strict
    only. Raises TraceError where it differs in more."""
    chosen = registry.usable(backend) if isinstance(backend, str) else backend
    registry.require_dtype(chosen, config.train.dtype)
    if chosen.name != "reference":
        require_exact(config, chosen)
    cal = calibration or calibrate(
        config,
        sampler=sampler,
        controls=controls,
        capture_steps=capture_steps,
        cache_dir=cache_dir,
        progress=progress,
    )
    if calibration is None and backend == "reference":
        return cal.reference
    _require_same(cal.config, config)
    begin = time.perf_counter()
    report = progress or (lambda what, done, of: None)
    watch = Watch(cal.limits, cal.dtype, config.train.steps) if teacher_forcing else None
    carried = Carried()
    with device_errors.explained(chosen.name, "record"):
        curve = _curve(cal, config, chosen, report, watch, carried) if free_run else None
        fields = _teacher_fields if teacher_forcing else _no_teacher_fields
        taught, replay_fallbacks = fields(cal, config, chosen)
    if watch:
        taught = watch.added_to(taught)
    taught = carried.added_to(taught)
    captured = len(taught["capture_steps"])
    report(f"{chosen.name}, op by op", captured, captured)
    weights = initial_weights(config)
    return Trace(
        config=to_dict(config),
        backend=chosen.name,
        dtype=config.train.dtype,
        loss=curve.loss if curve else np.zeros(0),
        grad_norm=curve.grad_norm if curve else np.zeros(0),
        control_names=[],
        control_loss=np.zeros((0, curve.loss.size if curve else 0)),
        **(loss_scales(config, curve) if curve else {}),
        parameters=cal.reference.parameters,
        disguises=cal.reference.disguises,
        fallbacks=curve.fallbacks if curve else replay_fallbacks,
        environment=machine_facts(chosen),
        data_order=curve.data_order if curve else cal.reference.data_order,
        initial_weights=weights_hash(weights),
        seconds=time.perf_counter() - begin,
        **taught,
    )


def _require_same(calibrated: RunConfig, candidate: RunConfig) -> None:
    ours, theirs = to_dict(calibrated), to_dict(candidate)
    for free in ("micro_batch", "backend", "strict"):
        del ours["train"][free], theirs["train"][free]
    if ours != theirs:
        raise TraceError(
            "record: the config differs from the calibration's in more than micro_batch, backend "
            "and strict; calibrate with this config"
        )


def _curve(
    cal: Calibration,
    config: RunConfig,
    backend: Backend,
    report: Progress,
    watch: Watch | None,
    carried: Carried,
) -> Curve:
    run, steps = Run(config, cal.sampler(), backend), config.train.steps
    with carried.watching(run.optimizer):
        return free_run(run, (), lambda s: report(backend.name, s, steps), watch=watch)


Fields = tuple[dict[str, Any], list[FallbackCount]]
"""the trace's fields that teacher forcing fills, and what fell back during it"""


def _no_teacher_fields(cal: Calibration, config: RunConfig, backend: Backend) -> Fields:
    p, j = len(cal.reference.parameters), 1 + len(cal.reference.disguises)
    fields = {
        "capture_steps": [],
        "gradient_norm": np.zeros((0, p)),
        "gradient_sketch": np.zeros((0, p, NUM_SKETCH)),
        "loss_error": np.zeros((j, 0)),
        "gradient_error": np.zeros((j, 0, p)),
        "calls": [],
        "digest": np.zeros((0, NUM_SKETCH)),
        "tests": [],
        "test_values": np.zeros((0, 3)),
        "num_tests": 0,
    }
    return fields, []


def _teacher_fields(cal: Calibration, config: RunConfig, backend: Backend) -> Fields:
    run = Run(config, cal.sampler(), backend)
    reference, routing = cal.reference, Figures()
    sketches = Sketches(reference.parameters)
    own = gradient_errors(run, cal.snapshots, cal.oracle, sketches)
    with registry.use(run.backend, exact=run.config.train.exact) as session:
        measured, results = teacher_forcing.measure(
            cal.cases, lambda call: routing.seen(call, replay_on(call, run.backend)), twice=True
        )
    tests, test_values = fair_tests(measured, cal.cases, cal.limits)
    calls, digest = digests(cal.cases, results)
    fields = {
        "capture_steps": reference.capture_steps,
        **sketches.fields(),
        "loss_error": np.concatenate((own.loss[None], reference.loss_error[1:])),
        "gradient_error": np.concatenate((own.gradient[None], reference.gradient_error[1:])),
        "moved_tokens": np.concatenate((own.moved[None], reference.moved_tokens[1:])),
        "routing": list(routing.rows.values()),
        "calls": calls,
        "digest": digest,
        "tests": tests,
        "test_values": test_values,
        "num_tests": measured.count(),
    }
    return fields, fallback_counts(session.fallbacks)


def digests(cases: list[Case], results: list[Results | None]) -> tuple[list[OpResult], Array]:
    """Returns every op result's name and its sketch [C, NUM_SKETCH]."""
    names, sketches = [], []
    for case, of_case in zip(cases, results, strict=True):
        for tensor, y in (of_case or {}).items():
            names.append(op_result(case, tensor))
            sketches.append(sketch(y))
    return names, np.array(sketches).reshape(-1, NUM_SKETCH)
