"""A candidate's own run, every op call judged by what it gave there and then: what happens once in
a run shows in no replay."""

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
from glm_core.align.recording import tests
from glm_core.align.replay import Results, flat, with_change
from glm_core.align.teacher_forcing import Key
from glm_core.align.training import Run
from glm_core.align.verdict import Finding, findings
from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.config import RunConfig
from glm_core.diagnose import watchdog
from glm_core.dispatch import Op
from glm_core.errors import DeviceError, TrainingError

Array = NDArray[np.float64]
RATE = 1e-3 / 3


class Shadow(Capture):
    """Captures calls and their results, gradients included, as they happen."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.results: list[Results] = []

    def __call__(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The interceptor."""
        results: Results = {}
        self.results.append(results)
        given = dict(zip(op.parameters, args, strict=False)) | kwargs
        for name in op.differentiable:
            if isinstance(given.get(name), Tensor) and given[name].requires_grad:
                given[name] = given[name].view_as(given[name])  # its gradient is this call's alone
                given[name].register_hook(_keep(results, f"d_{name}"))
        out = super().__call__(op, (), given)
        outputs = out if isinstance(out, tuple) else () if out is None else (out,)
        for i, y in enumerate(outputs):
            results[f"y{i}" if len(outputs) > 1 else "y"] = host(y)
        results.update({n: host(given[n]) for n in op.mutates if given.get(n) is not None})
        return out

    def on_host(self) -> list[Call]:
        """The calls with all their tensors on the CPU."""
        move = lambda x: x.cpu() if isinstance(x, Tensor) else x  # noqa: E731
        return [
            dataclasses.replace(
                c, args=tree_map(move, c.args), output_gradients=tree_map(move, c.output_gradients)
            )
            for c in self.calls
        ]

    def answer(self, call: Call) -> Results:
        """What a call of `on_host` gave."""
        return with_change(call, self.results[call.index])


def _keep(results: Results, name: str) -> Any:
    def keep(gradient: Tensor) -> None:
        results[name] = host(gradient)

    return keep


def host(value: Any) -> Tensor:
    """A copy on the CPU; a list of tensors as one flat tensor."""
    return flat(value).detach().cpu().clone()


def watch(
    config: RunConfig, backend: Backend, make: MakeSampler, limits: dict[Key, float], tell: Progress
) -> tuple[list[Finding], Array]:
    """Trains the candidate until a step has findings of single calls, the furthest outside first.
    With them the losses so far [N], NaN from where the run ended."""
    run, steps = Run(config, make(), backend), config.train.steps
    losses = np.full(steps, np.nan)
    with registry.use(run.backend):
        for step in range(1, steps + 1):
            watchdog.beat(f"step {step}, call by call")
            record, broke = Shadow(step), False
            with capture(run.model, step, record):
                try:
                    losses[step - 1] = run.step().loss
                except DeviceError:
                    raise
                except TrainingError:
                    broke = True
            found = judged(record, limits, run.dtype, steps)
            tell(f"{backend.name}, call by call", step, steps)
            if found or broke:
                return found, losses
    return [], losses


def judged(
    record: Shadow, limits: dict[Key, float], dtype: torch.dtype, steps: int
) -> list[Finding]:
    """The findings of single calls that are outside; the step is one of so many. The benign range
    comes from the captured steps; where it is left, it is measured in this step too."""
    cases = list(teacher_forcing.cases(record.on_host()))
    measured, _ = teacher_forcing.measure(cases, record.answer)

    def outside(limits: dict[Key, float]) -> list[Finding]:
        rows = tests(measured, cases, limits)
        found = findings(*rows, measured.count() * steps, RATE)
        return [f for f in found if f.ratio > 1 and f.call >= 0]

    suspects = {f.op for f in outside(limits)}
    if not suspects:
        return []
    own = teacher_forcing.benign_limits([c for c in cases if c.call.op.name in suspects], dtype)
    return outside(limits | {k: max(v, limits.get(k, 0.0)) for k, v in own.items()})
