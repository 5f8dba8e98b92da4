"""Does tasks of `align.run` in a process of its own: `python -m glm_core.align.worker THREADS`. A
task is a line of JSON on stdin. Progress, results, and the error if there is one, go to stdout as
JSON lines."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

import torch

from glm_core.align.calibration import open_data
from glm_core.align.controls import MakeSampler
from glm_core.align.jobs import Job
from glm_core.errors import GlmCoreError


def main(threads: str) -> int:
    """Does tasks until there are no more. Returns exit code 0, or 1 after writing an error line."""
    torch.set_num_threads(int(threads))
    tasks, out = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # no other process reads the tasks
    os.dup2(2, 1)  # whatever else prints to stdout, C code included, goes to stderr

    def say(**facts: Any) -> None:
        print(json.dumps(facts), file=out)

    def report(what: str, done: int, of: int) -> None:
        say(what=what, done=done, of=of)

    sampler: MakeSampler | None = None
    try:
        for line in iter(tasks.readline, ""):
            task = json.loads(line)
            job, number = Job.from_json(task["job"]), task["control"]
            sampler = sampler or open_data(job.config, job.cache_dir)  # one text for all jobs
            if number is None:
                job.run(sampler, report)
                say(control=None)
            else:
                say(control=dataclasses.asdict(job.train_control(number, sampler, report)))
    except GlmCoreError as error:
        say(kind=type(error).__name__, error=str(error))
        return 1
    except KeyboardInterrupt:
        return 130  # the parent was interrupted too, and prints the message
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
