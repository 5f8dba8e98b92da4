"""One of three ranks that send each other messages under the watch."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from glm_core import verdict
from glm_core.faults.aten import AtenFault, Planted
from glm_core.faults.collectives import TRANSFER_FAULTS
from glm_core.verdict.report import Report


def message(rank: int, number: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(100 * rank + number)
    return torch.randn(6, 8, generator=generator).to(dtype)


def exchange(dtype: torch.dtype = torch.float32) -> None:
    """Sends two messages to each other rank and receives theirs, all at once."""
    rank, operations, buffers = dist.get_rank(), [], []
    for number in range(2):
        for other in (r for r in range(3) if r != rank):
            buffers.append(torch.full((6, 8), -1.0, dtype=dtype))
            operations.append(dist.P2POp(dist.irecv, buffers[-1], other))
            given = message(rank, 10 * other + number, dtype)
            operations.append(dist.P2POp(dist.isend, given, other))
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    for buffer in buffers:
        buffer.add_(1)  # what arrived is overwritten


def one_by_one() -> None:
    """Passes a message along the ranks: blocking, in the background, by functional operators."""
    rank, x = dist.get_rank(), torch.zeros(5, dtype=torch.int64)
    if rank:
        dist.recv(x, rank - 1)
    if rank < 2:
        dist.send(x + 1, rank + 1, tag=0)
        dist.isend(x + 2, rank + 1, tag=7).wait()
    if rank:
        work = dist.irecv(x, rank - 1, tag=7)
        x.view(-1)  # no use of its values
        work.wait()
    functional, group = torch.ops._c10d_functional, dist.group.WORLD.group_name
    if hasattr(functional, "irecv") and rank < 2:  # not in every torch of the window
        call = functional.irecv if rank else functional.isend
        functional.wait_tensor(call(x.clone() if rank else x + 3, 1 - rank, 9, group))


def judged(work: Callable[[], Any], fault: AtenFault | None = None) -> Report:
    """This rank's verdict on what a function does."""
    with Planted(fault) if fault else nullcontext(), verdict.watch(steps=(1,)) as watch:
        work()
    return watch.report()


def across_the_steps() -> Report:
    """Sends a message more in the first step than is received there; the second is captured."""
    weight = nn.Parameter(torch.ones(3))
    sgd = torch.optim.SGD([weight], lr=0.1)
    with verdict.watch(steps=(2,)) as watch:
        for step in range(2):
            if dist.get_rank() == 0:
                for number in range(2 - step):
                    dist.send(torch.full((4,), 10.0 * step + number), 1)
            if dist.get_rank() == 1:
                for _ in range(1 + step):
                    dist.recv(torch.zeros(4), 0)
            weight.grad = torch.ones(3)
            sgd.step()
    return watch.report()


def pipelined(group: dist.ProcessGroup, fault: AtenFault | None = None) -> Report:
    """Judges the second step of torch's 1F1B pipeline on two ranks."""
    torch.manual_seed(0)
    rank = dist.get_rank()
    stage = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    stage = PipelineStage(stage, rank, 2, torch.device("cpu"), group=group)
    schedule = Schedule1F1B(stage, 4, loss_fn=lambda y, target: (y - target).square().mean())
    sgd = torch.optim.SGD(stage.submod.parameters(), lr=0.1)
    with verdict.watch(steps=(2,)) as watch, Planted(fault) if fault else nullcontext():
        for _ in range(2):
            schedule.step(torch.randn(8, 8)) if rank == 0 else schedule.step(
                target=torch.zeros(8, 8)
            )
            sgd.step()
            sgd.zero_grad()
    return watch.report()


def everything() -> None:
    """Judges honest messages, planted ones, a pipeline, and messages that cross steps."""
    dist.init_process_group("gloo")
    pair = dist.new_group([0, 1])
    result: dict[str, Any] = {"honest": {}, "planted": {}}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        result["honest"][name] = judged(lambda d=dtype: exchange(d)).to_json()  # type: ignore[misc]
        for fault in TRANSFER_FAULTS:
            report = judged(lambda d=dtype: exchange(d), fault)  # type: ignore[misc]
            tests = [(f.operator, f.test) for f in report.findings]
            result["planted"][f"{fault.name} {name}"] = tests
    result["honest"]["one by one"] = judged(one_by_one).to_json()
    result["functional"] = hasattr(torch.ops._c10d_functional, "irecv")
    result["crossing"] = across_the_steps().to_json()
    if dist.get_rank() < 2:
        result["pipeline"] = pipelined(pair).to_json()
        lost = next(f for f in TRANSFER_FAULTS if "second half" in f.name)
        result["wrong pipeline"] = pipelined(pair, lost).to_json()
    print("RESULT", json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
