"""Starts real processes on this machine that train together; none outlives its job."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from concurrent import futures
from pathlib import Path
from typing import Any

import torch

from glm_core.sensitivity.plans.case import Case

ROOT = Path(__file__).parents[3]
LIMIT_S = 500.0
"""of a whole job; a collective gives up after 60 s by itself"""


def free_port() -> int:
    """Returns a port nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def run(cases: list[Case], world: int, out: Path) -> list[list[dict[str, Any]]]:
    """Returns what each process reports of each case; [case][rank]. What is missing because a
    process failed is {}."""
    out.mkdir()
    (out / "cases.json").write_text(json.dumps([dataclasses.asdict(c) for c in cases]))
    strict = ["-W", "error"]  # as pytest
    worker = ["-m", "glm_core.sensitivity.plans.worker", str(out / "cases.json"), str(out)]
    start([sys.executable, *strict, *worker], world)
    return [[_report(out / f"{n}.{r}.pt") for r in range(world)] for n in range(len(cases))]


def start(command: list[str], world: int) -> list[int | None]:
    """Runs the command as every rank of a job, with torchrun's variables, and returns the exit
    codes. The first process that fails ends all."""
    shared = {
        **os.environ,
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    processes = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    pool = futures.ThreadPoolExecutor(world)
    try:
        waits = [pool.submit(_good, p) for p in processes]
        futures.wait(waits, LIMIT_S, futures.FIRST_EXCEPTION)
    finally:
        for p in processes:
            p.kill()
        pool.shutdown()
    return [p.returncode for p in processes]


def _good(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        raise ChildProcessError


def _report(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    report: dict[str, Any] = torch.load(path, weights_only=False)
    return report


def gathered(pieces: list[Any], shapes: dict[str, torch.Size]) -> tuple[dict[str, Any], float]:
    """Returns the whole tensors from what the processes hold of them, and the largest difference
    between two copies of an element. Raises AssertionError where an element is nobody's."""
    whole = {n: torch.full(s, torch.nan) for n, s in shapes.items()}
    apart = 0.0
    for name, place, values in pieces:
        part = whole[name][tuple(slice(a, a + n) for a, n in zip(place, values.shape, strict=True))]
        known = ~part.isnan()
        if known.any():
            apart = max(apart, float((part - values)[known].abs().max()))
        part.copy_(torch.where(known, part, values.float()))
    missing = [n for n, t in whole.items() if t.isnan().any()]
    assert not missing, f"no process holds all of {missing}"
    return whole, apart
