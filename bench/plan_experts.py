"""Predicts steps of models with experts by factors that were fitted to dense ones, and measures
them: `python -m glm_core.bench.plan_experts`.

One process of one thread takes every step in turn. Its CPU seconds count, to which other processes
add none but by the caches and the memory that they share; the fastest round counts."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from glm_core import ops
from glm_core.backends import registry
from glm_core.bench.plan_steps import alone_step, text
from glm_core.config import ModelConfig
from glm_core.measure.timing import interleave, machine
from glm_core.model.presets import preset
from glm_core.planner import cluster
from glm_core.planner.cost import Work, ideal
from glm_core.planner.efficiency import fit_bounded, terms
from glm_core.planner.sizing import Sizing
from glm_core.planner.this_machine import READ, SIDE

PARTS = ("matmul", "elementwise", "launches")
LENGTH = 128
"""tokens of a sequence"""
Step = tuple[ModelConfig, int]
"""a model, and the sequences of its step"""
DENSE = {
    "num_experts": 0,
    "experts_per_token": 0,
    "expert_ffn": 0,
    "num_shared_experts": 0,
    "num_dense_layers": 0,
    "num_mtp_layers": 0,
}


def dense() -> dict[str, Step]:
    """Returns the steps that the factors are fitted to: they differ in width, layers, vocabulary
    and batch."""
    sizes = (
        (4, 128, 344, 4096, 4),
        (4, 128, 344, 1024, 1),
        (8, 128, 344, 1024, 4),
        (2, 256, 704, 4096, 2),
        (4, 256, 704, 1024, 4),
        (2, 512, 1408, 1024, 4),
        (2, 512, 5632, 1024, 2),
    )
    steps: dict[str, Step] = {}
    for layers, hidden, ffn, vocab, batch in sizes:
        changes = {"num_layers": layers, "hidden": hidden, "ffn": ffn, "vocab": vocab}
        model = preset("tiny-moe", **DENSE, **changes)
        steps[f"dense {layers} layers, {hidden} {ffn} {vocab}, batch {batch}"] = (model, batch)
    return steps


def sparse() -> dict[str, Step]:
    """Returns the steps that are predicted."""
    wide = {"num_layers": 3, "hidden": 512, "ffn": 1408, "expert_ffn": 704, "num_mtp_layers": 0}
    models = {
        "tiny-moe": preset("tiny-moe"),
        "without further tokens": preset("tiny-moe", num_mtp_layers=0),
        "64 experts": preset("tiny-moe", num_experts=64),
        "512 wide": preset("tiny-moe", **wide),
    }
    return {f"{name}, batch {b}": (model, b) for name, model in models.items() for b in (1, 4)}


def cpu_seconds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Returns the CPU seconds of each call's fastest round, after one that does not count."""
    took = interleave(calls, rounds, warmup=1, clock=time.process_time)
    return {name: min(t.seconds) for name, t in took.items()}


def nominal(model: ModelConfig, batch: int, here: cluster.Cluster) -> NDArray[np.float64]:
    """Returns the planner's seconds of a step at nominal rates, by PARTS."""
    plan = Sizing(micro_batch=batch, global_batch=batch)
    products, elementwise, _, launches = terms(ideal(plan, Work(model=model, seq=LENGTH), here))
    return np.array([products, elementwise, launches])


def measure(rounds: int) -> dict[str, Any]:
    """Returns the fitted factors, and each step's predicted and measured seconds."""
    steps = {**dense(), **sparse()}
    x, weight = (torch.randn(SIDE, SIDE).to(torch.bfloat16) for _ in range(2))
    calls: dict[str, Callable[[], Any]] = {
        "product": functools.partial(ops.linear, x, weight),
        "read": torch.ones(READ // 4).sum,
    }
    with registry.use("cpu"):
        for name, (model, batch) in steps.items():
            calls[name] = alone_step(model, text(model, LENGTH, batch))
        seconds = cpu_seconds(calls, rounds)
    here = dataclasses.replace(
        cluster.preset("CPU", 1),
        peak=2.0 * SIDE**3 / seconds["product"],
        memory_bandwidth=READ / seconds["read"],
    )
    table = {name: nominal(*step, here) for name, step in steps.items()}
    fitted = np.array([table[name] / seconds[name] for name in dense()])
    factors = np.array(fit_bounded(fitted, np.ones(len(fitted)), np.zeros(len(PARTS))))
    predicted = {name: float(table[name] @ factors) for name in steps}
    errors = {name: predicted[name] / seconds[name] - 1 for name in steps}
    return {
        "machine": machine(),
        "factors": dict(zip(PARTS, factors.tolist(), strict=True)),
        "rows": [
            {"step": n, "predicted_s": predicted[n], "measured_s": seconds[n], "error": errors[n]}
            for n in steps
        ],
        "median_abs_error_dense": statistics.median(abs(errors[n]) for n in dense()),
        "median_abs_error_sparse": statistics.median(abs(errors[n]) for n in sparse()),
    }


def main() -> int:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m glm_core.bench.plan_experts", description=__doc__
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(measure(args.rounds), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
