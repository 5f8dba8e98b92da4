"""Shares the jobs of a run, and then their controls, among processes. A control is an independent
run with the same bits in every process, so that whichever is free trains the next one."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, TYPE_CHECKING

import torch

import glm_core
from glm_core import errors
from glm_core.align.controls import Control, Progress

if TYPE_CHECKING:
    from glm_core.align.jobs import Job

MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
"""environment of the workers: glibc then keeps the memory of large tensors, which it would else
fetch from the system and clear for every op: a seventh of the time"""


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """What one process does at a time."""

    job: int
    control: int | None = None
    """the number of the control to train; None: all the rest of the job"""


def tasks_of(jobs: Sequence[Job]) -> deque[Task]:
    """Returns the jobs, then their controls, those that take longest first: so the processes end
    at about the same time."""
    dtypes = [job.config.train.dtype for job in jobs]
    slowest_first = sorted(range(len(jobs)), key=lambda i: dtypes[i] == "float32")
    controls = (Task(i, k) for i in slowest_first for k in range(jobs[i].controls))
    return deque([*map(Task, range(len(jobs))), *controls])


class Worker:
    """A process that does tasks, each when it has done the one before."""

    def __init__(self, process: subprocess.Popen[str], lines: SimpleQueue[Line]) -> None:
        """lines: receives each line that the process writes, and None at its end."""
        self.process, self.lines = process, lines
        self.task = Task(0)
        """the one that it does"""
        threading.Thread(target=self._forward, args=(process.stdout,), daemon=True).start()

    def _forward(self, stream: IO[str]) -> None:
        for line in stream:
            self.lines.put((self, line))
        self.lines.put((self, None))

    def next(self, tasks: deque[Task], jobs: Sequence[Job]) -> None:
        """Gives it the next task, or lets it end where there is none."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it ended: its exit code is looked at in its turn
            if tasks:
                self.task = tasks.popleft()
                request = {"job": jobs[self.task.job].to_json(), "control": self.task.control}
                os.write(self.process.stdin.fileno(), json.dumps(request).encode() + b"\n")
            else:
                self.process.stdin.close()


Line = tuple[Worker, str | None]


def run_in_parallel(jobs: Sequence[Job], progress: Progress) -> list[list[Control]]:
    """Runs the jobs in as many processes, each with its share of the threads, because a small model
    keeps only one core busy. A process that has done its job trains controls, of any job, until
    none is left. Returns each job's controls. Raises a worker's error as soon as it is known."""
    tasks, lines = tasks_of(jobs), SimpleQueue[Line]()
    trained: list[dict[int, Control]] = [{} for _ in jobs]
    with ExitStack() as stack:
        running = {Worker(stack.enter_context(_start(len(jobs))), lines) for _ in jobs}
        for worker in running:
            stack.callback(worker.process.terminate)  # an error in one ends them all
            worker.next(tasks, jobs)
        while running:
            with suppress(Empty):
                worker, line = lines.get(timeout=0.2)  # returns for an interrupt
                if line is None:
                    _require_success(worker.process)
                    running.remove(worker)
                    continue
                message = json.loads(line)
                if "error" in message:
                    raise getattr(errors, message["kind"])(message["error"])
                if "what" in message:
                    progress(message["what"], message["done"], message["of"])
                    continue
                if worker.task.control is not None:
                    trained[worker.task.job][worker.task.control] = Control(**message["control"])
                worker.next(tasks, jobs)
    return [[of_job[k] for k in range(len(of_job))] for of_job in trained]


def _start(count: int) -> subprocess.Popen[str]:
    """Starts one of `count` workers."""
    threads = max(1, torch.get_num_threads() // count)
    root = str(Path(glm_core.__file__).parents[1])
    env = {
        **MALLOC,
        **os.environ,
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "glm_core.align.worker", str(threads)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)


def _require_success(process: subprocess.Popen[str]) -> None:
    if process.wait():
        raise errors.TrainingError(
            f"align: a worker process ended with exit code {process.returncode}; see its message "
            "above"
        )
