"""What the ranks of an exact job do."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from toy import L, Sampler, V

from glm_core.backends import registry
from glm_core.config import DataConfig, RunConfig, TrainConfig
from glm_core.distributed import mesh
from glm_core.distributed.checkpoint import Checkpoints
from glm_core.distributed.exact import ExactProcesses
from glm_core.distributed.plan import Plan, parse
from glm_core.model.presets import preset
from glm_core.training.trainer import Trainer

SMALL = {"num_layers": 2, "hidden": 32, "vocab": V, "max_length": L}
HEADS = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 8, "init_std": 0.1}
MODELS = {
    "tied": preset("tiny", ffn=48, **SMALL),
    "untied": preset("glm-4-0414-9b", ffn=48, **SMALL, **HEADS),
    "experts": preset("tiny-moe", **SMALL),
}


def config(model: str, dtype: str, steps: int = 2) -> RunConfig:
    train = TrainConfig(
        dtype=dtype,  # type: ignore[arg-type]  # checked by TrainConfig
        exact=True,
        micro_batch=8,
        global_batch=8,
        steps=steps,
        warmup_steps=1,
    )
    return RunConfig(model=MODELS[model], data=DataConfig(length=L, vocab=V), train=train)


def curve(trainer: Trainer, steps: int) -> torch.Tensor:
    """Returns losses and gradient norms of the next steps of a run."""
    with registry.use("cpu", exact=True):
        results = [trainer.step() for _ in range(steps)]
    return torch.tensor([(r.loss, r.grad_norm) for r in results], dtype=torch.float64)


def train(runs: list[tuple[str, str, str] | None], steps: int, folder: str) -> None:
    """Saves the curve of each run on each rank, and the rank's parts of the weights with their
    places in the whole. A run is a plan, or two for its first and its second half; a model; a
    dtype; None is left out."""
    with mesh.connecting():
        dist.init_process_group("gloo")
    meshes: dict[tuple[int, int, int], DeviceMesh] = {}
    for run, (labels, model, dtype) in ((i, run) for i, run in enumerate(runs) if run):
        plans = [parse(label) for label in labels.split(">")]
        checkpoints, curves = Checkpoints(Path(folder) / f"saved-{run}", timeout_s=20), []
        for plan in plans:
            sizes = (plan.pp, plan.dp, plan.tp)
            meshes[sizes] = meshes.get(sizes) or mesh.make(plan, "cpu", 60.0)
            trainer = _trainer(config(model, dtype, steps), plan, meshes[sizes], checkpoints)
            if (saved := checkpoints.latest()) is not None:
                trainer.restore(checkpoints.open(saved))
            curves.append(curve(trainer, steps // len(plans)))
            if plan is not plans[-1]:
                trainer.save()
        figures = torch.cat(curves), trainer.parallel.held(trainer.optimizer.master)
        torch.save(figures, Path(folder) / f"{run}-{dist.get_rank()}.pt")


def _trainer(job: RunConfig, plan: Plan, axes: DeviceMesh, checkpoints: Checkpoints) -> Trainer:
    processes = ExactProcesses(job, plan, axes, registry.get("cpu"))
    return Trainer(job, Sampler(), processes, checkpoints)
