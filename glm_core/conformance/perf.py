"""How fast a kernel is on a published model's shape, beside the reference on the same device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from glm_core.backends.base import Backend
from glm_core.backends.registry import use
from glm_core.bench.harness import interleave, ratio
from glm_core.conformance.case import Case
from glm_core.conformance.oracle import compute
from glm_core.spec import Cost

ROUNDS = 7


def measure(case: Case, backend: Backend) -> dict[str, object]:
    """Milliseconds, rates from the op's cost, and how many times faster than the reference;
    forward, and forward with backward where the op has one."""
    cost = case.op.cost(**case.sample.make(case.dtype))
    found: dict[str, object] = _row("forward", case, backend, "test", cost.flops, cost.bytes)
    if case.op.differentiable:
        both = Cost(cost.flops + cost.backward_flops, cost.bytes + cost.backward_bytes)
        found |= _row("forward_backward", case, backend, "grad", both.flops, both.bytes)
    return found


def _row(
    name: str, case: Case, backend: Backend, mode: str, flops: int, moved: int
) -> dict[str, object]:
    like = Case(case.op, case.sample, case.dtype, mode)
    args = case.sample.make(case.dtype, backend.device())
    contestants = {
        "kernel": _timed(like, backend, case.op, args),
        "reference": _timed(like, backend, case.op.reference, args),
    }
    times = interleave(contestants, ROUNDS)
    seconds = times["kernel"].median_s
    return {
        f"{name}_ms": seconds * 1e3,
        f"{name}_spread": times["kernel"].spread,
        f"{name}_tflops": flops / seconds / 1e12,
        f"{name}_gb_s": moved / seconds / 1e9,
        f"{name}_times_faster_than_reference": ratio(times["reference"], times["kernel"])["ratio"],
    }


def _timed(
    case: Case, backend: Backend, function: Callable[..., Any], args: Mapping[str, Any]
) -> Callable[[], None]:
    def call() -> None:
        with use(backend):
            compute(case, function, args)
            backend.synchronize()

    return call
