"""Starts real processes on this machine that train together; none outlives its job."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from glm_core.sensitivity.plans.case import Case

ROOT = Path(__file__).parents[3]
LIMIT_S = 500.0
"""of a whole job; a collective gives up after 60 s by itself"""


def run(cases: list[Case], world: int, out: Path) -> list[list[dict[str, Any]]]:
    """Returns what each process reports of each case; [case][rank]. What is missing because a
    process failed is {}."""
    out.mkdir()
    (out / "cases.json").write_text(
        json.dumps([dataclasses.asdict(c) for c in cases]), encoding="utf-8"
    )
    strict = ["-W", "error"]  # as pytest
    worker = ["-m", "glm_core.sensitivity.plans.worker", str(out / "cases.json"), str(out)]
    process = subprocess.Popen(
        [sys.executable, *strict, *worker], env=_environment(world), start_new_session=True
    )
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LIMIT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return [[_report(out / f"{n}.{r}.pt") for r in range(world)] for n in range(len(cases))]


def _environment(world: int) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        **os.environ,
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


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
