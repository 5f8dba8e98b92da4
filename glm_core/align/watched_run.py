"""Trains a candidate and judges every op call as it happens. A fault that happens once in a run
does not show when the calls are replayed."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map

from glm_core.align import teacher_forcing
from glm_core.align.calibration import MakeSampler, Progress
from glm_core.align.capture import Call, Capture, capture
from glm_core.align.recording import worst_tests
from glm_core.align.replay import Results, flat, with_change
from glm_core.align.teacher_forcing import Case, Key
from glm_core.align.training import Run
from glm_core.align.verdict import FALSE_ALARM_RATE, NUM_TESTS, Finding, findings
from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.config import RunConfig
from glm_core.diagnose import watchdog
from glm_core.dispatch import Op
from glm_core.errors import DeviceError, TrainingError

Array = NDArray[np.float64]
RATE = FALSE_ALARM_RATE / NUM_TESTS
"""the op by op tests' share of the verdict's false-alarm rate"""


@dataclasses.dataclass(slots=True, eq=False)
class Watched:
    """What was seen of a candidate's own run; its arrays are those of a `Curve`."""

    loss: Array
    loss_scale: Array
    skipped: Array
    guilty: list[Finding] = dataclasses.field(default_factory=list)
    """of single calls in the last step, the furthest outside first"""
    saturated: tuple[Call, str] | None = None
    """the first call and direction with finite numbers where the correct result is infinite"""

    def curve(self, config: RunConfig) -> dict[str, Any]:
        """Returns the trace's fields about the curve, but for the gradients' norm."""
        fields = {"loss": self.loss, "grad_norm": self.loss, "control_loss": self.loss[None][:0]}
        if config.train.dtype == "float16":
            fields |= {"loss_scale": self.loss_scale, "skipped": self.skipped}
            fields["control_loss_scale"] = fields["control_skipped"] = self.loss[None][:0]
        return fields


class ResultCapture(Capture):
    """Captures the calls of one step together with their results and gradients."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.results: list[Results] = []

    def __call__(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The interceptor: runs the call and keeps its results."""
        results: Results = {}
        self.results.append(results)
        named = dict(zip(op.parameters, args, strict=False)) | kwargs
        for name in op.differentiable:
            if isinstance(named.get(name), Tensor) and named[name].requires_grad:
                named[name] = named[name].view_as(named[name])  # its gradient is this call's alone
                named[name].register_hook(_keep(results, f"d_{name}"))
        out = super().__call__(op, (), named)
        outputs = out if isinstance(out, tuple) else () if out is None else (out,)
        for i, y in enumerate(outputs):
            results[f"y{i}" if len(outputs) > 1 else "y"] = cpu_copy(y)
        results.update({n: cpu_copy(named[n]) for n in op.mutates if named.get(n) is not None})
        return out

    def on_cpu(self) -> list[Call]:
        """Returns the calls with all their tensors on the CPU."""
        move = lambda x: x.cpu() if isinstance(x, Tensor) else x  # noqa: E731
        return [
            dataclasses.replace(
                c, args=tree_map(move, c.args), output_gradients=tree_map(move, c.output_gradients)
            )
            for c in self.calls
        ]

    def results_of(self, call: Call) -> Results:
        """Returns what a call of `on_cpu` gave."""
        return with_change(call, self.results[call.index])


def _keep(results: Results, name: str) -> Any:
    def keep(gradient: Tensor) -> None:
        results[name] = cpu_copy(gradient)

    return keep


def cpu_copy(value: Any) -> Tensor:
    """Returns a copy on the CPU; a list of tensors becomes one flat tensor."""
    return flat(value).detach().cpu().clone()


def watch(
    config: RunConfig,
    backend: Backend,
    make: MakeSampler,
    limits: dict[Key, float],
    report: Progress,
) -> Watched:
    """Trains the candidate until single calls of a step are guilty. A step whose gradients overflow
    is not judged. Arrays are NaN from where the run ended."""
    run, steps = Run(config, make(), backend), config.train.steps
    seen = Watched(*np.full((3, steps), np.nan))
    with registry.use(run.backend):
        for step in range(1, steps + 1):
            watchdog.beat(f"step {step}, call by call")
            captured, broke_off = ResultCapture(step), False
            with capture(run.model, step, captured):
                try:
                    result = run.step()
                except DeviceError:
                    raise
                except TrainingError:
                    broke_off = True
            report(f"{backend.name}, call by call", step, steps)
            if not broke_off:
                for name in ("loss", "loss_scale", "skipped"):
                    getattr(seen, name)[step - 1] = getattr(result, name)
                if result.skipped:
                    continue
            cases = list(teacher_forcing.cases(captured.on_cpu()))
            seen.saturated = seen.saturated or first_saturated(captured, cases)
            seen.guilty = judge_step(captured, cases, limits, run.dtype, steps)
            if seen.guilty or broke_off:
                break
    return seen


def first_saturated(captured: ResultCapture, cases: list[Case]) -> tuple[Call, str] | None:
    """Returns the first call, and its direction, that gave finite numbers where the correct result
    is infinite."""
    for case in cases:
        results = captured.results_of(case.call)
        for name in case.overflowed:
            if name in results and results[name].isfinite().all():
                return case.call, "backward" if name.startswith("d_") else "forward"
    return None


def judge_step(
    captured: ResultCapture,
    cases: list[Case],
    limits: dict[Key, float],
    dtype: torch.dtype,
    steps: int,
) -> list[Finding]:
    """Returns the guilty findings of single calls in one step of `steps`, whose calls are `cases`.
    `limits` is the benign range of the captured steps; for ops that leave it, it is widened by the
    range measured in this very step."""
    measured, _ = teacher_forcing.measure(cases, captured.results_of)

    def outside(limits: dict[Key, float]) -> list[Finding]:
        tests, values = worst_tests(measured, cases, limits)
        tested = findings(tests, values, measured.count() * steps, RATE)
        return [f for f in tested if f.ratio > 1 and f.call >= 0]

    suspects = {f.op for f in outside(limits)}
    if not suspects:
        return []
    own = teacher_forcing.benign_limits([c for c in cases if c.call.op.name in suspects], dtype)
    return outside(limits | {k: max(v, limits.get(k, 0.0)) for k, v in own.items()})
