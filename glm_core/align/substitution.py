"""Ops of a candidate replaced by their references, by op, direction and layer, within a whole step:
what is it that makes the gradients right?"""

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
from glm_core.align.calibration import Calibration, MakeSampler, Progress
from glm_core.align.capture import layers
from glm_core.align.gradients import gradient_errors, load_snapshot
from glm_core.align.trace import Trace
from glm_core.align.training import Run, Snapshot
from glm_core.align.verdict import gradient_check
from glm_core.backends.base import Backend
from glm_core.config import RunConfig
from glm_core.dispatch import Op
from glm_core.faults.kernels import splice, vjp

RATE = 1e-3 / 3


def on_host(op: Op, device: torch.device) -> Callable[..., Any]:
    """The op's reference on this machine's CPU, its results on the device."""

    def move(value: Any, to: torch.device | str) -> Any:
        return tree_map(lambda x: x.to(to) if isinstance(x, Tensor) else x, value)

    return lambda **a: move(op.reference(**move(a, "cpu")), device)


@contextmanager
def substituted(
    run: Run, op: str = "", direction: str = "", layer: str | None = None
) -> Iterator[None]:
    """In the block, calls that fit are computed by the reference on the host, in both directions or
    in one; empty fits any."""
    place = [""]

    def own(called: Op) -> Callable[..., Any]:
        def kernel(**a: Any) -> Any:  # a device's backward runs in a thread that knows no backend
            with dispatch.activate(run.backend):
                return dispatch.run(called, (), a)

        return kernel

    def replace(called: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        fits = op in ("", called.name) and layer in (None, place[0])
        if not fits or not called.differentiable:
            return dispatch.run(called, args, kwargs)
        bound = inspect.signature(called.reference).bind(*args, **kwargs)
        bound.apply_defaults()
        right, candidate = on_host(called, run.device), own(called)
        sides = {
            "": right,
            "forward": splice(called, right, vjp(called, candidate)),
            "backward": splice(called, candidate, vjp(called, right)),
        }
        return sides[direction](**bound.arguments)

    with layers(run.model, lambda name: place.__setitem__(0, name)), dispatch.intercept(replace):
        yield


def confirm(
    config: RunConfig,
    make: MakeSampler,
    backend: Backend,
    snapshots: list[Snapshot],
    op: str,
    direction: str,
) -> dict[str, float]:
    """The largest relative difference of a parameter's gradient from the reference's, of the
    candidate as it is and with the op's reference in its place."""
    run, reference = Run(config, make(), backend), Run(config, make(), "reference")
    found = {"candidate": 0.0, "substituted": 0.0}
    for snapshot in snapshots:
        _, right = load_snapshot(reference, snapshot).gradients(snapshot.batches)
        _, plain = load_snapshot(run, snapshot).gradients(snapshot.batches)
        # a wrong formula spoils its backward too: both are replaced
        with substituted(run, op, "backward" if direction == "backward" else ""):
            _, healed = load_snapshot(run, snapshot).gradients(snapshot.batches)
        for name, gradients in (("candidate", plain), ("substituted", healed)):
            found[name] = max(found[name], _difference(gradients, right))
    return found


def _difference(gradients: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """NaN counts as infinite."""
    each = [
        float((g - right[n]).norm() / right[n].norm().clamp(min=1e-300))
        for n, g in gradients.items()
    ]
    return float(np.nan_to_num(each, nan=np.inf).max())


def search(cal: Calibration, trace: Trace, backend: Backend, tell: Progress) -> dict[str, Any]:
    """Op, direction and layer whose substitution makes the gradients of the captured steps right;
    `trace` is the candidate's."""
    run = Run(cal.config, cal.sampler(), backend)
    names = sorted({c.call.op.name for c in cal.cases if c.call.op.differentiable})
    depth = cal.config.model.num_layers

    def ratio(op: str = "", direction: str = "", layer: str | None = None) -> float:
        with substituted(run, op, direction, layer):
            losses, gradients = gradient_errors(run, cal.snapshots, cal.oracle)
        made = dataclasses.replace(
            trace,
            loss_error=np.concatenate((losses[None], trace.loss_error[1:])),
            gradient_error=np.concatenate((gradients[None], trace.gradient_error[1:])),
        )
        _, excess, loss_excess = gradient_check(made, RATE)
        return float(max(excess.max(initial=0.0), loss_excess.max(initial=0.0)))

    if ratio() > 1:
        return {"op": "outside ops: gradients are wrong with every op's reference in its place"}
    found = []
    for i, name in enumerate(names):
        tell("substitution", i, len(names))
        found.append((ratio(name), name))
    tell("substitution", len(names), len(names))
    healed, op = min(found)
    if healed > 1:
        return {"op": f"outside ops: no op's reference alone makes it right, {op}'s comes nearest"}
    direction = "backward" if ratio(op, "backward") <= 1 else "forward"
    fix = direction if direction == "backward" else ""  # a wrong forward spoils its backward
    single = [i for i in range(depth) if ratio(op, fix, str(i)) <= 1]
    case = next(c for c in cal.cases if c.call.op.name == op)
    layer = str(single[0]) if single else ""
    return {
        "op": op,
        "direction": direction,
        "layer": layer,
        "shape": list(next(iter(case.shapes.values()))),
    }
