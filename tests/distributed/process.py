"""Processes that a test starts and that end with it, whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(
    words: list[str], timeout_s: float = 240.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The finished process, output captured; past the timeout it and all its children are
    killed."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        error.cmd = f"{error.cmd}\nstderr so far: {(error.stderr or b'')[-4000:].decode()}"
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with process:
            pass  # closes its pipes
    return subprocess.CompletedProcess(words, process.returncode, out, err)
