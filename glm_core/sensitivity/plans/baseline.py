"""Trains the single process, and measures how far honest rounding drives it: what every plan is
held to."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from glm_core.align.calibration import gradient_modes
from glm_core.align.controls import control_modes
from glm_core.align.envelope import envelope, error_bound
from glm_core.align.gradients import distance, exact_gradients, gradient_errors
from glm_core.align.training import Run, free_run, moved
from glm_core.align.verdict import EPS
from glm_core.sensitivity.plans import sample
from glm_core.training.parallel import initial_weights
from glm_core.training.trainer import StepResult

Array = NDArray[np.float64]
RATE = 1e-3 / 4
"""false alarms of each of the four comparisons: loss, gradient norm, gradients, weights"""
CONTROLS = 5


@dataclasses.dataclass(slots=True)
class Baseline:
    """The run of one process, and its bounds. N steps, P parameters in alphabetical order."""

    curves: dict[str, tuple[Array, Array]]
    """loss and norm [N], and the controls' [K, N]"""
    exact: dict[str, Tensor]
    """the first step's gradients"""
    gradient_bound: Array
    first: dict[str, Tensor]
    """weights after the first step"""
    first_bound: Array
    weights: dict[str, Tensor]
    """after the last step"""
    weight_bound: Array
    load: list[list[float]]
    """of the experts in the first step"""

    def ratios(self, curves: dict[str, Any], grads: Any, weights: Any) -> dict[str, float]:
        """Returns how far a run is from this one, each in units of its bound: above 1 is
        outside."""
        found = {name: float(self.curve(name, curves[name]).max()) for name in self.curves}
        found["gradient"] = float(self.gradients(grads).max())
        found["weight"] = float(self.last_weights(weights).max())
        return {n: r if math.isfinite(r) else math.inf for n, r in found.items()}

    def curve(self, name: str, values: list[float]) -> Array:
        """Returns the ratio of every step's loss or norm [N]."""
        mine, controls = self.curves[name]
        ratio: Array = envelope(mine, controls, np.array(values), RATE).ratio
        return ratio

    def gradients(self, grads: Any) -> Array:
        """Returns the ratio of every parameter's gradient [P]."""
        off = np.array([[distance(grads[n].double(), t) for n, t in sorted(self.exact.items())]])
        ratio: Array = (off / self.gradient_bound)[0]
        return ratio

    def first_weights(self, weights: Any) -> Array:
        """Returns the ratio of every parameter's value after the first step [P]."""
        off = np.array([distance(weights[n], t) for n, t in sorted(self.first.items())])
        ratio: Array = off / self.first_bound
        return ratio.reshape(-1)

    def last_weights(self, weights: Any) -> Array:
        """Returns the ratio of every parameter's last value [P]."""
        off = np.array([distance(weights[n], t) for n, t in sorted(self.weights.items())])
        ratio: Array = off / self.weight_bound
        return ratio.reshape(-1)


class Kept(Run):
    """A run that keeps its weights after the first step, and that step's loads of experts."""

    first: dict[str, Tensor]
    load: list[list[float]]

    def step(self) -> StepResult:
        """Does a step."""
        result = super().step()
        if self.steps_done == 1:
            self.first = {n: w.clone() for n, w in self.optimizer.master.items()}
            self.load = result.expert_load
        return result


def make(model: str, dtype: Any) -> Baseline:
    """Trains the reference on a sample model, and its honest variations, as `align` calibrates."""
    config = sample.config(model, dtype)
    weights = initial_weights(config)
    run = Kept(config, sample.Text(), "reference", weights)
    curve = free_run(run, (1,))
    last = {n: w.clone() for n, w in run.optimizer.master.items()}
    loss, norm, apart, apart_first = [], [], [], []
    for k, (_, mode) in enumerate(control_modes(config, CONTROLS)):
        control = Kept(config, sample.Text(), "reference", moved(weights, k), mode)
        varied = free_run(control)
        loss.append(varied.loss)
        norm.append(varied.grad_norm)
        apart_first.append([distance(control.first[n], w) for n, w in sorted(run.first.items())])
        apart.append([distance(control.optimizer.master[n], w) for n, w in sorted(last.items())])
    exact = exact_gradients(config, curve.snapshots[0])
    benign = [
        gradient_errors(
            Run(config, sample.Text(), "reference", None, mode), curve.snapshots, [exact]
        )
        for mode in gradient_modes(config).values()
    ]
    eps = max(EPS[dtype], EPS["float32"] * (sample.ROWS * sample.LENGTH) ** 0.5)
    return Baseline(
        {"loss": (curve.loss, np.array(loss)), "norm": (curve.grad_norm, np.array(norm))},
        exact.gradients,
        error_bound(np.array([b.gradient for b in benign]), eps, RATE),
        run.first,
        error_bound(np.array(apart_first), EPS["float32"], RATE),
        last,
        error_bound(np.array(apart), EPS["float32"], RATE),
        run.load,
    )
