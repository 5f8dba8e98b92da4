"""What the links between processes reach, as rows: bench.comm on processes of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from glm_core.errors import GlmCoreError
from glm_core.measure.rows import Row

LIMIT_S = 600


def measure(backend: str, processes: int, rounds: int, largest: str) -> list[Row]:
    """A row for each operation and size. Raises GlmCoreError with what the processes said."""
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


def run_json(command: list[str], limit_s: int, who: str, late: str) -> dict[str, Any]:
    """The JSON object in the last line that a command of ours prints. Raises GlmCoreError with what
    it said, `who` before it; `late`: what to think of one that does not end within limit_s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise GlmCoreError(f"{who} no end after {limit_s} s; {late}") from error
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise GlmCoreError(f"{who} ended with {done.returncode}: {said}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def rows(result: dict[str, Any]) -> list[Row]:
    """What comm printed; bus bandwidth as nccl-tests counts it is among the figures."""
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
