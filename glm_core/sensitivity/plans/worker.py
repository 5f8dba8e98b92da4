"""Forks the processes of a job, so that torch is imported once for all of them. Each trains every
case under its plan, one after the other, and writes what it holds. Started as `worker CASES.json
OUT`, with torchrun's variables set, its rank excepted."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import distributed as dist

from glm_core.backends import registry
from glm_core.distributed import mesh, parallel, vocabulary
from glm_core.distributed.parallel import ManyProcesses
from glm_core.distributed.plan import parse
from glm_core.faults.museum import bugs
from glm_core.sensitivity.plans import sample
from glm_core.training.optimizer import own_part
from glm_core.training.trainer import Trainer

TIMEOUT_S = 60.0


def train(case: dict[str, Any], backend: Any) -> dict[str, Any]:
    """Returns losses and norms of all steps, the first step's gradients and loads of experts, the
    last weights."""
    plan, config = parse(case["plan"]), sample.config(case["model"], case["dtype"])
    axes = mesh.make(plan, backend.device_type, TIMEOUT_S)
    planted = bugs.BUGS[case["bug"]]() if case["bug"] else contextlib.nullcontext()
    report: dict[str, Any] = {"loss": [], "norm": []}
    with planted, registry.use(backend):
        here = ManyProcesses(config, plan, axes, backend, timeout_s=TIMEOUT_S)
        trainer = Trainer(config, sample.Text(), here)
        for step in range(sample.STEPS):
            result = trainer.step()
            report["loss"].append(result.loss)
            report["norm"].append(result.grad_norm)
            if step == 0:
                report["load"] = result.expert_load
                named = dict(here.model.named_parameters())
                grads = {
                    n: torch.zeros_like(own_part(p)) if p.grad is None else own_part(p.grad)
                    for n, p in named.items()  # a router's bias has none
                }
                report["gradient"] = here.held(grads)
                report["first"] = here.held(trainer.optimizer.master)
        report["weight"] = here.held(trainer.optimizer.master)
    return report


def main(cases: str, out: str) -> None:
    """Forks the ranks and waits for them. The first that fails ends all."""
    pids = set()
    for rank in map(str, range(int(os.environ["WORLD_SIZE"]))):
        if not (pid := os.fork()):
            os.environ.update({"RANK": rank, "LOCAL_RANK": rank})
            _end(cases, out)
        pids.add(pid)
    while pids:
        pid, status = os.wait()
        pids.discard(pid)
        if status:
            sys.exit(1)  # whoever started this process ends its children


def _end(cases: str, out: str) -> NoReturn:
    code = 1
    try:
        train_all(cases, out)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def train_all(cases: str, out: str) -> None:
    """Trains all cases as one rank and writes a report per case."""
    torch.set_num_threads(1)
    vocabulary.CHUNK = 256  # eight tokens at a time, as a real vocabulary would have it
    parallel.MESSAGE = 1000  # several for these models too
    backend = registry.get("cpu")
    backend = backend if backend.probe().ok else registry.get("reference")
    mesh.start(backend, TIMEOUT_S)
    rank = dist.get_rank()
    for number, case in enumerate(json.loads(Path(cases).read_text(encoding="utf-8"))):
        begin = time.perf_counter()
        try:
            report = train(case, backend)
        except Exception:  # the job's other processes are told by their own failure, or time out
            report = {"error": traceback.format_exc()}
        report["seconds"] = time.perf_counter() - begin
        torch.save(report, Path(out) / f"{number}.{rank}.pt")
        if "error" in report:
            sys.exit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
