"""One job of `align.run` in a process of its own: `python -m glm_core.align.worker THREADS JOB`.
Writes progress, and an error if there is one, as JSON lines to stdout."""

from __future__ import annotations

import json
import os
import sys

import torch

from glm_core.align.jobs import Job
from glm_core.errors import GlmCoreError


def main(threads: str, job: str) -> int:
    """Exit 0 done, 1 with an error line."""
    torch.set_num_threads(int(threads))
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints, a library's C code included, is talk, not result

    def tell(what: str, done: int, of: int) -> None:
        print(json.dumps({"what": what, "done": done, "of": of}), file=out)

    try:
        Job.from_json(job).run(None, tell)
    except GlmCoreError as error:
        print(json.dumps({"kind": type(error).__name__, "error": str(error)}), file=out)
        return 1
    except KeyboardInterrupt:
        return 130  # the parent was interrupted too, and speaks for both
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
