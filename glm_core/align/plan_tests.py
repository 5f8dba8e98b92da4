"""Tests what a plan does with gradients that are right: the norm over all ranks, the copies that
several ranks hold, and the update of each rank's part."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from glm_core import ops
from glm_core.align.statistics import EPS
from glm_core.align.trace_format import PlanTest
from glm_core.config import TrainConfig
from glm_core.distributed.parallel import Chunk, ManyProcesses
from glm_core.errors import TrainingError
from glm_core.model.glm import Router
from glm_core.training.optimizer import Optimizer

ROUNDINGS = 10
"""of an update's change, in float32; conformance judges the op itself"""
SAFETY = 4
"""how far two honest updates may be apart, in the error of one"""


# on each rank -------------------------------------------------------------------------


def first_update(optimizer: Optimizer, loss_scale: float) -> float:
    """Makes the update of a first step from the gradients that are there, at the full learning
    rate. Returns the gradient norm."""
    with torch.no_grad():
        for moments in (optimizer.exp_avg, optimizer.exp_avg_sq):
            for moment in moments.values():
                moment.zero_()
    optimizer.step_count = 0
    return float(optimizer.step(optimizer.config.lr, loss_scale))


@contextmanager
def chosen_experts(here: ManyProcesses) -> Iterator[dict[str, list[Tensor]]]:
    """Collects the experts that this rank's routers choose in forward passes, by router, one tensor
    for each micro-batch. A block that is computed again for its backward pass is not counted."""
    chosen: dict[str, list[Tensor]] = {}
    running = [False]

    def keep(name: str, output: tuple[Tensor, Tensor]) -> None:
        if running[0]:
            chosen.setdefault(name, []).append(output[0].detach().cpu())

    handles = []
    for stage in here.model.stages:
        handles.append(stage.register_forward_pre_hook(lambda *_: running.__setitem__(0, True)))
        handles.append(stage.register_forward_hook(lambda *_: running.__setitem__(0, False)))
        for name, router in stage.named_modules():
            if isinstance(router, Router):
                hook = router.register_forward_hook(lambda _, x, y, name=name: keep(name, y))
                handles.append(hook)
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()


# of all ranks -------------------------------------------------------------------------


def choice_of_all(ranks: Sequence[Any]) -> list[Tensor]:
    """Returns each router's choices for the tokens of a whole step, in the order of layers and
    rows. ranks: what each recorded, data-parallel ranks in order."""
    parts: dict[str, list[Tensor]] = {}
    for rank in ranks:
        if rank["tp_rank"] == 0:
            for name, chosen in rank["chosen"].items():
                parts.setdefault(name, []).extend(chosen)
    layers = sorted(parts, key=lambda name: int(name.split(".")[1]))
    return [torch.cat(parts[name]) for name in layers]


def assembled(chunks: Sequence[Chunk], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Returns the whole tensors in float64. Where copies of an element differ, the one furthest
    from zero stays. Raises TrainingError where no process holds an element."""
    whole = {n: torch.full(shape, torch.nan, dtype=torch.float64) for n, shape in shapes.items()}
    for name, place, values in chunks:
        part, new = whole[name][_at(place, values)], values.double()
        part.copy_(torch.where(part.isnan() | (new.abs() > part.abs()), new, part))
    if missing := [n for n, x in whole.items() if x.isnan().any()]:
        raise TrainingError(
            f"align under a plan: gradients of {', '.join(missing)} are not finite, or no process "
            "holds all of them; look at the plan's own tests"
        )
    return whole


def _at(place: tuple[int, ...], values: Tensor) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(place, values.shape, strict=True))


def plan_tests(
    step: int,
    ranks: Sequence[Any],
    gradients: dict[str, Tensor],
    weights: dict[str, Tensor],
    config: TrainConfig,
    floor: float,
) -> list[PlanTest]:
    """Returns the outcome of the three tests of a captured step. ranks: what each recorded.
    gradients, weights: whole, of all parameters; the weights are those before the update. floor:
    the smallest bound on a gradient's error."""
    true = sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
    count = sum(g.numel() for g in gradients.values())
    limit = EPS * count**0.5  # of a sum of so many squares in float32
    off = [abs(rank["norm"] - true) / max(true, 1e-300) for rank in ranks]
    norm: PlanTest = {
        "step": step,
        "test": "norm",
        "parameter": "",
        "ranks": [r for r, x in enumerate(off) if not x <= limit],
        "outside": 1,
        "measured": float(np.max(off)),  # NaN where one is
        "limit": limit,
    }
    own = [rank["gradients"] for rank in ranks]
    size = {n: float(g.norm()) for n, g in gradients.items()}
    copies = _against(own, gradients, {n: 2 * floor * x for n, x in size.items()})
    right, slack = updated(gradients, weights, ranks, config)
    limits = {n: float(x.norm()) for n, x in slack.items()}
    update = _against([rank["weights"] for rank in ranks], right, limits)
    change = {n: float((right[n] - weights[n]).norm()) for n in right}
    return [norm, _worst(step, "copies", copies, size), _worst(step, "update", update, change)]


def updated(
    gradients: dict[str, Tensor],
    weights: dict[str, Tensor],
    ranks: Sequence[Any],
    config: TrainConfig,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the weights that the first update makes in float64, and how far each element of an
    honest one may be off: SAFETY times the rounding of the result and that of the change."""
    norm = ranks[0]["norm"]
    clip = min(1.0, config.clip / (norm + 1e-6)) if config.clip else 1.0
    moved = {name for rank in ranks for name in rank["updated"]}
    right, slack = {}, {}
    for name, before in weights.items():
        w = before.double().clone()
        if name in moved:
            decay = config.weight_decay if w.ndim > 1 else 0.0
            moments = [torch.zeros_like(w)], [torch.zeros_like(w)]
            scale = torch.tensor(clip, dtype=torch.float64)
            rates = config.lr, config.beta1, config.beta2, config.eps, decay
            ops.adamw.reference([w], [gradients[name]], *moments, scale, 1, *rates)
        right[name] = w
        change = (w - before.double()).abs()
        slack[name] = SAFETY * EPS / 2 * (w.abs() + ROUNDINGS * change)
    return right, slack


class _Off(NamedTuple):
    """How far what the ranks hold of a parameter is from the right values."""

    distance: float
    limit: float
    ranks: list[int]
    """those that hold wrong values"""


def _against(
    held: Sequence[Sequence[Chunk]], right: dict[str, Tensor], limits: dict[str, float]
) -> dict[str, _Off]:
    """Returns for each parameter how far the ranks' parts are from the right values. Of several
    copies of an element the worst counts."""
    worst = {n: torch.zeros_like(x) for n, x in right.items()}
    wrong: dict[str, list[int]] = {n: [] for n in right}
    for rank, chunks in enumerate(held):
        off = dict.fromkeys(right, 0.0)
        for name, place, values in chunks:
            at = _at(place, values)
            difference = (values.double() - right[name][at]).abs()
            worst[name][at] = torch.maximum(worst[name][at], difference)
            off[name] += float(difference.square().sum())
        for name, square in off.items():
            if not square**0.5 <= limits[name]:
                wrong[name].append(rank)
    return {n: _Off(float(x.norm()), limits[n], wrong[n]) for n, x in worst.items()}


def _worst(step: int, test: str, found: dict[str, _Off], size: dict[str, float]) -> PlanTest:
    """Returns the test of the parameter that is furthest outside, relative to `size`."""

    def ratio(name: str) -> float:
        value = found[name].distance / max(found[name].limit, 1e-300)
        return math.inf if math.isnan(value) else value

    name = max(found, key=ratio)
    off, whole = found[name], max(size[name], 1e-300)
    return {
        "step": step,
        "test": test,
        "parameter": name,
        "ranks": off.ranks,
        "outside": sum(ratio(n) > 1 for n in found),
        "measured": off.distance / whole,
        "limit": off.limit / whole,
    }
