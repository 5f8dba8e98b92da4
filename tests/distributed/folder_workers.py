"""What the ranks do that read their parts of a published folder."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.distributed as dist
from expert_folders import batch
from toy import L, Sampler, V

from glm_core.backends import registry
from glm_core.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from glm_core.distributed import mesh
from glm_core.distributed.collectives import all_gather
from glm_core.distributed.parallel import ManyProcesses
from glm_core.distributed.plan import parse
from glm_core.model.glm import GLM
from glm_core.pretrained.weights.plan_parts import read_part
from glm_core.pretrained.weights.reading import open_checkpoint
from glm_core.training.trainer import Trainer

ROWS = 4


def config(model: ModelConfig) -> RunConfig:
    """A run of one step."""
    train = TrainConfig(backend="reference", steps=1, micro_batch=8, global_batch=8, warmup_steps=0)
    return RunConfig(model=model, data=DataConfig(length=L, vocab=V), train=train)


def work(plans: list[str], folders: list[str], out: str) -> None:
    """Saves, for each plan and folder, the logits that this rank has, their first row, and the loss
    and the gradient norm of a training step."""
    with mesh.connecting():
        dist.init_process_group("gloo")
    for label in plans:
        plan = parse(label)
        axes = mesh.make(plan, "cpu", 60.0)
        for folder in map(Path, folders):
            checkpoint = open_checkpoint(folder)
            job, weights = config(checkpoint.config), functools.partial(read_part, checkpoint)
            backend = registry.get("reference")
            processes = ManyProcesses(job, plan, axes, backend, weights=weights)
            trainer = Trainer(job, Sampler(), processes)
            with registry.use(backend):
                found = logits(processes)
                step = trainer.step()
            name = f"{folder.name}-{label}-{dist.get_rank()}.pt"
            torch.save((*found, step.loss, step.grad_norm), Path(out) / name)


@torch.no_grad()
def logits(processes: ManyProcesses) -> tuple[int, torch.Tensor]:
    """Returns the first row and the logits of this rank's rows; of no row before the last stage."""
    tokens, *rest = batch(rows=ROWS)
    mine = processes._rows(tokens)
    rest = [x[mine] for x in rest]
    [stage] = processes.model.stages
    pipeline = processes.mesh.get_group("pp")
    members = dist.get_process_group_ranks(pipeline)
    first, last = members[0], members[-1]
    if stage.is_first:
        out = GLM.forward(stage, tokens[mine], *rest)
    else:
        shape = (*tokens[mine].shape, stage.config.hidden)
        received = torch.empty(shape), torch.empty(shape)
        for x in received:
            dist.recv(x, first, pipeline)
        out = GLM.forward(stage, received, *rest)
    if isinstance(out, tuple):
        for x in out:
            dist.send(x, last, pipeline)
        return 0, torch.empty(0)
    return mine.start, all_gather(stage.project(out), processes.mesh.get_group("tp"), -1)
