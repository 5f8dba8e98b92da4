"""Defines the trace: what one run leaves behind for the verdict. It is saved as one portable file
of bounded size, and read without torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_core.align import trace_format
from glm_core.align.trace_format import FallbackCount, OpResult, OpTest, PlanTest, Routing
from glm_core.errors import TraceError

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """One recorded run. Sizes: N steps, K controls, M steps and Q controls of a float16 run, S
    captured steps, P parameters, J disguises, C op results, T tests, W numbers in a sketch. Every
    array is float64. S, C and T are 0 where teacher forcing was left out."""

    config: dict[str, Any]
    """the resolved RunConfig as plain values"""
    backend: str
    dtype: str
    loss: Array
    """[N]"""
    grad_norm: Array
    """[N], before clipping"""
    control_names: list[str]
    """how each control run differs from the reference; empty in a candidate's trace"""
    control_loss: Array
    """[K, N]"""
    capture_steps: list[int]
    """steps, from 1, whose inputs were captured and given to both sides"""
    parameters: list[str]
    gradient_norm: Array
    """[S, P]"""
    gradient_sketch: Array
    """[S, P, W]: random projections; every trace uses the same directions"""
    loss_error: Array
    """[1 + J, S]: |loss - float64 loss| / |float64 loss|; row 0 is this run, then the disguises"""
    gradient_error: Array
    """[1 + J, S, P]: |gradient - float64 gradient| / |float64 gradient|; rows as in loss_error"""
    disguises: list[str]
    """the J ways in which the reference was computed; the first is the plain reference"""
    calls: list[OpResult]
    """C op results of this run"""
    digest: Array
    """[C, W]: the sketch of each result in `calls`"""
    tests: list[OpTest]
    """T tests: the worst one of each family (op, tensor, kind of group, statistic, pooled or
    not)"""
    test_values: Array
    """[T, 3]: effect, standard error, limit of the benign range (safety factor included)"""
    num_tests: int
    """how many tests were made, of which `tests` holds the worst"""
    fallbacks: list[FallbackCount]
    """the calls that ran the op's reference because there was no kernel for them"""
    environment: dict[str, Any]
    """the machine and its software, see align.machine"""
    data_order: str
    """sha256 over the inputs of all steps, in order"""
    initial_weights: str
    """sha256 over the float32 starting weights"""
    seconds: float
    """how long recording took"""
    loss_scale: Array = dataclasses.field(default_factory=lambda: np.zeros(0))
    """[M]: of each step; M is 0 where nothing scales the loss, and in older traces"""
    skipped: Array = dataclasses.field(default_factory=lambda: np.zeros(0))
    """[M]: 1 where a gradient overflowed and the update was left out, else 0"""
    control_loss_scale: Array = dataclasses.field(default_factory=lambda: np.zeros((0, 0)))
    """[Q, M]"""
    control_skipped: Array = dataclasses.field(default_factory=lambda: np.zeros((0, 0)))
    """[Q, M]"""
    moved_tokens: Array = dataclasses.field(default_factory=lambda: np.zeros((0, 0)))
    """[E, U], E = 1 + J and U = S: tokens that have other experts than in float64; rows as in
    loss_error. Both are 0 in older traces"""
    routing: list[Routing] = dataclasses.field(default_factory=list)
    """each captured router call of this run, judged by its margins; empty without experts"""
    plan_tests: list[PlanTest] = dataclasses.field(default_factory=list)
    """norm, copies and update of each captured step under a plan; empty on one process"""

    def save(self, path: str | Path) -> None:
        """Writes the file, whole or not at all. Raises TraceError where the disk refuses it or the
        trace is larger than `load` accepts."""
        content = trace_format.encode(self)
        trace_format.write_whole(Path(path), "trace", lambda part: part.write_bytes(content))

    def __post_init__(self) -> None:
        trace_format.check(self)


def load(path: str | Path) -> Trace:
    """Reads and checks a trace. Raises TraceError for a file that is missing, too large, truncated,
    malformed, no trace at all, or of another version."""
    try:
        return Trace(**trace_format.read(Path(path)))
    except TraceError as error:
        text = "".join(c if c.isprintable() else "?" for c in str(error))
        raise TraceError(f"trace {path}: {text[:400]}") from None
