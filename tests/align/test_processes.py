"""A process that has done its job trains the controls of another, and one that dies is reported at
once."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import cast

import markov
import pytest

from glm_core.align import processes
from glm_core.align.jobs import Job
from glm_core.errors import TrainingError

WORKER = """
import json, os, select, sys
pipe = os.open(sys.argv[1], os.O_RDWR | os.O_NONBLOCK)
for line in sys.stdin:
    task = json.loads(line)
    k, dtype = task["control"], json.loads(task["job"])["config"]["train"]["dtype"]
    if k is None and dtype == "bfloat16":  # a long job: it ends after the other's last control
        assert select.select([pipe], [], [], 300.0)[0], "the other process trained no control"
    if k == 1 and dtype == "float32":
        os.write(pipe, b"x")
    control = {"loss": [k], "loss_scale": [1.0], "skipped": [0.0], "seconds": 0.0}
    if k is not None:
        print(json.dumps({"what": f"{dtype} {k}", "done": 1, "of": 1}), flush=True)
    print(json.dumps({"control": None if k is None else control}), flush=True)
"""


def jobs(tmp_path: Path) -> list[Job]:
    """Two jobs, which nothing runs here."""
    config = markov.config("float32", steps=1)
    low = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype="bfloat16"))
    return [Job(c, [], tmp_path, 2, [], [], (1,), "", 0.0) for c in (config, low)]


def started_as(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Lets the workers be this program instead."""
    pipe = subprocess.PIPE

    def start(count: int) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, *words], stdin=pipe, stdout=pipe, text=True)

    monkeypatch.setattr(processes, "_start", start)


def test_a_free_process_trains_the_controls_of_a_busy_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    # kept open, lest what one process writes be lost where it ends before the other opens the pipe
    held = os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK)
    started_as(monkeypatch, "-c", WORKER, str(tmp_path / "pipe"))
    order = list[str]()
    both = processes.run_in_parallel(jobs(tmp_path), lambda what, *_: order.append(what))
    os.close(held)
    assert [[c.loss for c in of_job] for of_job in both] == [[[0], [1]], [[0], [1]]]
    assert order == ["bfloat16 0", "bfloat16 1", "float32 0", "float32 1"], "the longest first"


def test_a_process_that_dies_is_reported_while_the_others_still_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies = "import sys; sys.exit(7 if 'bfloat16' in sys.stdin.readline() else sys.stdin.read())"
    started_as(monkeypatch, "-c", dies)
    with pytest.raises(TrainingError, match="a worker process ended with exit code 7"):
        processes.run_in_parallel(jobs(tmp_path), cast(processes.Progress, print))
