"""Runs a candidate under a plan, in processes on this host, and records it as a candidate that is
held to the reference's run on one process. Op calls are not judged: a plan changes none of them."""

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
from glm_core.align.gradients import NUM_SKETCH, distance, sketch
from glm_core.align.machine import machine_facts
from glm_core.align.trace import Trace
from glm_core.align.training import Run, Snapshot, free_run, split
from glm_core.backends import registry
from glm_core.config import RunConfig, from_dict, to_dict
from glm_core.data.sampler import Batch
from glm_core.distributed import apply, launch, mesh
from glm_core.distributed.layout import take
from glm_core.distributed.parallel import Chunk, ManyProcesses
from glm_core.distributed.plan import parse
from glm_core.errors import TrainingError
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
    steps = config.train.steps if free_run else 0
    sampler = cal.sampler()
    with TemporaryDirectory(prefix="glm-core-align-") as name:
        folder = Path(name)
        request = {
            "config": to_dict(config),
            "backend": backend,
            "plan": plan,
            "batches": [sampler.next(config.train.global_batch) for _ in range(steps)],
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
        control_loss=np.zeros((0, steps)),
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


def _gradients(cal: Calibration, ranks: list[Any], judged: bool) -> dict[str, Any]:
    """Returns the trace's fields about the captured steps, from what the ranks hold."""
    names = cal.reference.parameters
    steps, p, j = len(cal.snapshots) if judged else 0, len(names), 1 + len(cal.reference.disguises)
    norms, sketches = np.zeros((steps, p)), np.zeros((steps, p, NUM_SKETCH))
    losses, errors = np.zeros((j, steps)), np.zeros((j, steps, p))
    for s in range(steps):
        true_loss, true, _ = cal.oracle[s]
        chunks = [chunk for rank in ranks for chunk in rank["captured"][s]["chunks"]]
        whole = assembled(chunks, {n: true[n].shape for n in names})
        losses[0, s] = abs(ranks[0]["captured"][s]["loss"] - true_loss) / max(
            abs(true_loss), 1e-300
        )
        errors[0, s] = [distance(whole[n], true[n]) for n in names]
        norms[s] = [float(whole[n].norm()) for n in names]
        sketches[s] = [sketch(whole[n]) for n in names]
    if steps:
        losses[1:], errors[1:] = cal.reference.loss_error[1:], cal.reference.gradient_error[1:]
    return {
        "capture_steps": cal.reference.capture_steps if judged else [],
        "gradient_norm": norms,
        "gradient_sketch": sketches,
        "loss_error": losses,
        "gradient_error": errors,
    }


def assembled(chunks: list[Chunk], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Returns the whole tensors in float64. Where copies of an element differ, the one furthest
    from zero stays. Raises TrainingError where no process holds an element."""
    whole = {n: torch.full(shape, torch.nan, dtype=torch.float64) for n, shape in shapes.items()}
    for name, place, values in chunks:
        at = tuple(slice(a, a + n) for a, n in zip(place, values.shape, strict=True))
        part, new = whole[name][at], values.double()
        part.copy_(torch.where(part.isnan() | (new.abs() > part.abs()), new, part))
    if missing := [n for n, x in whole.items() if x.isnan().any()]:
        raise TrainingError(
            f"align under a plan: gradients of {', '.join(missing)} are not finite, or no process "
            "holds all of them; look at the plan's own tests"
        )
    return whole


class Drawn:
    """A sampler over batches drawn beforehand."""

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
    """Returns the loss of a captured step and this process's part of its gradients."""
    weights = apply.own_values(
        here.model,
        here.config.model,
        here.place,
        lambda name, splits: take(snapshot.weights[name], splits),
    )
    run.loss_scale.scale = snapshot.loss_scale
    run.optimizer.load_masters({n: w.to(here.device) for n, w in weights.items()})
    with registry.use(here.backend):
        loss = float(run.backward(split(snapshot.batches, here.config.train.global_batch)))
    gradients: dict[str, Tensor] = {}
    for name, p in here.model.named_parameters():
        own = own_part(p if p.grad is None else p.grad).detach().cpu().double()
        gradients[name] = own * 0 if p.grad is None else own / snapshot.loss_scale
    return {"loss": loss, "chunks": here.held(gradients)}


if __name__ == "__main__":
    work(*sys.argv[1:])
