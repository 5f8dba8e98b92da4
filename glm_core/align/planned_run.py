"""Runs a candidate under a plan, in processes on this host, and records it as a candidate that is
held to the reference's run on one process. Op calls are not judged: a plan changes none of them.
What the ranks do with their gradients is: the norm, the copies and the update."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glm_core.align.calibration import Calibration, loss_scales
from glm_core.align.gradients import NUM_SKETCH, Sketches, distance, following, loss_error
from glm_core.align.machine import machine_facts
from glm_core.align.plan_tests import (
    assembled,
    choice_of_all,
    chosen_experts,
    first_update,
    plan_tests,
)
from glm_core.align.trace import Trace
from glm_core.align.training import Run, Snapshot, free_run, split
from glm_core.align.verdict import gradient_floor
from glm_core.backends import registry
from glm_core.config import RunConfig, from_dict, to_dict
from glm_core.distributed import apply, launch, mesh
from glm_core.distributed.layout import take
from glm_core.distributed.parallel import ManyProcesses
from glm_core.distributed.plan import parse
from glm_core.training.batches import Batch, global_batch
from glm_core.training.optimizer import own_part

Start = Callable[[int, Path], None]
"""starts so many processes that call `work` on the folder, and waits for them"""
TIMEOUT_S = 600.0
"""the longest that one collective may take where no timeout is given"""


def start_processes(world: int, folder: Path) -> None:
    """Starts the ranks by torchrun. Raises TrainingError where one fails."""
    launch.run_locally(world, ["-m", "glm_core.align.planned_run", str(folder)])


def record_plan(
    cal: Calibration,
    backend: str,
    plan: str,
    *,
    free_run: bool = True,
    teacher_forcing: bool = True,
    timeout_s: float = 0.0,
    start: Start = start_processes,
) -> Trace:
    """Returns the trace of the calibrated config on `backend` under `plan`: a free training run,
    and the gradients of the captured steps. Raises TrainingError where a process fails."""
    begin, config = time.perf_counter(), cal.config
    with TemporaryDirectory(prefix="glm-core-align-") as name:
        folder = Path(name)
        request = {
            "config": to_dict(config),
            "backend": backend,
            "plan": plan,
            "batches": drawn(cal) if free_run else [],
            "snapshots": cal.snapshots if teacher_forcing else [],
            "timeout_s": timeout_s or TIMEOUT_S,
        }
        torch.save(request, folder / "request.pt")
        start(parse(plan).world, folder)
        ranks = [
            torch.load(folder / f"{rank}.pt", weights_only=False)
            for rank in range(parse(plan).world)
        ]
    curve = ranks[0]["curve"]
    environment = machine_facts(registry.usable(backend))
    reference = cal.reference
    return Trace(
        config=to_dict(config),
        backend=f"{backend} under {plan}",
        dtype=config.train.dtype,
        loss=curve.loss if curve else np.zeros(0),
        grad_norm=curve.grad_norm if curve else np.zeros(0),
        control_names=[],
        control_loss=np.zeros((0, config.train.steps if free_run else 0)),
        **(loss_scales(config, curve) if curve else {}),
        **_gradients(cal, ranks, teacher_forcing),
        parameters=reference.parameters,
        disguises=reference.disguises,
        calls=[],
        digest=np.zeros((0, NUM_SKETCH)),
        tests=[],
        test_values=np.zeros((0, 3)),
        num_tests=0,
        fallbacks=curve.fallbacks if curve else [],
        environment={**environment, "plan": plan, "one process": backend},
        data_order=curve.data_order if curve else reference.data_order,
        initial_weights=reference.initial_weights,
        seconds=time.perf_counter() - begin,
    )


def drawn(cal: Calibration) -> list[Batch]:
    """Returns the global batch of every step."""
    sampler, train, batches = cal.sampler(), cal.config.train, list[Batch]()
    for _ in range(train.steps):
        seen = sum(len(batch.tokens) for batch in batches)
        batches.append(sampler.next(global_batch(train, seen)))
    return batches


def _gradients(cal: Calibration, ranks: list[Any], judged: bool) -> dict[str, Any]:
    """Returns the trace's fields about the captured steps, from what the ranks hold."""
    reference, sketches = cal.reference, Sketches(cal.reference.parameters)
    losses, errors, moved, tests = list[float](), list[list[float]](), list[int](), list[Any]()
    floor = gradient_floor(reference)
    for s, snapshot in enumerate(cal.snapshots if judged else []):
        held = [rank["captured"][s] for rank in ranks]
        exact, tokens = following(cal.config, snapshot, cal.oracle[s], choice_of_all(held))
        shapes = {n: exact.gradients[n].shape for n in sketches.names}
        whole = assembled([chunk for of_rank in held for chunk in of_rank["gradients"]], shapes)
        losses.append(loss_error(held[0]["loss"], exact))
        errors.append([distance(whole[n], exact.gradients[n]) for n in sketches.names])
        moved.append(tokens)
        sketches.add(whole)
        train = cal.config.train
        tests += plan_tests(snapshot.step, held, whole, snapshot.weights, train, floor)
    shape = (1, len(losses), len(sketches.names))
    steps = slice(len(losses))
    return {
        "capture_steps": reference.capture_steps if judged else [],
        **sketches.fields(),
        "loss_error": np.concatenate(([losses], reference.loss_error[1:, steps])),
        "gradient_error": np.concatenate(
            (np.reshape(errors, shape), reference.gradient_error[1:, steps])
        ),
        "moved_tokens": np.concatenate(([moved], reference.moved_tokens[1:, steps])).astype(float),
        "plan_tests": tests,
    }


class Drawn:
    """A sampler over the batches that `drawn` returned."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches, self.index = batches, 0

    def next(self, micro_batch: int) -> Batch:
        """Returns the next global batch."""
        self.index += 1
        return self.batches[self.index - 1]

    def state(self) -> dict[str, Any]:
        """Returns the position, for `restore`."""
        return {"index": self.index}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to a position that `state` returned."""
        self.index = state["index"]


def work(folder: str) -> None:
    """Does one rank's part of the request in `folder`, and writes there what it holds."""
    torch.set_num_threads(1)
    request = torch.load(Path(folder) / "request.pt", weights_only=False)
    config: RunConfig = from_dict(RunConfig, request["config"])
    backend, timeout_s = registry.usable(request["backend"]), request["timeout_s"]
    device = mesh.start(backend, timeout_s)
    try:
        axes = mesh.make(parse(request["plan"]), device.type, timeout_s)
        with registry.use(backend):
            plan = parse(request["plan"])
            parallel = ManyProcesses(config, plan, axes, backend, device, timeout_s)
            run = Run(config, Drawn(request["batches"]), backend, parallel=parallel)
        curve = free_run(run) if request["batches"] else None
        captured = [_captured(run, parallel, snapshot) for snapshot in request["snapshots"]]
        held = {"curve": curve, "captured": captured}
        torch.save(held, Path(folder) / f"{axes.get_rank()}.pt")
    finally:
        mesh.leave()


def _captured(run: Run, here: ManyProcesses, snapshot: Snapshot) -> dict[str, Any]:
    """Returns the loss of a captured step, the experts it chose, the gradient norm, and this
    process's part of the gradients and of the weights after a first update."""
    weights = apply.own_values(
        here.model,
        here.config.model,
        here.place,
        lambda name, splits: take(snapshot.weights[name], splits),
    )
    run.loss_scale.scale = scale = snapshot.loss_scale
    run.optimizer.load_masters({n: w.to(here.device) for n, w in weights.items()})
    rows = sum(len(batch.tokens) for batch in snapshot.batches)
    with registry.use(here.backend), chosen_experts(here) as chosen:
        loss = float(run.backward(split(snapshot.batches, rows)))
    named = dict(here.model.named_parameters())
    gradients: dict[str, Tensor] = {}
    for name, p in named.items():
        own = own_part(p if p.grad is None else p.grad).detach().cpu().double()
        gradients[name] = own * 0 if p.grad is None else own / scale
    with registry.use(here.backend):
        norm = first_update(run.optimizer, scale)
    return {
        "loss": loss,
        "chosen": chosen,
        "tp_rank": here.place.tp_rank,
        "gradients": here.held(gradients),
        "norm": norm,
        "updated": [name for name, p in named.items() if p.grad is not None],
        "weights": here.held({n: w.cpu() for n, w in run.optimizer.master.items()}),
    }


if __name__ == "__main__":
    work(*sys.argv[1:])
