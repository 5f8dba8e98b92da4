"""Trains the controls, honest variations of the reference, whose spread is the envelope. Each is a
run of its own: it has the same bits in whichever process it is trained."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from glm_core.align import MIN_CONTROLS, NUM_CONTROLS
from glm_core.align.disguise import Regrouped, Rounded, unchanged_unseen
from glm_core.align.replay import LOW
from glm_core.align.trace import Trace
from glm_core.align.training import Mode, Run, free_run, moved
from glm_core.config import RunConfig
from glm_core.errors import ConfigError
from glm_core.training.batches import Sampler
from glm_core.training.parallel import initial_weights

Array = NDArray[np.float64]
MakeSampler = Callable[[], Sampler]
Progress = Callable[[str, int, int], None]
"""called with what is being done, how many steps of it are done, and of how many"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """What a control leaves behind, one number per step, in values that JSON keeps exactly."""

    loss: list[float]
    loss_scale: list[float]
    skipped: list[float]
    seconds: float
    """how long it took"""


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


def train_control(
    config: RunConfig, number: int, count: int, sampler: MakeSampler, progress: Progress
) -> Control:
    """Trains control `number`, from 0, of `count`."""
    begin, steps = time.perf_counter(), config.train.steps
    _, mode = control_modes(config, count)[number]
    run = Run(config, sampler(), "reference", moved(initial_weights(config), number), mode)
    what = f"control {number + 1} of {count}"
    with unchanged_unseen(run.dtype):
        curve = free_run(run, (), lambda step: progress(what, step, steps))
    series = {name: getattr(curve, name).tolist() for name in ("loss", "loss_scale", "skipped")}
    return Control(**series, seconds=time.perf_counter() - begin)


def with_controls(reference: Trace, config: RunConfig, controls: Sequence[Control]) -> Trace:
    """Returns the reference's trace with all its controls, in their order."""

    def table(series: str) -> Array:
        rows = np.array([getattr(control, series) for control in controls], dtype=np.float64)
        return rows.reshape(-1, reference.loss.size)

    named = [f"{k}: {name}" for k, (name, _) in enumerate(control_modes(config, len(controls)))]
    scales: dict[str, Any] = {}
    if config.train.dtype == "float16":
        scales = {f"control_{series}": table(series) for series in ("loss_scale", "skipped")}
    return dataclasses.replace(
        reference,
        control_names=named,
        control_loss=table("loss"),
        **scales,
        seconds=reference.seconds + sum(control.seconds for control in controls),
    )
