"""Computes once what every comparison of a config and a dtype needs, whatever the candidate: the
reference's run, its controls, the captured steps, the float64 oracle and the benign ranges."""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from glm_core.align import MIN_CONTROLS, NUM_CONTROLS, teacher_forcing
from glm_core.align.disguise import Regrouped, Rounded
from glm_core.align.gradients import (
    NUM_SKETCH,
    GradientErrors,
    Oracle,
    Sketches,
    exact_gradients,
    gradient_errors,
)
from glm_core.align.machine import machine_facts
from glm_core.align.replay import LOW
from glm_core.align.teacher_forcing import Case, Key
from glm_core.align.trace import Trace
from glm_core.align.training import Curve, Mode, Run, Snapshot, free_run, moved, weights_hash
from glm_core.backends import registry
from glm_core.config import RunConfig, to_dict
from glm_core.errors import ConfigError, TraceError
from glm_core.training.batches import Sampler
from glm_core.training.parallel import initial_weights

Array = NDArray[np.float64]
MakeSampler = Callable[[], Sampler]
Progress = Callable[[str, int, int], None]
"""called with what is being done, how many steps of it are done, and of how many"""
NUM_VARIED = 10
"""disguises that the bound on the gradients is computed from"""


@dataclasses.dataclass(slots=True, eq=False)
class Calibration:
    """The reference's side of every comparison."""

    config: RunConfig
    sampler: MakeSampler
    reference: Trace
    snapshots: list[Snapshot]
    """the captured steps"""
    oracle: list[Oracle]
    """per captured step: loss and gradients in float64"""
    cases: list[Case]
    """every op call of the captured steps with its correct results"""
    limits: dict[Key, float]
    """the benign range of each family of tests, without safety factor"""

    @property
    def dtype(self) -> torch.dtype:
        """Returns the working dtype."""
        return getattr(torch, self.config.train.dtype)


def calibrate(
    config: RunConfig,
    *,
    sampler: MakeSampler | None = None,
    controls: int = NUM_CONTROLS,
    capture_steps: Sequence[int] | None = None,
    cache_dir: str = ".cache",
    progress: Progress | None = None,
) -> Calibration:
    """Runs the reference on this machine's CPU and `controls` honest variations of it, captures
    `capture_steps` (default: an early, a middle and the last step) and compares them with float64.
    `sampler` makes a fresh sampler for each run; the default opens the config's data."""
    check_controls(controls)
    begin, report = time.perf_counter(), progress or (lambda what, done, of: None)
    make = sampler or open_data(config, cache_dir)
    steps = config.train.steps
    captured = captured_steps(config, capture_steps)
    weights = initial_weights(config)
    curve = free_run(
        Run(config, make(), "reference", weights), captured, lambda s: report("reference", s, steps)
    )
    if captured:
        require_captured(curve, config)
    controls_run = {}
    for k, (name, mode) in enumerate(control_modes(config, controls)):
        run = Run(config, make(), "reference", moved(weights, k), mode)
        step_done = functools.partial(_report_step, report, f"control {k + 1} of {controls}", steps)
        controls_run[f"{k}: {name}"] = free_run(run, (), step_done)
    oracle = [exact_gradients(config, snapshot) for snapshot in curve.snapshots]
    modes, rows, sketches = gradient_modes(config), [], Sketches(sorted(weights))
    for number, mode in enumerate(modes.values()):
        report("captured steps", number * len(captured), len(modes) * len(captured))
        run = Run(config, make(), "reference", None, mode)
        none = GradientErrors(np.zeros(0), np.zeros((0, len(weights))), np.zeros(0))
        kept = None if number else sketches  # the plain reference's
        rows.append(gradient_errors(run, curve.snapshots, oracle, kept) if captured else none)
    report("captured steps", len(modes) * len(captured), len(modes) * len(captured))
    items = list(teacher_forcing.cases(curve.calls))
    limits = teacher_forcing.benign_limits(items, getattr(torch, config.train.dtype))
    trace = Trace(
        config=to_dict(config),
        backend="reference",
        dtype=config.train.dtype,
        loss=curve.loss,
        grad_norm=curve.grad_norm,
        control_names=list(controls_run),
        control_loss=np.array([c.loss for c in controls_run.values()]).reshape(-1, steps),
        **loss_scales(config, curve, list(controls_run.values())),
        capture_steps=[s.step for s in curve.snapshots],
        parameters=sketches.names,
        **sketches.fields(),
        loss_error=np.stack([r.loss for r in (rows[0], *rows)]),
        gradient_error=np.stack([r.gradient for r in (rows[0], *rows)]),
        moved_tokens=np.stack([r.moved for r in (rows[0], *rows)]),
        disguises=list(modes),
        calls=[],
        digest=np.zeros((0, NUM_SKETCH)),
        tests=[],
        test_values=np.zeros((0, 3)),
        num_tests=0,
        fallbacks=curve.fallbacks,
        environment=machine_facts(registry.usable("reference")),
        data_order=curve.data_order,
        initial_weights=weights_hash(weights),
        seconds=time.perf_counter() - begin,
    )
    return Calibration(config, make, trace, curve.snapshots, oracle, items, limits)


def require_captured(curve: Curve, config: RunConfig) -> None:
    """Raises TraceError where the gradients of every step that was to be captured overflowed."""
    if curve.calls or not curve.skipped.any():
        return
    scale = config.train.loss_scale
    raise TraceError(
        f"reference: {int(np.nansum(curve.skipped))} of {curve.skipped.size} steps overflowed, and "
        f"none was left to capture; start with a smaller train.loss_scale (now {scale:g}) or train "
        "more steps"
    )


def loss_scales(config: RunConfig, curve: Curve, controls: Sequence[Curve] = ()) -> dict[str, Any]:
    """Returns the trace's fields about the loss scale; none where nothing scales the loss."""
    if config.train.dtype != "float16":
        return {}
    of_controls = {"control_loss_scale": [c.loss_scale for c in controls]}
    of_controls["control_skipped"] = [c.skipped for c in controls]
    arrays = {n: np.array(x).reshape(-1, curve.loss.size) for n, x in of_controls.items()}
    return {"loss_scale": curve.loss_scale, "skipped": curve.skipped, **arrays}


def _report_step(report: Progress, what: str, steps: int, step: int) -> None:
    report(what, step, steps)


def captured_steps(config: RunConfig, chosen: Sequence[int] | None = None) -> tuple[int, ...]:
    """Returns the chosen steps in order; by default (None) an early, a middle and the last one."""
    steps = config.train.steps
    default = (max(1, steps // 10), max(1, steps // 2), steps)
    return tuple(sorted(set(default if chosen is None else chosen)))


def open_data(config: RunConfig, cache_dir: str) -> MakeSampler:
    """Returns a function that makes fresh samplers over the config's own data."""
    # here, so that a sampler of the caller's own needs no sentencepiece
    from glm_core.data.open import open_sampler

    first = open_sampler(
        config.data, config.train.seed, cache_dir, positions=config.model.positions
    )
    return lambda: copy.copy(first)  # the text's packing, a second or more, is planned once


def check_controls(controls: int) -> None:
    """Raises ConfigError for a number of control runs that nothing can be judged with. None at all
    is for a run that is only a candidate, or whose curve is not judged."""
    if controls and controls < MIN_CONTROLS:
        raise ConfigError(
            f"controls={controls}: the envelope needs at least {MIN_CONTROLS} control runs; use "
            f"{NUM_CONTROLS}, or 0 for the trace of a candidate"
        )


def threshold(config: RunConfig) -> int:
    """Returns the number of elements from which a float32 tensor of a whole step counts as an
    intermediate and not as a row's statistic."""
    return config.train.micro_batch * config.data.length * config.model.hidden // 4


def control_modes(config: RunConfig, count: int) -> list[tuple[str, Mode]]:
    """Returns the control runs' names and modes: `count` random draws of the honest variation that
    moves the curve most, so that their spread predicts a further draw. Each control's weights
    also start one ulp away."""
    low = getattr(torch, config.train.dtype) in LOW
    name = "one ulp, " + ("intermediates rounded" if low else "other summation order")
    return [(name, functools.partial(varied, config, k)) for k in range(count)]


def varied(config: RunConfig, seed: int) -> AbstractContextManager[object]:
    """Returns the mode of one honest variation of the reference: below float32 three of four
    intermediates are rounded, drawn at random; in float32 sums are taken in another order."""
    dtype: torch.dtype = getattr(torch, config.train.dtype)
    return Rounded(dtype, threshold(config), seed=seed) if dtype in LOW else Regrouped(seed)


def gradient_modes(config: RunConfig) -> dict[str, Mode]:
    """Returns the disguises in which the reference computes a captured step's gradients: the plain
    reference first, then honest variations of it."""
    modes: dict[str, Mode] = {"plain": nullcontext}
    draws = {f"varied {k}": functools.partial(varied, config, k) for k in range(NUM_VARIED)}
    return modes | draws
