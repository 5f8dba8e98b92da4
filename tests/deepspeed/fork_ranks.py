"""Forks the ranks of a job, so that torch and DeepSpeed are imported once for all of them:
`python fork_ranks.py PROGRAM OUT ARGUMENT ...` runs PROGRAM on WORLD_SIZE ranks, the output of
each in OUT.logRANK. Exits with 1 if a rank fails."""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "shared"))
from forked import work_and_exit


def child(rank: int, program: str, out: str, arguments: list[str]) -> None:
    """Runs the program as one rank and ends the process."""
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
    sys.argv = [program, out, *arguments]
    work_and_exit(
        Path(out).with_suffix(f".log{rank}"), lambda: runpy.run_path(program, run_name="__main__")
    )


def main(program: str, out: str, *arguments: str) -> None:
    importlib.import_module(
        "deepspeed" if os.environ["PEER"] == "deepspeed" else "glm_core.deepspeed"
    )
    ranks = range(int(os.environ["WORLD_SIZE"]))
    pids = []
    for rank in ranks:
        if not (pid := os.fork()):
            child(rank, program, out, list(arguments))
        pids.append(pid)
    failed = [os.waitpid(pid, 0)[1] for pid in pids]
    os._exit(1 if any(failed) else 0)  # DeepSpeed's exit handlers take seconds


if __name__ == "__main__":
    main(*sys.argv[1:])
