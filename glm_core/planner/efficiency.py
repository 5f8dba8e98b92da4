"""How far real runs fall short of nominal rates: four factors per chip family and software stack,
fitted to published runs, and the predictions they give."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
from numpy.typing import NDArray

from glm_core.planner import published
from glm_core.planner.cluster import Cluster
from glm_core.planner.cost import Ideal, Work, hardware_flops, ideal, model_flops
from glm_core.planner.sizing import Sizing

Array = NDArray[np.float64]
FLOORS = (1.2, 0.5, 0.2, 0.0)
"""smallest factors of matmul, elementwise, communication and launches that can be believed: no
matrix product beyond 83 % of the peak, half the counted bytes, four fifths of the traffic hidden"""


@dataclasses.dataclass(frozen=True, slots=True)
class Factors:
    """What each ideal second costs in real ones, and seconds a layer's pass costs besides."""

    matmul: float
    """1 / the share of the peak that matrix products reach"""
    elementwise: float
    communication: float
    """below 1 where it overlaps with computation"""
    launches: float
    """seconds"""
    origin: str
    """how many runs it was fitted to, and whose"""


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """A predicted step, seconds by part."""

    parts: dict[str, float]
    seconds: float
    mfu: float
    hfu: float


def stack_of(plan: Sizing) -> str:
    """Whose software a plan is most like: FSDP where weights are shared and nothing else is split,
    else Megatron (no published run fits FSDP's factors with tensor parallelism inside)."""
    return "fsdp" if plan.zero == 3 and plan.tp == 1 else "megatron"


def terms(x: Ideal) -> tuple[float, ...]:
    """The ideal parts in the order of FLOORS."""
    moved = x.tensor_parallel + x.pipeline + x.data_parallel
    return x.matmul, x.elementwise + x.optimizer, moved, x.launches


@functools.cache
def fitted(family: str, stack: str) -> Factors:
    """Least squares of the relative error over the fit rows, no factor negative. A family without
    rows of the stack borrows A100's."""
    rows = [r for r in published.runs() if r.role == "fit" and r.stack == stack]
    own = [r for r in rows if r.cluster.family == family]
    chosen = own or [r for r in rows if r.cluster.family == "A100"]
    table = np.array([np.array(terms(r.ideal)) / r.step_s for r in chosen])
    matmul, elementwise, moved, launches = fit_bounded(
        table, np.ones(len(chosen)), np.array(FLOORS)
    )
    sources = ", ".join(dict.fromkeys(r.source for r in chosen))
    borrowed = "" if own else "A100 runs, borrowed: "
    origin = f"{borrowed}{len(chosen)} of {sources}"
    return Factors(matmul, elementwise, moved, launches, origin)


def fit_bounded(table: Array, target: Array, floors: Array) -> list[float]:
    """argmin |table x - target|^2 with x >= floors: the best over all sets of columns that are
    above theirs."""
    columns = range(table.shape[1])
    rest = target - table @ floors
    best, result = float(np.square(rest).sum()), floors.copy()
    for free in itertools.chain.from_iterable(
        itertools.combinations(columns, n) for n in range(1, len(columns) + 1)
    ):
        found = np.linalg.lstsq(table[:, free], rest, rcond=None)[0]
        error = float(np.square(table[:, free] @ found - rest).sum())
        if (found >= 0).all() and error < best - 1e-12:
            best, result = error, floors.copy()
            result[list(free)] += found
    return [float(x) for x in result]


def predict(plan: Sizing, work: Work, cluster: Cluster, stack: str = "") -> Step:
    """Seconds of one optimizer step by part; the pipeline's bubble is taken out of the others."""
    x = ideal(plan, work, cluster)
    f = fitted(cluster.family, stack or stack_of(plan))
    busy = 1.0 - x.bubble
    moved = {"tensor parallel": x.tensor_parallel, "pipeline": x.pipeline}
    parts = {
        "matrix products": x.matmul * f.matmul * busy,
        "elementwise": x.elementwise * f.elementwise * busy,
        "tensor parallel": moved["tensor parallel"] * f.communication * busy,
        "pipeline": moved["pipeline"] * f.communication,
        "data parallel": x.data_parallel * f.communication,
        "optimizer": x.optimizer * f.elementwise,
        "launches": x.launches * f.launches * busy,
    }
    rounds = x.matmul * f.matmul + x.elementwise * f.elementwise + x.launches * f.launches
    parts["bubble"] = x.bubble * (rounds + x.tensor_parallel * f.communication)
    seconds = sum(parts.values())
    available = seconds * cluster.chips * cluster.peak / plan.global_batch
    hfu = hardware_flops(work, plan.recompute) / available
    return Step(parts, seconds, model_flops(work) / available, hfu)
