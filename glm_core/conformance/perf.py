"""Times a kernel on a published model's shape, and the reference on the same device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from glm_core.backends.base import Backend
from glm_core.backends.registry import use
from glm_core.conformance.case import Case
from glm_core.conformance.oracle import Results, leaf, output_gradient, tensors_by_name
from glm_core.dispatch import Op
from glm_core.measure.timing import interleave, ratio

ROUNDS = 7


def measure(case: Case, backend: Backend) -> dict[str, object]:
    """Returns by name, for forward and (where the op has a backward) for forward with backward:
    milliseconds, rates by the op's cost, and how many times faster the kernel is than the
    reference."""
    figures: dict[str, object] = {}
    for name, flops, moved, contestants in calls(case, backend):
        with use(backend):
            times = interleave(contestants, ROUNDS)
        seconds = times["kernel"].median_s
        figures |= {
            f"{name}_ms": seconds * 1e3,
            f"{name}_spread": times["kernel"].spread,
            f"{name}_tflops": flops / seconds / 1e12,
            f"{name}_gb_s": moved / seconds / 1e9,
            f"{name}_times_faster_than_reference": ratio(times["reference"], times["kernel"])[
                "ratio"
            ],
        }
    return figures


Prepare = Callable[[Op, Callable[..., Any], Mapping[str, Any]], Callable[[], Any]]
Direction = tuple[str, int, int, dict[str, Callable[[], Any]]]
"""(forward or forward_backward, FLOPs, bytes, what to time: kernel and reference)"""


def calls(case: Case, backend: Backend) -> Iterator[Direction]:
    """Yields what to time on the backend's device. Backward is timed together with its forward,
    because a kernel may move work from one to the other."""
    args = case.sample.make(case.dtype, backend.device())
    cost = case.op.cost(**case.sample.make(case.dtype))
    yield "forward", cost.flops, cost.bytes, _pair(backend, _forward, case.op, args)
    if case.op.differentiable:
        flops, moved = cost.flops + cost.backward_flops, cost.bytes + cost.backward_bytes
        yield "forward_backward", flops, moved, _pair(backend, _both, case.op, args)


def _pair(backend: Backend, prepare: Prepare, op: Op, args: Any) -> dict[str, Callable[[], Any]]:
    return {
        "kernel": _synchronized(backend, prepare(op, op, args)),
        "reference": _synchronized(backend, prepare(op, op.reference, args)),
    }


def _synchronized(backend: Backend, call: Callable[[], Any]) -> Callable[[], None]:
    def timed() -> None:
        call()
        backend.synchronize()

    return timed


def _forward(op: Op, function: Callable[..., Any], args: Mapping[str, Any]) -> Callable[[], Any]:
    def call() -> None:
        with torch.no_grad():
            function(**args)

    return call


def _both(op: Op, function: Callable[..., Any], args: Mapping[str, Any]) -> Callable[[], Any]:
    leaves: Results = {}
    args = {k: leaf(k, v, leaves) if k in op.differentiable else v for k, v in args.items()}
    outputs = tensors_by_name("out", op.reference(**args))
    drawn = [output_gradient(i, y, strided=False) for i, y in enumerate(outputs.values())]

    def call() -> None:
        outputs = list(tensors_by_name("out", function(**args)).values())
        torch.autograd.grad(outputs, list(leaves.values()), drawn)

    return call
