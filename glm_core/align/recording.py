"""A candidate's run and its answers to the reference's inputs, as a trace."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_core.align import statistics, teacher_forcing
from glm_core.align.calibration import (
    Calibration,
    MakeSampler,
    Progress,
    calibrate,
)
from glm_core.align.gradients import (
    NUM_SKETCH,
    gradient_errors,
    gradient_norms_and_sketches,
    sketch,
)
from glm_core.align.machine import machine_facts
from glm_core.align.replay import Results, replay_on
from glm_core.align.teacher_forcing import Case, Key, Measures
from glm_core.align.trace import Trace
from glm_core.align.training import Curve, Run, free_run, weights_hash
from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.config import RunConfig, to_dict
from glm_core.diagnose import device_errors
from glm_core.errors import TraceError
from glm_core.training.trainer import initial_weights

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
    chosen = registry.usable(backend) if isinstance(backend, str) else backend
    with device_errors.explained(chosen.name, "record"):
        curve = _curve(cal, config, backend, progress) if free_run else None
        facts = _taught(cal, config, backend) if teacher_forcing else _untaught(cal)
    weights = initial_weights(config)
    return Trace(
        config=to_dict(config),
        backend=chosen.name,
        dtype=config.train.dtype,
        loss=curve.loss if curve else np.zeros(0),
        grad_norm=curve.grad_norm if curve else np.zeros(0),
        control_names=[],
        control_loss=np.zeros((0, curve.loss.size if curve else 0)),
        parameters=cal.reference.parameters,
        disguises=cal.reference.disguises,
        fallbacks=_fallbacks(facts.pop("fallbacks"), curve),
        environment=machine_facts(chosen),
        data_order=curve.data_order if curve else cal.reference.data_order,
        initial_weights=weights_hash(weights),
        seconds=time.perf_counter() - begin,
        **facts,
    )


def _require_same(known: RunConfig, given: RunConfig) -> None:
    mine, other = to_dict(known), to_dict(given)
    for free in ("micro_batch", "backend", "strict"):
        del mine["train"][free], other["train"][free]
    if mine != other:
        raise TraceError(
            "record: the config differs from the calibration's in more than micro_batch, backend "
            "and strict; calibrate with this config"
        )


def _curve(
    cal: Calibration, config: RunConfig, backend: str | Backend, progress: Progress | None
) -> Curve:
    run = Run(config, cal.sampler(), backend)
    steps = config.train.steps
    return free_run(run, (), lambda s: progress(run.backend.name, s, steps) if progress else None)


def _fallbacks(taught: list[dict[str, Any]], curve: Curve | None) -> list[dict[str, Any]]:
    """Those of the free run, or where there was none, of the replays."""
    return curve.fallbacks if curve else taught


def _untaught(cal: Calibration) -> dict[str, Any]:
    p, j = len(cal.reference.parameters), 1 + len(cal.reference.disguises)
    return {
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
        "fallbacks": [],
    }


def _taught(cal: Calibration, config: RunConfig, backend: str | Backend) -> dict[str, Any]:
    """The trace's teacher forcing fields."""
    run = Run(config, cal.sampler(), backend)
    loss_error, gradient_error = gradient_errors(run, cal.snapshots, cal.oracle)
    known = cal.reference
    with registry.use(run.backend) as session:
        measured, results = teacher_forcing.measure(
            cal.cases, functools.partial(replay_on, backend=run.backend), twice=True
        )
    rows, values = tests(measured, cal.cases, cal.limits)
    calls, digest = digests(cal.cases, results)
    counts = session.fallbacks
    return {
        "capture_steps": known.capture_steps,
        **gradient_norms_and_sketches(run, cal.snapshots, known.parameters),
        "loss_error": np.concatenate((loss_error[None], known.loss_error[1:])),
        "gradient_error": np.concatenate((gradient_error[None], known.gradient_error[1:])),
        "calls": calls,
        "digest": digest,
        "tests": rows,
        "test_values": values,
        "num_tests": measured.count(),
        "fallbacks": [{"op": f.op, "reason": f.reason, "count": n} for f, n in counts.items()],
    }


def digests(cases: list[Case], results: list[Results | None]) -> tuple[list[dict[str, Any]], Array]:
    """A sketch of every result."""
    calls, rows = [], []
    for case, found in zip(cases, results, strict=True):
        for name, y in (found or {}).items():
            calls.append(place(case, name))
            rows.append(sketch(y))
    return calls, np.array(rows).reshape(-1, NUM_SKETCH)


def place(case: Case, name: str) -> dict[str, Any]:
    """Which result of which call."""
    call = case.call
    direction = "backward" if name.startswith("d_") else "forward"
    return {
        "step": call.step,
        "call": call.index,
        "op": call.op.name,
        "layer": call.layer,
        "direction": direction,
        "tensor": name,
    }


def tests(
    measured: Measures, cases: list[Case], limits: dict[Key, float]
) -> tuple[list[dict[str, Any]], Array]:
    """Of each family of tests the one furthest outside its benign range."""
    z = statistics.critical_z(1e-3, 1_000_000)
    worst: dict[teacher_forcing.Key, tuple[float, dict[str, Any], list[float]]] = {}
    by_result = {(c.call.op.name, name): c for c in cases for name in c.dtypes}
    for key, effect, error, case in measured.by_kind():
        like = case or by_result[key[:2]]
        dtype, terms = like.dtypes[key[1]], like.terms
        limit = teacher_forcing.limit(limits, key, dtype, terms)
        outside = statistics.excess(effect, error, limit, z)
        at = int(np.argmax(outside))
        if key in worst and worst[key][0] >= outside[at]:
            continue
        row = place(like, key[1]) if case else {**place(like, key[1]), "step": 0, "call": -1}
        row |= {
            "layer": row["layer"] if case else "",
            "dtype": str(dtype).removeprefix("torch."),
            "shape": list(like.shapes[key[1]]),
            "projection": _projection(key, at),
        }
        worst[key] = (float(outside[at]), row, [float(effect[at]), float(error[at]), limit])
    rows = [row for _, row, _ in worst.values()]
    return rows, np.array([v for _, _, v in worst.values()]).reshape(-1, 3)


def _projection(key: teacher_forcing.Key, group: int) -> str:
    """`scale`, `offset in row 7`, `sign in bin of half 1 12, all calls`."""
    _, _, grouping, kind, pooled = key
    where = "" if grouping == "all" else f" in {grouping} {group}"
    return kind + where + (", all calls" if pooled else "")
