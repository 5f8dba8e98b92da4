"""Everything about a config and a dtype that no candidate changes, computed once: the reference's
run, its controls, the captured steps, float64, the benign ranges."""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glm_core.align import teacher_forcing
from glm_core.align.disguise import Regrouped, Rounded
from glm_core.align.gradients import (
    NUM_SKETCH,
    exact_gradients,
    gradient_errors,
    gradient_norms_and_sketches,
)
from glm_core.align.machine import machine_facts
from glm_core.align.replay import LOW
from glm_core.align.teacher_forcing import Case, Key
from glm_core.align.trace import Trace
from glm_core.align.training import Mode, Run, Snapshot, free_run, moved, weights_hash
from glm_core.backends import registry
from glm_core.config import RunConfig, to_dict
from glm_core.training.trainer import Sampler, initial_weights

Array = NDArray[np.float64]
MakeSampler = Callable[[], Sampler]
Progress = Callable[[str, int, int], None]
"""what is being done, how far, of how much"""
NUM_VARIED = 10


@dataclasses.dataclass(slots=True, eq=False)
class Calibration:
    """The reference's side of every comparison."""

    config: RunConfig
    sampler: MakeSampler
    reference: Trace
    snapshots: list[Snapshot]
    oracle: list[tuple[float, dict[str, Tensor]]]
    """per captured step: loss and gradients in float64"""
    cases: list[Case]
    """every op call of the captured steps with its correct results"""
    limits: dict[Key, float]
    """benign range of each statistic"""

    @property
    def dtype(self) -> torch.dtype:
        """The working dtype."""
        return getattr(torch, self.config.train.dtype)


def calibrate(
    config: RunConfig,
    *,
    sampler: MakeSampler | None = None,
    controls: int = 6,
    capture_steps: Sequence[int] | None = None,
    cache_dir: str = ".cache",
    progress: Progress | None = None,
) -> Calibration:
    """Runs the reference on this machine's CPU, `controls` honest variations of it, and teacher
    forcing of the reference against float64 at `capture_steps` (default: an early, a middle and the
    last step). `sampler` makes a fresh one for each run; the default opens the config's data."""
    begin, tell = time.perf_counter(), progress or (lambda what, done, of: None)
    make = sampler or open_data(config, cache_dir)
    steps = config.train.steps
    captured = captured_steps(config, capture_steps)
    weights = initial_weights(config)
    curve = free_run(
        Run(config, make(), "reference", weights), captured, lambda s: tell("reference", s, steps)
    )
    runs = {}
    for k, (name, mode) in enumerate(control_modes(config, controls)):
        run = Run(config, make(), "reference", moved(weights, k), mode)
        say = functools.partial(tell, f"control {k + 1} of {controls}")
        runs[f"{k}: {name}"] = free_run(run, (), lambda s, say=say: say(s, steps)).loss  # type: ignore[misc]
    oracle = [exact_gradients(config, snapshot) for snapshot in curve.snapshots]
    rows = [
        gradient_errors(Run(config, make(), "reference", None, mode), curve.snapshots, oracle)
        for mode in gradient_modes(config).values()
    ]
    items = list(teacher_forcing.cases(curve.calls))
    limits = teacher_forcing.benign_limits(items, getattr(torch, config.train.dtype))
    names = sorted(weights)
    plain = Run(config, make(), "reference")
    trace = Trace(
        config=to_dict(config),
        backend="reference",
        dtype=config.train.dtype,
        loss=curve.loss,
        grad_norm=curve.grad_norm,
        control_names=list(runs),
        control_loss=np.array(list(runs.values())).reshape(len(runs), steps),
        capture_steps=[m.step for m in curve.snapshots],
        parameters=names,
        **gradient_norms_and_sketches(plain, curve.snapshots, names),
        loss_error=np.stack([rows[0][0], *(r[0] for r in rows)]),
        gradient_error=np.stack([rows[0][1], *(r[1] for r in rows)]),
        disguises=list(gradient_modes(config)),
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


def captured_steps(config: RunConfig, given: Sequence[int] | None = None) -> tuple[int, ...]:
    """The steps both sides are given the same inputs at: an early, a middle and the last one."""
    steps = config.train.steps
    return tuple(sorted(set(given or (max(1, steps // 10), max(1, steps // 2), steps))))


def open_data(config: RunConfig, cache_dir: str) -> MakeSampler:
    """Fresh samplers over the config's own data."""
    # here, so that a sampler of the caller's own needs no sentencepiece
    from glm_core.data.open import open_sampler

    first = open_sampler(
        config.data, config.train.seed, cache_dir, positions=config.model.positions
    )
    return lambda: copy.copy(first)  # the text's packing, a second or more, is planned once


def threshold(config: RunConfig) -> int:
    """Elements from which a float32 tensor of a whole step counts as an intermediate, not as a
    row's statistic."""
    return config.train.micro_batch * config.data.length * config.model.hidden // 4


def control_modes(config: RunConfig, count: int) -> list[tuple[str, Mode]]:
    """The loudest honest variations, `count` draws of one kind, so that they tell the spread of a
    further one: weights one ulp away, and at every step sums in another order or, below float32,
    three of four intermediates rounded."""
    low = getattr(torch, config.train.dtype) in LOW
    name = "one ulp, " + ("intermediates rounded" if low else "other summation order")
    return [(name, functools.partial(varied, config, k)) for k in range(count)]


def varied(config: RunConfig, seed: int) -> AbstractContextManager[object]:
    """An honest variation of the reference, drawn by `seed`."""
    dtype: torch.dtype = getattr(torch, config.train.dtype)
    return Rounded(dtype, threshold(config), seed=seed) if dtype in LOW else Regrouped(seed)


def gradient_modes(config: RunConfig) -> dict[str, Mode]:
    """The disguises in which the reference computes a captured step's gradients: as it is, then
    varied."""
    modes: dict[str, Mode] = {"plain": nullcontext}
    draws = {f"varied {k}": functools.partial(varied, config, k) for k in range(NUM_VARIED)}
    return modes | draws
