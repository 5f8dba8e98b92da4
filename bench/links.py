"""Measures the links between processes as rows, by running bench.comm on processes of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from glm_core.errors import GlmCoreError
from glm_core.measure.rows import Row

LIMIT_S = 600
"""seconds that the processes may take"""


def measure(backend: str, processes: int, rounds: int, largest: str) -> list[Row]:
    """Returns a row for each operation and size. Raises GlmCoreError with the processes' last line
    of stderr."""
    command = [
        sys.executable,
        "-m",
        "glm_core.bench.comm",
        "--json",
        "--backend",
        backend,
        "--processes",
        str(processes),
        "--rounds",
        str(rounds),
        "--max-bytes",
        largest,
    ]
    return rows(run_json(command, LIMIT_S, "bench comm:", "a link hangs"))


def run_json(command: list[str], limit_s: int, name: str, advice: str) -> dict[str, Any]:
    """Runs a command of ours and returns the JSON object that it prints last. Raises GlmCoreError:
    `name` with the command's last line of stderr, or, where it does not end within `limit_s`, with
    `advice`."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise GlmCoreError(f"{name} no end after {limit_s} s; {advice}") from error
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        last_line = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise GlmCoreError(f"{name} ended with {done.returncode}: {last_line}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def rows(result: dict[str, Any]) -> list[Row]:
    """Converts comm's result. The figures include the bus bandwidth as nccl-tests counts it."""
    return [
        Row(
            bench="comm",
            backend=result["backend"],
            dtype=r["type"],
            shape=f"{r['size_bytes']} B",
            key=f"comm {result['library']} {result['ranks']} ranks {r['op']} {r['size_bytes']} B",
            seconds=tuple(r["seconds"]),
            bytes=r["size_bytes"],
            machine=result["machine"],
            figures={k: r[k] for k in ("algbw_gb_s", "busbw_gb_s", "wrong")},
        )
        for r in result["rows"]
    ]
