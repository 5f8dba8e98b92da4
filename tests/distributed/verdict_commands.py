"""One rank of a job that runs `glm-core verdict`, as torchrun starts it: the job's store outlives
each run of the script. The processes of the script are forked, because each would import torch."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from glm_core import cli
from glm_core.faults.aten import Planted
from glm_core.faults.collectives import COLLECTIVE_FAULTS
from glm_core.verdict import script, worker

TRAIN = """
import sys, torch, torch.distributed as dist
from torch import nn
dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 3))
if sys.argv[1] == "ddp":
    model = nn.parallel.DistributedDataParallel(model)
else:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
generator = torch.Generator().manual_seed(dist.get_rank())
for step in range(4):
    model(torch.randn(8, 16, generator=generator)).square().mean().backward()
    adam.step()
    adam.zero_grad()
dist.destroy_process_group()
"""


def averages() -> Planted:
    """Returns a context in which an all-reduce averages."""
    return Planted(
        next(f for f in COLLECTIVE_FAULTS if f.name.startswith("c10d::allreduce_: averages"))
    )


def _forked(words: list[str]) -> int:
    """Runs the script's process."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            sys.argv = words[2:]
            worker.main()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def command(*words: str) -> tuple[int, dict[str, Any] | None]:
    """Returns the exit code of the command on this rank, and what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.main(["verdict", *words])
    return code, json.loads(out.getvalue()) if out.getvalue() else None


def everything() -> None:
    """Runs the command with a context, with a record that is refused, with one for each rank, and
    against those."""
    script.process = _forked  # this rank's process ends with the test
    Path("train.py").write_text(TRAIN, encoding="utf-8")
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    agent = dist.TCPStore("localhost", port, is_master=True) if rank == 0 else None
    curve = ["--curve", "4", "--controls", "4", "--json"]
    context = "verdict_commands:averages"
    result = {
        "with": command("--with", context, "--json", "--", "train.py", "ddp"),
        "refused": command("--record", "all.safetensors", "--", "train.py", "ddp"),
        "record": command("--record", "of-{rank}.safetensors", *curve, "--", "train.py", "fsdp"),
        "against": command(
            "--against", "of-{rank}.safetensors", "--json", "--", "train.py", "fsdp"
        ),
    }
    print("RESULT", json.dumps(result))
    del agent
