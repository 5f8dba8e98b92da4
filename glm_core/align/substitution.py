"""Replaces ops of a candidate by their references within a whole step, by op, direction and layer,
to see which substitution makes the gradients right."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from glm_core import dispatch
from glm_core.align.calibration import Calibration
from glm_core.align.capture import layers
from glm_core.align.controls import MakeSampler, Progress
from glm_core.align.gradients import gradient_errors, load_snapshot
from glm_core.align.trace import Trace
from glm_core.align.training import Run, Snapshot
from glm_core.align.verdict import FALSE_ALARM_RATE, NUM_TESTS, gradient_check
from glm_core.backends.base import Backend
from glm_core.config import RunConfig
from glm_core.dispatch import Op
from glm_core.faults.kernels import splice, vjp

RATE = FALSE_ALARM_RATE / NUM_TESTS
"""the gradients' share of the verdict's false-alarm rate"""


OUTSIDE = "left are rotary tables, residual sums, copies between the ops, and autograd's own sums"
"""what a training step computes outside of the ops"""


def on_host(op: Op, device: torch.device) -> Callable[..., Any]:
    """Returns the op's reference, which runs on this machine's CPU and puts its results on the
    device."""

    def move(value: Any, to: torch.device | str) -> Any:
        return tree_map(lambda x: x.to(to) if isinstance(x, Tensor) else x, value)

    return lambda **a: move(op.reference(**move(a, "cpu")), device)


@contextmanager
def substituted(
    run: Run, op: str = "", direction: str = "", layer: str | None = None
) -> Iterator[None]:
    """Inside the block, the reference on the host computes the calls that match, in one direction
    or (empty) in both. An empty op or a layer of None matches any."""
    current_layer = ""

    def enter(name: str) -> None:
        nonlocal current_layer
        current_layer = name

    def candidate_kernel(called: Op) -> Callable[..., Any]:
        def kernel(**a: Any) -> Any:  # a device's backward runs in a thread without active backend
            with dispatch.activate(run.backend):
                return dispatch.run(called, (), a)

        return kernel

    def replace(called: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        matches = op in ("", called.name) and layer in (None, current_layer)
        if not matches or not called.differentiable:
            return dispatch.run(called, args, kwargs)
        bound = inspect.signature(called.reference).bind(*args, **kwargs)
        bound.apply_defaults()
        reference, candidate = on_host(called, run.device), candidate_kernel(called)
        by_direction = {
            "": reference,
            "forward": splice(called, reference, vjp(called, candidate)),
            "backward": splice(called, candidate, vjp(called, reference)),
        }
        return by_direction[direction](**bound.arguments)

    with layers(run.model, enter), dispatch.intercept(replace):
        yield


def confirm(
    config: RunConfig,
    make: MakeSampler,
    backend: Backend,
    snapshots: list[Snapshot],
    op: str,
    direction: str,
) -> dict[str, float]:
    """Returns the largest relative difference between a parameter's gradient and the reference's:
    of the `candidate` as it is, and with the op `substituted` by its reference."""
    run, reference = Run(config, make(), backend), Run(config, make(), "reference")
    largest = {"candidate": 0.0, "substituted": 0.0}
    for snapshot in snapshots:
        _, right = load_snapshot(reference, snapshot).gradients(snapshot.batches)
        _, plain = load_snapshot(run, snapshot).gradients(snapshot.batches)
        # a wrong formula spoils its backward too: both are replaced
        with substituted(run, op, "backward" if direction == "backward" else ""):
            _, mended = load_snapshot(run, snapshot).gradients(snapshot.batches)
        for name, gradients in (("candidate", plain), ("substituted", mended)):
            largest[name] = max(largest[name], _difference(gradients, right))
    return largest


def _difference(gradients: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Returns the largest relative difference; NaN counts as infinite."""
    each = [
        float((g - right[n]).norm() / right[n].norm().clamp(min=1e-300))
        for n, g in gradients.items()
    ]
    return float(np.nan_to_num(each, nan=np.inf).max())


def search(cal: Calibration, trace: Trace, backend: Backend, report: Progress) -> dict[str, Any]:
    """Returns the op, direction and layer whose substitution makes the gradients of the captured
    steps right, and the shape of the op's result; only an op `outside ops: ...` where none does.
    `trace` is the candidate's."""
    run = Run(cal.config, cal.sampler(), backend)
    names = sorted({c.call.op.name for c in cal.cases if c.call.op.differentiable})
    depth = cal.config.model.num_layers

    def ratio(op: str = "", direction: str = "", layer: str | None = None) -> float:
        with substituted(run, op, direction, layer):
            losses, gradients, _ = gradient_errors(run, cal.snapshots, cal.oracle)
        mended = dataclasses.replace(
            trace,
            loss_error=np.concatenate((losses[None], trace.loss_error[1:])),
            gradient_error=np.concatenate((gradients[None], trace.gradient_error[1:])),
        )
        _, excess, loss_excess = gradient_check(mended, RATE)
        return float(max(excess.max(initial=0.0), loss_excess.max(initial=0.0)))

    if ratio() > 1:
        wrong = "outside ops: gradients are wrong with every op's reference in its place"
        return {"op": f"{wrong}; {OUTSIDE}"}
    ratios = []
    for i, name in enumerate(names):
        report("substitution", i, len(names))
        ratios.append((ratio(name), name))
    report("substitution", len(names), len(names))
    smallest, op = min(ratios)
    if smallest > 1:
        return {"op": f"outside ops: no single op's reference makes it right; {op}'s comes nearest"}
    direction = "backward" if ratio(op, "backward") <= 1 else "forward"
    replaced = direction if direction == "backward" else ""  # a wrong forward spoils its backward
    sufficient = [i for i in range(depth) if ratio(op, replaced, str(i)) <= 1]
    case = next(c for c in cal.cases if c.call.op.name == op)
    return {
        "op": op,
        "direction": direction,
        "layer": str(sufficient[0]) if sufficient else "",
        "shape": list(next(iter(case.shapes.values()))),
    }
