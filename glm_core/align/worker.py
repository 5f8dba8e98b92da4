"""Runs one job of `align.run` in a process of its own: `python -m glm_core.align.worker THREADS
JOB`. Progress, and the error if there is one, go to stdout as JSON lines."""

from __future__ import annotations

import json
import os
import sys

import torch

from glm_core.align.jobs import Job
from glm_core.errors import GlmCoreError


def main(threads: str, job: str) -> int:
    """Runs the job. Returns exit code 0, or 1 after writing an error line."""
    torch.set_num_threads(int(threads))
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints to stdout, C code included, goes to stderr

    def report(what: str, done: int, of: int) -> None:
        print(json.dumps({"what": what, "done": done, "of": of}), file=out)

    try:
        Job.from_json(job).run(None, report)
    except GlmCoreError as error:
        print(json.dumps({"kind": type(error).__name__, "error": str(error)}), file=out)
        return 1
    except KeyboardInterrupt:
        return 130  # the parent was interrupted too, and prints the message
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
