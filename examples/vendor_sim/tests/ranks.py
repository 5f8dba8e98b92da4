"""Trains on two ranks, each with a device of its own, with the optimizer or the weights in main
memory and without: `python ranks.py PORT FOLDER` writes FOLDER/RANK.json. The ranks are forked
before the device starts, since a device does not outlive a fork."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import small_glm
import torch
import torch.distributed as dist
from torch import nn

from glm_core import deepspeed
from glm_core.backends import registry
from glm_core.deepspeed.accelerator import real_accelerator
from glm_core.distributed import mesh
from glm_core.distributed.parallel import ManyProcesses
from glm_core.distributed.plan import parse
from glm_core.training import offload
from glm_core.training.trainer import Trainer

CPU = {"device": "cpu", "pin_memory": True}
PLACES: dict[str, dict[str, Any]] = {
    "device": {},
    "optimizer": {"offload_optimizer": CPU},
    "both": {"offload_optimizer": CPU, "offload_param": CPU},
}
"""what is in main memory, and DeepSpeed's keys for it"""
WIDTH = 64


class Net(nn.Module):
    """Three blocks, of which the last may be left out of a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 5)  # five rows on two ranks: one has a row of padding

    def forward(self, x: torch.Tensor, blocks: int) -> torch.Tensor:
        for block in self.blocks[:blocks]:
            x = block(x).tanh()
        out: torch.Tensor = self.head(x)
        return out


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


def engine(stage: int, place: str, dtype: str, optimizer: Any, accumulation: int = 2) -> Any:
    torch.manual_seed(dist.get_rank())  # rank 0's weights are those of all
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 5000,
            "stage3_param_persistence_threshold": 10,
            **PLACES[place],
        },
        "bf16": {"enabled": dtype == "bfloat16"},
    }
    with deepspeed.zero.Init(enabled=place == "both" and dtype == "bfloat16"):
        model = Net()
    run = deepspeed.initialize(model=model, config=config, optimizer=optimizer)[0]
    with deepspeed.zero.GatheredParameters([model.head.bias], modifier_rank=0):
        if dist.get_rank() == 0:
            model.head.bias.data.add_(1.0)
    if stage == 3:
        bias, utils = model.blocks[0].bias, deepspeed.utils
        utils.safe_set_local_fp32_param(bias, utils.safe_get_local_fp32_param(bias) + 1.0)
    return run


def updates(run: Any, first: int, last: int) -> list[float]:
    """Returns the losses of these micro-batches, two of which are an update unless the engine is
    made otherwise. In the second update of two the last block gets no gradient."""
    losses = []
    dtype = torch.bfloat16 if run.bfloat16_enabled() else torch.float32
    for number in range(first, last):
        generator = torch.Generator().manual_seed(2 * number + dist.get_rank())
        x = torch.randn(4, WIDTH, generator=generator).to("sim", dtype)
        loss = run(x, 2 if number // 2 == 1 else 3).float().square().mean()
        if number % 2:
            loss.backward()
        else:
            run.backward(loss)
        run.step()
        losses.append(loss.item())
    return losses


def masters(run: Any) -> list[torch.Tensor]:
    return [m for store in run.stores for m in store.masters]


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """Returns equal text for tensors of equal bits."""
    return hashlib.sha256(b"".join(t.detach().cpu().numpy().tobytes() for t in tensors)).hexdigest()


def script(stage: int, place: str, saved: Path | None = None) -> dict[str, Any]:
    """Returns what runs that differ in `place` are compared by, and where their parts are. saved:
    after two updates the run saves a checkpoint, and goes on from this one."""
    gc.collect()
    before = torch.sim.memory_allocated()
    run = engine(stage, place, "bfloat16", sgd)
    losses = updates(run, 0, 4)
    if saved is not None:
        run.save_checkpoint(str(saved.with_name(place)))
        updates(run, 10, 12)  # which loading undoes
        run.load_checkpoint(str(saved))
    losses += updates(run, 4, 6)
    parameters = list(run.module.parameters())
    state = [v for m in masters(run) for v in run.optimizer.state[m].values()]
    read = deepspeed.utils.safe_get_full_optimizer_state
    gc.collect()
    return {
        "losses": losses,
        "norm": run.get_global_grad_norm(),
        "weights": digest(deepspeed.utils.safe_get_full_fp32_param(p) for p in parameters),
        "moments": digest(read(p, "momentum_buffer") for p in parameters),
        "places": sorted({t.device.type for t in (*masters(run), *state)}),
        "bytes": torch.sim.memory_allocated() - before,
    }


def plan(zero: int, offloads: bool) -> dict[str, Any]:
    """Returns the same of the trainer under a plan."""
    c = small_glm.config("reference:sim", "bfloat16")
    c = dataclasses.replace(c, train=dataclasses.replace(c.train, offload_optimizer=offloads))
    made, backend = parse(f"dp=2,zero={zero}"), registry.usable("reference:sim")
    many = ManyProcesses(c, made, mesh.make(made, "sim"), backend)
    run = Trainer(c, small_glm.Sampler(), many)
    with registry.use(backend):
        results = [run.step() for _ in range(2)]
    tensors = run.optimizer.state()["tensors"].values()
    return {
        "losses": [r.loss for r in results],
        "norm": results[-1].grad_norm,
        "weights": digest(p.to_local() for p in run.model.parameters()),
        "moments": digest(tensors),
        "places": sorted({t.device.type for t in tensors}),
    }


def work(rank: int, port: str, folder: Path) -> dict[str, Any]:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT=port
    )
    real_accelerator._chosen = [registry.usable("sim")]
    offload.HOST = "reference"  # as the device's, for equal bits
    deepspeed.init_distributed()
    after = {"device": "device", "optimizer": "device", "both": "optimizer"}
    return {
        "zero 2": {p: script(2, p) for p in ("device", "optimizer")},
        "zero 3": {p: script(3, p, folder / saved) for p, saved in after.items()},
        "adamw": [updates(engine(3, p, "float32", None, 1), 0, 4) for p in PLACES],
        **{
            f"plan {zero}": {p: plan(zero, p == "optimizer") for p in ("device", "optimizer")}
            for zero in (1, 2, 3)
        },
    }


def main(port: str, folder: str) -> None:
    pids = []
    for rank in range(2):
        if not (pid := os.fork()):
            result = work(rank, port, Path(folder))
            (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
            os._exit(0)
        pids.append(pid)
    os._exit(1 if any(os.waitpid(pid, 0)[1] for pid in pids) else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
