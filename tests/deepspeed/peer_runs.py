"""Runs scripts on several processes, under real DeepSpeed or under us."""

from __future__ import annotations

import atexit
import functools
import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import peer_environments
import torch
from torch import Tensor

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
REAL = ROOT / ".venv-deepspeed/bin/python"
LACK = peer_environments.lack("deepspeed")
OURS_2, OURS_4 = ("take_over", "pipeline_take_over"), ("replicas_take_over",)
"""read what DeepSpeed wrote"""
SCRIPTS = sorted(
    (p.stem for p in (HERE / "scripts").glob("*.py") if p.stem not in OURS_2),
    # DeepSpeed remembers an mpu for all engines that follow
    key=lambda name: (name == "tensor_parallel", name.startswith("pipeline"), name),
)
SCRIPTS_4 = sorted(p.stem for p in (HERE / "scripts4").glob("*.py") if p.stem not in OURS_4)
"""on four processes"""
OWN = sorted(p.stem for p in (HERE / "own").glob("*.py"))
"""what DeepSpeed has not, refuses or cannot run here; they check themselves"""
CONTROLS = {
    torch.float32: ["client_optimizer", "clipping", "gathered", "hf_loop", "zero3"],
    torch.bfloat16: ["bf16_zero1", "bf16_zero3"],
}
"""run once more with other roundings: how far these alone carry a script"""
LIMIT_S = 540
"""less than pytest's limit: a busy machine may need minutes"""


@functools.cache
def forker(python: str, package: str) -> subprocess.Popen[str]:
    """Returns the process that has imported the package and forks ranks. It ends with this one."""
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [python, str(HERE / "fork_ranks.py"), package]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
    atexit.register(process.communicate)  # ends its input
    return process


def run(
    peer: str,
    python: Path | str,
    out: Path,
    scripts: list[str],
    foreign: Path,
    ranks: int = 2,
    program: str = "run_scripts.py",
) -> list[Any]:
    """Runs the scripts and returns what each rank saw. Where a process failed, its output is in the
    assertion."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = {
        "PEER": peer,
        "CHECKPOINTS": str(out.parent / peer),
        "FOREIGN": str(foreign),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    job = {
        "program": str(HERE / program),
        "out": str(out),
        "arguments": scripts,
        "environment": environment,
        "ranks": ranks,
        "limit_s": LIMIT_S,
    }
    process = forker(str(python), "deepspeed" if peer == "deepspeed" else "glm_core.deepspeed")
    assert process.stdin is not None
    assert process.stdout is not None
    print(json.dumps(job), file=process.stdin, flush=True)
    line = process.stdout.readline()
    failure = json.loads(line) if line else f"{python} could not import it, or died"
    outputs = sorted(out.parent.glob(f"{out.stem}.log*"))
    words = "\n".join(path.read_text()[-3000:] for path in outputs)
    assert not failure, f"{peer}: {failure}\n{words}"
    return load(out, ranks)


def load(out: Path, ranks: int) -> list[Any]:
    """Returns what each rank saved."""
    return [torch.load(f"{out}.{r}") for r in range(ranks)]


def distance(mine: Tensor, theirs: Tensor) -> float:
    """Returns the largest difference in units of the largest value."""
    assert mine.shape == theirs.shape
    if not theirs.numel():
        return 0.0
    return float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


def differences(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Returns the `distance` of a script's losses, norms, rates and each weight."""
    seen = {k: distance(mine[k], theirs[k]) for k in ("losses", "norms", "rates")}
    weights = theirs["weights"].items()
    return {**seen, **{n: distance(mine["weights"][n], w) for n, w in weights}}
