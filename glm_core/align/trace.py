"""What one run leaves behind for the verdict: one portable file, bounded, read without torch."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_core.align import trace_format
from glm_core.errors import TraceError

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """One recorded run. N steps, K controls, S captured steps, P parameters, J benign disguises,
    C op calls, T tests, W numbers in a sketch. Every array is float64; where teacher forcing was
    not done, S, C and T are 0."""

    config: dict[str, Any]
    """the resolved RunConfig as plain values"""
    backend: str
    dtype: str
    loss: Array
    """[N]"""
    grad_norm: Array
    """[N], before clipping"""
    control_names: list[str]
    """how each control run differs from the reference; only the reference's trace has any"""
    control_loss: Array
    """[K, N]"""
    capture_steps: list[int]
    """steps at which both sides were given the same inputs, counted from 1"""
    parameters: list[str]
    gradient_norm: Array
    """[S, P]"""
    gradient_sketch: Array
    """[S, P, W]: random projections, the same directions in every trace"""
    loss_error: Array
    """[1 + J, S]: |loss - float64 loss| / |float64 loss|; row 0 this run, then the disguises"""
    gradient_error: Array
    """[1 + J, S, P]: |gradient - float64 gradient| / |float64 gradient|; rows as in loss_error"""
    disguises: list[str]
    """the J ways in which the reference itself was computed differently, the plain one first"""
    calls: list[dict[str, Any]]
    """C entries: step, call, op, layer, direction, tensor"""
    digest: Array
    """[C, W]: sketches of the results of each call in `calls`"""
    tests: list[dict[str, Any]]
    """T entries: op, direction, tensor, layer, step, call, dtype, shape, projection; of each family
    of tests (op, tensor, kind of group, statistic) the worst, pooled over calls and for one call"""
    test_values: Array
    """[T, 3]: effect, standard error, limit of the benign range (margin included)"""
    num_tests: int
    """tests made for `tests`"""
    fallbacks: list[dict[str, Any]]
    """op, reason, count: what ran on the reference instead of a kernel"""
    environment: dict[str, Any]
    data_order: str
    """sha256 over the inputs of all steps, in order"""
    initial_weights: str
    """sha256 over the float32 starting weights"""
    seconds: float

    def save(self, path: str | Path) -> None:
        """Writes the file whole or not at all. Raises TraceError where the disk refuses or the
        trace is larger than `load` takes."""
        path = Path(path)
        content = trace_format.encode(self)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(content)
            os.replace(part, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            raise TraceError(f"trace {path}: cannot be written ({error}); free the disk") from None

    def __post_init__(self) -> None:
        trace_format.check(self)


def load(path: str | Path) -> Trace:
    """Reads and checks a trace. Raises TraceError for a file that is missing, too large, truncated,
    foreign, of another version, or malformed."""
    try:
        return Trace(**trace_format.read(Path(path)))
    except TraceError as error:
        text = "".join(c if c.isprintable() else "?" for c in str(error))
        raise TraceError(f"trace {path}: {text[:400]}") from None
