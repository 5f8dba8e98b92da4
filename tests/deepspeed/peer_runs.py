"""Runs scripts on several processes, under real DeepSpeed or under us."""

from __future__ import annotations

import contextlib
import os
import signal
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
"""run once more as "otherwise": how far rounding alone carries a script"""
LIMIT_S = 240


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
    env = {
        **os.environ,
        "PEER": peer,
        "CHECKPOINTS": str(out.parent / peer),
        "DS_ACCELERATOR": "cpu",
        "FOREIGN": str(foreign),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [str(python), str(HERE / "fork_ranks.py"), str(HERE / program), str(out), *scripts]
    with out.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(
            command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        code = process.wait(LIMIT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    words = "\n".join(
        path.read_text()[-3000:] for path in sorted(out.parent.glob(f"{out.stem}.log*"))
    )
    assert code == 0, f"{peer}: exit code {code}\n{words}"
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
