"""Forks the ranks of one job after another, so that torch and DeepSpeed are imported once for all.

`python fork_ranks.py PACKAGE` imports PACKAGE and reads jobs from its input, a line of JSON each. A
job runs `program OUT ARGUMENT ...` on `ranks` processes, the output of each in OUT.logRANK. When
all have ended, a line on the output says what went wrong, or nothing."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))
from forked import work_and_exit


def child(rank: int, job: dict[str, Any]) -> None:
    """Runs the program as one rank and ends the process."""
    os.setpgid(0, 0)
    os.environ.update(job["environment"], RANK=str(rank), LOCAL_RANK=str(rank))
    program, out = job["program"], job["out"]
    sys.argv = [program, out, *job["arguments"]]
    work_and_exit(
        Path(out).with_suffix(f".log{rank}"), lambda: runpy.run_path(program, run_name="__main__")
    )


def expire(*_: object) -> None:
    raise TimeoutError


def work(job: dict[str, Any]) -> str:
    """Forks the job's ranks and waits for them. Returns what went wrong."""
    pids = []
    for rank in range(job["ranks"]):
        if not (pid := os.fork()):
            child(rank, job)
        pids.append(pid)
    waiting = list(pids)
    signal.alarm(job["limit_s"])
    try:
        failed = []
        while waiting:
            if code := os.waitstatus_to_exitcode(os.waitpid(waiting[0], 0)[1]):
                failed.append(f"rank {pids.index(waiting[0])} ended with {code}")
            waiting.pop(0)
        return ", ".join(failed)
    except TimeoutError:
        return f"rank {pids.index(waiting[0])} was not ready after {job['limit_s']} s"
    finally:
        signal.alarm(0)
        for pid in pids:  # and what it started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        for pid in waiting:
            os.waitpid(pid, 0)


def main(package: str) -> None:
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the package prints is no report
    importlib.import_module(package)
    importlib.import_module("torch._dynamo")  # an optimizer's first step would, in every rank
    signal.signal(signal.SIGALRM, expire)
    for line in sys.stdin:
        print(json.dumps(work(json.loads(line))), file=reports, flush=True)
    os._exit(0)  # DeepSpeed's exit handlers take seconds


if __name__ == "__main__":
    main(*sys.argv[1:])
