"""One rank of a job whose collectives are judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from glm_core import verdict
from glm_core.distributed import messages
from glm_core.distributed.reports import job
from glm_core.faults.aten import AtenFault, Planted
from glm_core.faults.collectives import COLLECTIVE_FAULTS
from glm_core.verdict.ranks import of_job
from glm_core.verdict.report import Report


def calls(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Every collective that is judged, by the operator that it calls."""
    rank, whole = dist.get_rank(), dist.group.WORLD
    group = whole.group_name
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(rank)).to(dtype)
    sent, arriving = [2, 4], [2, 2] if rank == 0 else [4, 4]  # rows to and from each rank

    def rows(count: int) -> Tensor:
        return torch.empty(count, 8, dtype=dtype)

    def reduce_twice() -> None:
        dist.all_reduce(x.clone(), async_op=True).wait()
        dist.all_reduce(x.clone(), op=dist.ReduceOp.MAX)

    def functionally(name: str, *args: Any) -> Callable[[], Tensor]:
        functional = torch.ops._c10d_functional  # its Python functions load sympy, for 2 s of CPU
        return lambda: functional.wait_tensor(getattr(functional, name)(x, *args, group))

    ours = {
        "allreduce_": reduce_twice,
        "reduce_": lambda: dist.reduce(x.clone(), 0),
        "broadcast_": lambda: dist.broadcast(x.clone(), 0),
        "_allgather_base_": lambda: dist.all_gather_into_tensor(rows(12), x),
        "allgather_": lambda: dist.all_gather([rows(6), rows(6)], x),
        "allgather_coalesced_": lambda: whole.allgather_coalesced(
            [[rows(6), rows(6)], [rows(6), rows(6)]], [x, x + 1]
        ).wait(),
        "allreduce_coalesced_": lambda: whole.allreduce_coalesced([x.clone(), x + 1]).wait(),
        "gather_": lambda: dist.gather(x, None if rank else [rows(6), rows(6)]),
        "scatter_": lambda: dist.scatter(rows(3), None if rank else list(x.split(3))),
        "_reduce_scatter_base_": lambda: dist.reduce_scatter_tensor(rows(3), x),
        "reduce_scatter_": lambda: dist.reduce_scatter(rows(3), list(x.split(3))),
        "alltoall_base_": lambda: dist.all_to_all_single(rows(sum(arriving)), x, arriving, sent),
    }
    functions = {
        "all_reduce": ("sum",),
        "broadcast": (0,),
        "all_gather_into_tensor": (2,),
        "reduce_scatter_tensor": ("sum", 2),
        "all_to_all_single": (arriving, sent),
    }
    named = {f"c10d::{name}": work for name, work in ours.items()}
    return named | {f"_c10d_functional::{n}": functionally(n, *a) for n, a in functions.items()}


def judged(work: list[Callable[[], Any]], fault: AtenFault | None) -> Report:
    """This rank's verdict on what the functions do."""
    with Planted(fault) if fault else nullcontext(), verdict.watch(steps=(1,)) as watch:
        for function in work:
            function()
    return watch.report()


def everything() -> None:
    """Judges every collective, each planted fault, and torch's DDP; prints what was found."""
    dist.init_process_group("gloo")
    result: dict[str, Any] = {"planted": {}, "honest": {}}
    for dtype in (torch.float32, torch.bfloat16):
        name, work = str(dtype).removeprefix("torch."), calls(dtype)
        result["honest"][name] = judged(list(work.values()), None).to_json()
        for fault in COLLECTIVE_FAULTS:
            if name in fault.dtypes:
                report = judged([work[fault.operator]], fault)
                tests = [(f.operator, f.test) for f in report.findings]
                result["planted"][f"{fault.name} {name}"] = tests
    messages.MOST = 16
    result["honest"]["in part"] = judged(list(calls(torch.float32).values()), None).to_json()
    result |= data_parallel()
    print("RESULT", json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def data_parallel() -> dict[str, Any]:
    """Judges a step of torch's DDP; one whose all-reduce averages, though DDP divides already; and
    two that only rank 0 watches."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(8, 4))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(dist.get_rank()))

    def step() -> None:
        model(x).square().mean().backward()
        sgd.step()

    wrong = next(f for f in COLLECTIVE_FAULTS if f.name.startswith("c10d::allreduce_: averages"))
    own = judged([step], wrong)
    result = {"ddp": judged([step], None).to_json(), "wrong": own.to_json()}
    whole = of_job(job(), {"report": own.to_json(), "unit": 0.0})
    result["job"] = whole and whole["report"]
    messages.PATIENCE_S = 0.2
    for name in ("alone", "alone again"):
        if dist.get_rank():
            step()
        else:
            result[name] = judged([step], None).to_json()
        messages.PATIENCE_S = 60.0
    return result
