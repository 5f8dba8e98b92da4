"""What dispatch costs: an op call through the active backend against the bare kernel, `python -m
glm_core.bench.dispatch`."""

from __future__ import annotations

import argparse
import json
import statistics
import timeit
from collections.abc import Sequence

import torch
from torch import Tensor

from glm_core import ops
from glm_core.backends.base import Backend
from glm_core.backends.registry import use
from glm_core.bench.harness import machine
from glm_core.spec import SUPPORTED, Support

CALLS = 20_000
LIMIT_US = 5.0


def samples(rounds: int) -> tuple[list[float], list[float]]:
    """Seconds a call in each round, through the op and of the bare kernel, in turn: a kernel that
    does nothing, with a predicate."""
    backend = Backend(name="bench", device_type="cpu", verified="does nothing, by design")

    def supports(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Support:
        return SUPPORTED

    @backend.implements(ops.rms_norm, supports)
    def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
        return x

    x = torch.zeros(1)
    through, bare = [], []
    with use(backend):
        for _ in range(rounds):
            through.append(timeit.timeit(lambda: ops.rms_norm(x, x, 1e-5), number=CALLS) / CALLS)
            bare.append(timeit.timeit(lambda: rms_norm(x, x, 1e-5), number=CALLS) / CALLS)
    return through, bare


def overhead(through: Sequence[float], bare: Sequence[float]) -> dict[str, float]:
    """Microseconds that dispatch adds to one call: median and quartiles of the rounds."""
    added = [(a - b) * 1e6 for a, b in zip(through, bare, strict=True)]
    low, middle, high = statistics.quantiles(added, n=4) if len(added) > 1 else added * 3
    return {"overhead_us": middle, "low_us": low, "high_us": high, "limit_us": LIMIT_US}


def measure(rounds: int = 15) -> dict[str, object]:
    """Microseconds that dispatch adds to one call; median of `rounds`."""
    return overhead(*samples(rounds)) | {"machine": machine()}


def main() -> int:
    """Exit 1 where dispatch costs more than its limit."""
    parser = argparse.ArgumentParser(prog="python -m glm_core.bench.dispatch", description=__doc__)
    parser.add_argument("--json", action="store_true")
    result = measure()
    text = "dispatch adds {overhead_us:.2f} us a call ({low_us:.2f} ... {high_us:.2f})"
    print(json.dumps(result) if parser.parse_args().json else text.format(**result))
    return int(result["overhead_us"] > result["limit_us"])  # type: ignore[operator]


if __name__ == "__main__":
    raise SystemExit(main())
