"""Times exact arithmetic against the fast one, in turn: `python -m glm_core.bench.exact`.

A training step (backend `cpu`, the trainer's own), decoding, reading a prompt, and the ops that
take the time, forward and backward. Times are CPU time of all threads. A ratio above 1 is what
`exact` costs (docs/exact.md)."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from glm_core import ops
from glm_core.backends.registry import use
from glm_core.bench.utilisation import RandomText
from glm_core.config import ModelConfig, RunConfig, TrainConfig
from glm_core.measure.noise import NoiseWatch
from glm_core.measure.timing import interleave, machine, ratio
from glm_core.model.glm import GLM
from glm_core.model.presets import preset
from glm_core.model.prompt import causal
from glm_core.model.runner import DecodeRow, Runner
from glm_core.training.trainer import Trainer

BATCH, LENGTH = 4, 256
PROMPT = 256
Work = Callable[[], Any]


def on_cpu(exact: bool) -> AbstractContextManager[Any]:
    """Returns a session on the `cpu` backend."""
    return use("cpu", strict=True, exact=exact)


def step(config: ModelConfig, dtype: str, exact: bool) -> Work:
    """Returns a step of the trainer: forward, backward, clip, AdamW."""
    train = TrainConfig(
        dtype=dtype,  # type: ignore[arg-type]  # checked by TrainConfig
        exact=exact,
        micro_batch=BATCH,
        global_batch=BATCH,
    )
    trainer = Trainer(RunConfig(model=config, train=train), RandomText(config.vocab, LENGTH))

    def work() -> None:
        with on_cpu(exact):
            trainer.step()

    return work


def decoding(model: GLM, exact: bool) -> Work:
    """Returns a decode step of one sequence behind a prompt."""
    prompt, places = (
        causal([i % model.config.vocab for i in range(PROMPT)]),
        itertools.count(PROMPT),
    )
    runner = Runner(model, 1)
    with on_cpu(exact):
        runner.prefill(0, [prompt])

    def work() -> None:
        with on_cpu(exact):
            runner.decode([DecodeRow(1, prompt, next(places))])

    return work


def reading(model: GLM, exact: bool) -> Work:
    """Returns the reading of a prompt."""
    prompt, runner = causal([i % model.config.vocab for i in range(PROMPT)]), Runner(model, 1)

    def work() -> None:
        with on_cpu(exact):
            runner.prefill(0, [prompt])

    return work


def calls(
    config: ModelConfig, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[..., Tensor], list[Tensor]]]:
    """Yields the ops of a layer and the loss at the step's sizes: name, function, and the arguments
    that get gradients."""
    c, rows = config, BATCH * LENGTH
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to(dtype).requires_grad_()

    def matrix(features: int) -> Tensor:
        """Returns a weight whose products have the variance of their inputs."""
        return drawn(features, c.hidden, std=c.hidden**-0.5)

    x, heads = drawn(BATCH, LENGTH, c.hidden), drawn(BATCH, LENGTH, c.num_heads, c.head_dim)
    yield "linear", ops.linear, [x, matrix(2 * c.ffn)]
    end = torch.arange(1, LENGTH + 1, dtype=torch.int32).expand(BATCH, -1)
    start, scale = torch.zeros_like(end), c.head_dim**-0.5
    yield (
        "attention",
        lambda q, k, v: ops.attention(q, k, v, start, end, scale),
        [heads, *(drawn(BATCH, LENGTH, c.num_kv_heads, c.head_dim) for _ in "kv")],
    )
    yield "rms_norm", ops.rms_norm, [x, drawn(c.hidden)]
    yield "swiglu", ops.swiglu, [drawn(BATCH, LENGTH, 2 * c.ffn)]
    labels = torch.randint(c.vocab, (rows,), generator=generator)
    weight = torch.full((rows,), 1 / rows)
    yield (
        "linear_cross_entropy",
        lambda h, w: ops.linear_cross_entropy(h, w, labels, weight),
        [drawn(rows, c.hidden), matrix(c.vocab)],
    )


def one_op(
    function: Callable[..., Tensor], args: list[Tensor], backward: bool, exact: bool
) -> Work:
    """Returns the op's forward, or forward and backward."""
    like = torch.ones_like(function(*args)) if backward else None

    def work() -> None:
        with on_cpu(exact), torch.set_grad_enabled(backward):
            y = function(*args)
            if like is not None:
                torch.autograd.grad(y, args, like)

    return work


def contestants(config: ModelConfig, dtype: str) -> Iterator[tuple[str, dict[str, Work]]]:
    """Yields what is timed: name, and the work by kind."""
    kinds = {"fast": False, "exact": True}
    yield "training step", {k: step(config, dtype, e) for k, e in kinds.items()}
    model = GLM(config).init_weights(0).to(getattr(torch, dtype))
    yield "decode, 1 row", {k: decoding(model, e) for k, e in kinds.items()}
    yield f"prompt of {PROMPT}", {k: reading(model, e) for k, e in kinds.items()}
    for name, function, args in calls(config, getattr(torch, dtype)):
        for label, backward in ((f"{name} forward", False), (f"{name} both", True)):
            yield label, {k: one_op(function, args, backward, e) for k, e in kinds.items()}


def measure(config: ModelConfig, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """Returns a row for each piece of work: median times and the ratio exact / fast."""
    rows = []
    for name, works in contestants(config, dtype):
        timing = interleave(works, rounds, clock=time.process_time)
        figures = ratio(timing["exact"], timing["fast"])
        times = {f"{k}_ms": round(t.median_s * 1e3, 3) for k, t in timing.items()}
        rows.append({"work": name, "dtype": dtype, **times, **figures})
        print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="glm4-34m")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    config, watch = preset(args.preset), NoiseWatch()
    rows = [
        row
        for dtype in args.dtype or ["float32", "bfloat16"]
        for row in measure(config, dtype, args.rounds)
    ]
    print(json.dumps({"machine": machine(), "notes": watch.notes(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
