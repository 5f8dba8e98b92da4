"""What the ranks of an exact job do."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from toy import L, Sampler, V

from glm_core.backends import registry
from glm_core.config import DataConfig, RunConfig, TrainConfig
from glm_core.distributed import mesh
from glm_core.distributed.exact import ExactProcesses
from glm_core.distributed.plan import parse
from glm_core.model.presets import preset
from glm_core.training.trainer import Trainer

STEPS = 2
MODEL = preset("tiny", num_layers=2, hidden=64, ffn=48, vocab=V, max_length=L)


def config(micro_batch: int = 8) -> RunConfig:
    train = TrainConfig(
        exact=True, micro_batch=micro_batch, global_batch=8, steps=STEPS, warmup_steps=1
    )
    return RunConfig(model=MODEL, data=DataConfig(length=L, vocab=V), train=train)


def figures(trainer: Trainer) -> list[torch.Tensor]:
    """Returns losses, gradient norms and final weights of a run."""
    with registry.use("cpu", exact=True):
        results = [trainer.step() for _ in range(STEPS)]
    curve = torch.tensor([(r.loss, r.grad_norm) for r in results], dtype=torch.float64)
    return [curve, *(trainer.optimizer.master[n] for n in sorted(trainer.optimizer.master))]


def train(label: str, folder: str) -> None:
    with mesh.connecting():
        dist.init_process_group("gloo")
    plan, backend = parse(label), registry.get("cpu")
    axes = mesh.make(plan, "cpu", 60.0)
    trainer = Trainer(config(), Sampler(), ExactProcesses(config(), plan, axes, backend))
    torch.save(figures(trainer), Path(folder) / f"{dist.get_rank()}.pt")
