"""Tests that the commands a vendor uses find and name every defect, and end."""

from __future__ import annotations

import dataclasses
import importlib
import os
import pydoc_data.topics
import re
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from vendor_sim import faults

from glm_core.cli import main

CONFIG = """
[model]
num_layers = 1
hidden = 32
num_heads = 2
ffn = 48
vocab = 512
max_length = 32

[data]
path = "text.txt"
vocab = 512
length = 32

[train]
steps = 3
warmup_steps = 1
micro_batch = 2
global_batch = 2
save_every = 1
"""
RUN = "align run --config small.toml --backends sim --dtypes float32 --controls 4 --out run"
BISECT = "align bisect --config small.toml --backend sim"
TRAIN = "train --config small.toml --backend sim --out trained"
CASE = "conformance --backend sim --id geglu-float32-2x5x48-test"
TRACE = "trace fallbacks --config small.toml --backend sim"

NO_FLOAT64 = "missing_dtype:dtype=float64"
"""as Apple's mps; the oracle in float64 is the host's"""

VERDICTS = [
    ("", RUN, 0, "aligned; report"),
    ("wrong_op:op=sim::geglu", BISECT, 1, "guilty: geglu forward, float32 [2x32x48], layer 0"),
    ("tanh_gelu:", CASE, 1, "FAIL geglu-float32-2x5x48-test"),
    ("bit_flip:op=sim::adamw,call=3", RUN, 1, "op adamw optimizer is infinite, NaN, or so far off"),
    ("stale_buffer:op=sim::geglu", BISECT, 1, "guilty: geglu forward"),
    ("missing_dtype:dtype=float32", TRAIN, 2, "backend sim computes in bfloat16, float16"),
    (NO_FLOAT64, RUN.replace(" sim ", " reference:sim "), 0, "aligned; report"),
    (
        NO_FLOAT64,
        "conformance --backend reference:sim --id rope-float32-*-test",
        0,
        " pass, 0 fail",
    ),
    ("out_of_memory:value=100000", TRAIN, 1, "OutOfMemoryError: sim: out of memory"),
    (
        "device_lost:op=sim::geglu,call=2",
        TRAIN,
        1,
        "device lost while it ran sim::geglu; reset it; reset the device, then resume; glm-core "
        "align bisect waits for every call and names the op; last checkpoint: trained/checkpoints/"
        "step-00000001",
    ),
    ("hang:op=sim::geglu,call=2", RUN, 1, "sim::geglu did not finish within 1 s"),
    ("hang:op=sim::geglu,call=2", BISECT, 1, "guilty: geglu forward, float32 [2x32x96], layer 0"),
    ("cpu_fallback:op=aten::_softmax", TRACE, 0, "the runtime sent aten::_softmax there"),
]


@pytest.fixture(autouse=True)
def sound_device() -> None:
    """Leaves the device of this process alone: none that is forked from it could start its own."""


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Imports what the commands need, and torch's compiler, which the shapes of some operators on
    this device are computed with: once for all forks, and outside of their time limits."""
    torch.arange(1, device="meta")
    for name in ("bisection", "fallbacks", "jobs", "report"):
        importlib.import_module(f"glm_core.align.{name}")


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def command(line: str, folder: Path, **environment: str) -> Ended:
    """Runs a command in a process of its own: a fork of this one, which has imported torch and has
    launched nothing on the device."""
    (folder / "small.toml").write_text(CONFIG)
    (folder / "text.txt").write_text(" ".join(list(pydoc_data.topics.topics.values())[:12]))
    if not (pid := os.fork()):
        _run(line.split(), folder, environment)
    deadline = time.monotonic() + 120
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    out, err = ((folder / name).read_text() for name in ("out", "err"))
    return Ended(os.waitstatus_to_exitcode(ended[1]), out, err)


def _run(words: list[str], folder: Path, environment: dict[str, str]) -> NoReturn:
    code = 1
    try:
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), descriptor)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.chdir(folder)
        os.environ.update(environment)
        faults.read_environment()
        code = main(words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@pytest.mark.parametrize(
    ("fault", "line", "code", "told"),
    VERDICTS,
    ids=[f"{f.partition(':')[0] or 'sound'}-{line.split(' --')[0]}" for f, line, *_ in VERDICTS],
)
def test_verdict(fault: str, line: str, code: int, told: str, tmp_path: Path) -> None:
    hangs = fault.startswith("hang")
    timeout_s = "1" if hangs else "60"  # only the wait for a hang shall reach its end
    done = command(line, tmp_path, VENDOR_SIM_FAULT=fault, VENDOR_SIM_TIMEOUT_S=timeout_s)
    assert done.returncode == code, done.stdout + done.stderr
    assert told in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_driver_without_timeout_is_ended_by_ours(tmp_path: Path) -> None:
    done = command(
        f"{TRAIN} --timeout 5",
        tmp_path,
        VENDOR_SIM_FAULT="hang:op=sim::geglu,call=2",
        VENDOR_SIM_TIMEOUT_S="1e6",
    )
    assert done.returncode == 1, done.stderr
    # step 2; on a machine so busy that 5 s pass before the hang, step 1
    assert re.search("backend sim: step [12]: no progress for 5 s", done.stderr), done.stderr
    assert "then resume from trained/checkpoints" in done.stderr
