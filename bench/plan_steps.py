"""Times training steps of plans in this machine's own processes, and the parts such steps consist
of: a matrix product, a memory read, messages, and smaller steps of every rank alone. All are timed
in turn, on every rank at once. `measure` starts the processes; each of them runs this module."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from glm_core import ops
from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.bench import links
from glm_core.bench.comm import elements
from glm_core.bench.utilisation import RandomText
from glm_core.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from glm_core.distributed import comm, launch, mesh
from glm_core.distributed.parallel import ManyProcesses
from glm_core.distributed.plan import parse
from glm_core.errors import ConfigError, GlmCoreError
from glm_core.measure.timing import interleave
from glm_core.model.glm import GLM
from glm_core.model.presets import preset
from glm_core.planner.this_machine import MESSAGES, READ, SIDE, SIZES, StepAlone, Timings
from glm_core.training.batches import Batch
from glm_core.training.optimizer import Optimizer
from glm_core.training.trainer import Trainer

LIMIT_S = 900
Call = Callable[[], Any]


def measure(wanted: Timings) -> dict[str, list[float]]:
    """Returns the seconds of each round by contestant, those of the slowest rank. Raises
    GlmCoreError with what the processes said."""
    words = [
        sys.executable,
        "-m",
        "glm_core.bench.plan_steps",
        json.dumps(dataclasses.asdict(wanted)),
    ]
    return links.run_json(words, LIMIT_S, "plan measure:", "ask for less")


def contestants(wanted: Timings, backend: Backend, me: comm.Member) -> dict[str, Call]:
    """Returns what is timed, by name; every rank calls it in the same order."""
    # the backend's product: torch's own takes a second where a CPU has no bfloat16 units
    x, weight = (torch.randn(SIDE, SIDE).to(torch.bfloat16) for _ in range(2))
    found: dict[str, Call] = {
        "gemm bfloat16": functools.partial(ops.linear, x, weight),
        "memory read": torch.ones(READ // 4).sum,
    }
    model = preset(wanted.preset)
    for alone in wanted.alone:
        part = dataclasses.replace(model, num_layers=alone.num_layers, vocab=alone.vocab)
        found[alone.name] = alone_step(part, text(part, wanted.length, alone.batch))
    if wanted.messages:
        for name, dtype in MESSAGES.items():
            kind: torch.dtype = getattr(torch, dtype)
            for size in SIZES:
                count = elements(size, kind.itemsize, me.world)
                operation = "all_reduce" if name == "sum" else name
                found[f"{name} {size}"] = comm.operation(operation, count, kind, me).run
    for plan in wanted.plans:
        found[plan] = plan_step(plan, wanted, backend)
    return found


class Repeated:
    """Draws the same batch in every step."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def next(self, micro_batch: int) -> Batch:
        return self.batch

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing moves."""


def text(model: ModelConfig, length: int, batch: int) -> Batch:
    """Returns random tokens, the same in every process."""
    return RandomText(model.vocab, length).next(batch)


def alone_step(model: ModelConfig, batch: Batch) -> Call:
    """Returns a step by this process alone: forward, backward and update."""
    glm = GLM(model).init_weights(0).to(torch.bfloat16)
    optimizer = Optimizer(glm, TrainConfig(dtype="bfloat16"))
    weight = batch.loss_weight / batch.loss_weight.sum()

    def step() -> None:
        glm.zero_grad(set_to_none=True)
        loss = glm.loss(
            batch.tokens, batch.positions, batch.key_start, batch.key_end, batch.labels, weight
        )
        loss.backward()
        optimizer.step(1e-4)

    return step


def plan_step(plan: str, wanted: Timings, backend: Backend) -> Call:
    """Returns the real trainer's step under the plan, always on the same batch."""
    model, cut = preset(wanted.preset), parse(plan)
    vocab = min(DataConfig().vocab, model.vocab)
    config = RunConfig(
        model=model,
        data=DataConfig(length=wanted.length, vocab=vocab),
        train=TrainConfig(
            global_batch=wanted.global_batch,
            micro_batch=1,
            dtype="bfloat16",
            lr=1e-4,
            backend=backend.name,
        ),
    )
    axes = mesh.make(cut, backend.device_type)
    parallel = ManyProcesses(config, cut, axes, backend, backend.device())
    batch = text(model, wanted.length, wanted.global_batch)
    return Trainer(config, Repeated(batch), parallel).step


def together(calls: dict[str, Call]) -> Iterator[tuple[str, Call]]:
    """Yields a barrier before each call, which is not timed with it."""
    for name, call in calls.items():
        yield f"all arrived {name}", comm.barrier
        yield name, call


def member(wanted: Timings) -> dict[str, list[float]]:
    """Does one process's part; returns the same on all."""
    backend = registry.usable("cpu")
    with comm.process_group(backend, 600.0) as me, registry.use(backend):
        calls = contestants(wanted, backend, me)
        with contextlib.redirect_stderr(io.StringIO() if me.rank else sys.stderr):
            timing = interleave(dict(together(calls)), wanted.rounds)
        return {name: comm.slowest_times(list(timing[name].seconds), me) for name in calls}


def main() -> int:
    """Returns exit code 1 where a process failed, 2 for a request that is not valid."""
    request = json.loads(sys.argv[1])
    try:
        if "RANK" not in os.environ:
            words = ["-m", "glm_core.bench.plan_steps", sys.argv[1]]
            launch.run_locally(request["processes"], words)
            return 0
        alone = tuple(StepAlone(**a) for a in request["alone"])
        timings = member(Timings(**request | {"alone": alone, "plans": tuple(request["plans"])}))
        if os.environ["RANK"] == "0":
            print(json.dumps(timings), flush=True)
        return 0
    except GlmCoreError as error:
        print(f"glm_core.bench.plan_steps: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    raise SystemExit(main())
