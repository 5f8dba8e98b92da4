"""Computes once what every comparison of a config and a dtype needs, whatever the candidate: the
reference's run, its controls, the captured steps, the float64 oracle and the benign ranges."""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from glm_core.align import NUM_CONTROLS, teacher_forcing
from glm_core.align.controls import (
    MakeSampler,
    Progress,
    check_controls,
    train_control,
    varied,
    with_controls,
)
from glm_core.align.disguise import unchanged_unseen
from glm_core.align.gradients import (
    NUM_SKETCH,
    GradientErrors,
    Oracle,
    Sketches,
    exact_gradients,
    gradient_errors,
)
from glm_core.align.machine import machine_facts
from glm_core.align.teacher_forcing import Case, Key
from glm_core.align.trace import Trace
from glm_core.align.training import Curve, Mode, Run, Snapshot, free_run, weights_hash
from glm_core.backends import registry
from glm_core.config import RunConfig, to_dict
from glm_core.errors import TraceError
from glm_core.training.parallel import initial_weights

Array = NDArray[np.float64]
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
    judges_ops: bool = True,
    cache_dir: str = ".cache",
    progress: Progress | None = None,
) -> Calibration:
    """Runs the reference on this machine's CPU and `controls` honest variations of it, captures
    `capture_steps` (default: an early, a middle and the last step) and compares them with float64.
    `judges_ops`: single op calls are judged too, which a plan's are not. `sampler` makes a fresh
    sampler for each run; the default opens the config's data."""
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
    oracle = [exact_gradients(config, snapshot) for snapshot in curve.snapshots]
    modes, rows, sketches = gradient_modes(config), [], Sketches(sorted(weights))
    for number, mode in enumerate(modes.values()):
        report("captured steps", number * len(captured), len(modes) * len(captured))
        run = Run(config, make(), "reference", None, mode)
        none = GradientErrors(np.zeros(0), np.zeros((0, len(weights))), np.zeros(0))
        kept = None if number else sketches  # the plain reference's
        with unchanged_unseen(run.dtype):
            rows.append(gradient_errors(run, curve.snapshots, oracle, kept) if captured else none)
    report("captured steps", len(modes) * len(captured), len(modes) * len(captured))
    items = list(teacher_forcing.cases(curve.calls if judges_ops else []))
    limits = teacher_forcing.benign_limits(items, getattr(torch, config.train.dtype))
    trace = Trace(
        config=to_dict(config),
        backend="reference",
        dtype=config.train.dtype,
        loss=curve.loss,
        grad_norm=curve.grad_norm,
        control_names=[],
        control_loss=np.zeros((0, steps)),
        **loss_scales(config, curve),
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
    trained = [train_control(config, k, controls, make, report) for k in range(controls)]
    trace = with_controls(trace, config, trained)
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


def loss_scales(config: RunConfig, curve: Curve) -> dict[str, Any]:
    """Returns the trace's fields about the loss scale; none where nothing scales the loss."""
    if config.train.dtype != "float16":
        return {}
    none = np.zeros((0, curve.loss.size))
    of_controls = {"control_loss_scale": none, "control_skipped": none}
    return {"loss_scale": curve.loss_scale, "skipped": curve.skipped, **of_controls}


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


def gradient_modes(config: RunConfig) -> dict[str, Mode]:
    """Returns the disguises in which the reference computes a captured step's gradients: the plain
    reference first, then honest variations of it."""
    modes: dict[str, Mode] = {"plain": nullcontext}
    draws = {f"varied {k}": functools.partial(varied, config, k) for k in range(NUM_VARIED)}
    return modes | draws
