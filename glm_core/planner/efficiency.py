"""Fits how far real runs fall short of nominal rates, four factors for each chip family and
software stack, to published runs; predicts steps with them."""

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
"""smallest plausible factors of matmul, elementwise, communication and launches: at most 83 % of
the peak reached, half the counted bytes saved, four fifths of the traffic hidden"""


@dataclasses.dataclass(frozen=True, slots=True)
class Factors:
    """Real seconds for each ideal second, by kind of work."""

    matmul: float
    """1 / the share of the peak that matrix products reach"""
    elementwise: float
    communication: float
    """below 1 where communication overlaps with computation"""
    launches: float
    """seconds for each pass of a layer"""
    origin: str
    """number and sources of the runs they were fitted to"""


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """A predicted step."""

    parts: dict[str, float]
    """seconds by part"""
    seconds: float
    mfu: float
    hfu: float


def stack_of(plan: Sizing) -> str:
    """Returns the software stack whose factors a plan takes: FSDP where ranks share the weights and
    nothing else is split, else Megatron. No published run combines FSDP with tensor parallelism."""
    return "fsdp" if plan.zero == 3 and plan.tp == 1 else "megatron"


def terms(x: Ideal) -> tuple[float, ...]:
    """Returns the ideal seconds by factor, in the order of FLOORS."""
    communication = x.tensor_parallel + x.expert_parallel + x.pipeline + x.data_parallel
    return x.matmul, x.elementwise + x.optimizer, communication, x.launches


@functools.cache
def fitted(family: str, stack: str) -> Factors:
    """Returns the factors of a chip family under a stack: least squares of the relative error over
    the runs marked `fit`, none below its floor. A family without such runs borrows the A100's."""
    runs = [r for r in published.runs() if r.role == "fit" and r.stack == stack]
    own = [r for r in runs if r.cluster.family == family]
    chosen = own or [r for r in runs if r.cluster.family == "A100"]
    table = np.array([np.array(terms(r.ideal)) / r.step_s for r in chosen])
    matmul, elementwise, communication, launches = fit_bounded(
        table, np.ones(len(chosen)), np.array(FLOORS)
    )
    sources = ", ".join(dict.fromkeys(r.source for r in chosen))
    borrowed = "" if own else "A100 runs, borrowed: "
    origin = f"{borrowed}{len(chosen)} of {sources}"
    return Factors(matmul, elementwise, communication, launches, origin)


def fit_bounded(table: Array, target: Array, floors: Array) -> list[float]:
    """Returns argmin |table x - target|^2 with x >= floors. Tries every set of columns that may lie
    above their floors and takes the best."""
    columns = range(table.shape[1])
    residual = target - table @ floors
    best, result = float(np.square(residual).sum()), floors.copy()
    for free in itertools.chain.from_iterable(
        itertools.combinations(columns, n) for n in range(1, len(columns) + 1)
    ):
        above = np.linalg.lstsq(table[:, free], residual, rcond=None)[0]
        error = float(np.square(table[:, free] @ above - residual).sum())
        if (above >= 0).all() and error < best - 1e-12:
            best, result = error, floors.copy()
            result[list(free)] += above
    return [float(x) for x in result]


def predict(plan: Sizing, work: Work, cluster: Cluster, stack: str = "") -> Step:
    """Returns one optimizer step by part. The ideal parts include the pipeline's bubble, which
    becomes a part of its own."""
    x = ideal(plan, work, cluster)
    f = fitted(cluster.family, stack or stack_of(plan))
    busy = 1.0 - x.bubble
    parts = {
        "matrix products": x.matmul * f.matmul * busy,
        "elementwise": x.elementwise * f.elementwise * busy,
        "tensor parallel": x.tensor_parallel * f.communication * busy,
        "expert parallel": x.expert_parallel * f.communication * busy,
        "pipeline": x.pipeline * f.communication,
        "data parallel": x.data_parallel * f.communication,
        "optimizer": x.optimizer * f.elementwise,
        "launches": x.launches * f.launches * busy,
    }
    computing = x.matmul * f.matmul + x.elementwise * f.elementwise + x.launches * f.launches
    communicating = (x.tensor_parallel + x.expert_parallel) * f.communication
    parts["bubble"] = x.bubble * (computing + communicating)
    seconds = sum(parts.values())
    available = seconds * cluster.chips * cluster.peak / plan.global_batch
    hfu = hardware_flops(work, plan.recompute) / available
    return Step(parts, seconds, model_flops(work) / available, hfu)
